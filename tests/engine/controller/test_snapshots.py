"""Snapshots of an attached volume, on real replicas."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import trio

from engine.controller import snapshots
from engine.controller.chains import Answers
from engine.controller.driver import Controller
from engine.controller.progress import Progress
from engine.errors import (
    BusyError,
    EngineError,
    InUseError,
    NoSuchSnapshotError,
    NotEqualError,
    ReplicasRefuseError,
    SnapshotTakenError,
    TooManySnapshotsError,
)
from engine.operations import (
    SnapshotCreate,
    SnapshotCreated,
    SnapshotDelete,
    SnapshotList,
    SnapshotPurge,
    SnapshotPurged,
    SnapshotRevert,
    SnapshotsListed,
)
from engine.store import Store
from engine.wire import messages
from engine.wire.frame import FrameType
from tests.engine.cluster import Cluster, cluster, until

BLOCK = 4096
MIB = 1 << 20


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Cluster]:
    with cluster(tmp_path) as made:
        yield made


async def create(volume: Controller, name: str, **labels: str) -> SnapshotCreated:
    return await snapshots.create(volume, SnapshotCreate(name=name, labels=labels), Progress())


def named(name: str) -> tuple[FrameType, messages.Message]:
    """For `Chains.switch`."""
    return FrameType.SNAPSHOT, messages.Snapshot(name=name, created=snapshots.now())


async def listed(volume: Controller) -> SnapshotsListed:
    return await snapshots.list_snapshots(volume, SnapshotList(), Progress())


async def delete(volume: Controller, name: str) -> None:
    await snapshots.delete(volume, SnapshotDelete(name=name), Progress())


async def revert(volume: Controller, name: str) -> None:
    await snapshots.revert(volume, SnapshotRevert(name=name), Progress())


async def purge(volume: Controller) -> SnapshotPurged:
    return await snapshots.purge(volume, SnapshotPurge(), Progress())


def in_sync(volume: Controller) -> set[str]:
    return {replica.name for replica in volume.status("", "").replicas if replica.state == "in_sync"}


def reason(volume: Controller, name: str) -> str:
    return next(replica.reason for replica in volume.status("", "").replicas if replica.name == name)


def contents(made: Cluster, name: str, snapshot: str = "") -> bytes:
    """What a stopped replica holds, in the head or in a snapshot."""
    store = Store.open(made.directory / name)
    try:
        if snapshot:
            return b"".join(store.read_snapshot(snapshot, at, MIB) for at in range(0, made.size, MIB))
        return b"".join(store.read(at, MIB) for at in range(0, made.size, MIB))
    finally:
        store.close()


def kept(made: Cluster, name: str) -> list[tuple[str, str]]:
    """Name and time of the snapshots of a stopped replica that are not marked as removed."""
    store = Store.open(made.directory / name)
    try:
        return [(info.name, info.created) for info in store.list_snapshots() if not info.removed]
    finally:
        store.close()


def assert_alike(made: Cluster, *names: str) -> None:
    """All replicas hold the same, now and in every snapshot."""
    first, *others = names or made.names
    for other in others:
        assert kept(made, first) == kept(made, other)
        for snapshot in ("", *(name for name, _ in kept(made, first))):
            assert contents(made, first, snapshot) == contents(made, other, snapshot), f"{snapshot!r} differs"


async def test_a_snapshot_is_made_on_all_replicas_listed_and_reverted_to(three: Cluster) -> None:
    async with three.attached() as volume:
        await volume.write(0, b"a" * MIB)
        made = await create(volume, "first", owner="me")
        await volume.write(0, b"b" * BLOCK)
        found = await listed(volume)
        (entry,) = found.snapshots
        assert (entry.name, entry.created, entry.labels) == ("first", made.created, {"owner": "me"})
        assert (entry.user_created, entry.removed, entry.live, entry.children) == (True, False, True, 1)
        assert entry.allocated == MIB
        assert (found.head_allocated, found.size, found.replica) == (BLOCK, three.size, "r1")
        assert 0 < made.held < 5
        await revert(volume, "first")
        assert await volume.read(0, 2 * BLOCK) == b"a" * 2 * BLOCK
        assert three.store.read().pending is None
    three.stop()
    assert_alike(three)


async def test_what_cannot_be_done_is_said_and_changes_nothing(three: Cluster) -> None:
    async with three.attached() as volume:
        await create(volume, "s")
        with pytest.raises(SnapshotTakenError, match="has a snapshot 's' already: choose another name"):
            await create(volume, "s")
        with pytest.raises(ReplicasRefuseError, match="'a/b' cannot be the name of a snapshot"):
            await create(volume, "a/b")
        with pytest.raises(ReplicasRefuseError, match="labels of snapshot 'x' need more"):
            await create(volume, "x", a="b" * 3000)
        for act in (delete, revert):
            with pytest.raises(NoSuchSnapshotError, match="has no snapshot 'nope'"):
                await act(volume, "nope")
        volume.has_file = True
        with pytest.raises(InUseError, match="stop it with"):
            await revert(volume, "s")
        async with volume.exclusive("a rebuild of replica r2"):
            for other in (create(volume, "t"), delete(volume, "s"), purge(volume)):
                with pytest.raises(BusyError, match="a rebuild of replica r2 is under way"):
                    await other
        assert [entry.name for entry in (await listed(volume)).snapshots] == ["s"]
        assert in_sync(volume) == set(three.names)


async def test_a_check_makes_nothing(three: Cluster) -> None:
    async with three.attached() as volume:
        request = SnapshotCreate(name="s", check=True)
        assert (await snapshots.create(volume, request, Progress())).created == ""
        assert (await listed(volume)).snapshots == ()
        await create(volume, "s")
        with pytest.raises(SnapshotTakenError):
            await snapshots.create(volume, request, Progress())


async def test_writers_go_on_and_every_snapshot_is_one_point_of_their_order(three: Cluster) -> None:
    """A counter that is written to two places, one after the other, never differs by more than one in a snapshot."""
    stop, writes = trio.Event(), 0
    async with three.attached() as volume, trio.open_nursery() as nursery:

        async def count() -> None:
            nonlocal writes
            while not stop.is_set():
                writes += 1
                for place in (0, three.size - BLOCK):
                    await volume.write(place, writes.to_bytes(8, "little") * (BLOCK // 8))

        async def churn(seed: int) -> None:
            rng = Random(seed)
            while not stop.is_set():
                await volume.write(rng.randrange(1, three.size // BLOCK - 1) * BLOCK, rng.randbytes(BLOCK))

        nursery.start_soon(count)
        for seed in range(8):
            nursery.start_soon(churn, seed)
        for number in range(10):
            before = writes
            made = await create(volume, f"s{number}")
            assert made.held < 5
            await until(lambda before=before: writes > before)
        stop.set()
    three.stop()
    assert_alike(three)
    for number in range(10):
        content = contents(three, "r1", f"s{number}")
        first, second = (int.from_bytes(content[at : at + 8], "little") for at in (0, three.size - BLOCK))
        assert first - second in (0, 1)


async def test_deleted_snapshots_are_merged_away_in_the_background(three: Cluster) -> None:
    async with three.attached() as volume:
        for name in ("a", "b", "c"):
            await volume.write(0, name.encode() * MIB)
            await create(volume, name)
        await delete(volume, "a")
        with pytest.raises(NoSuchSnapshotError):
            await revert(volume, "a")
        await delete(volume, "b")
        await until_async(volume, ["c"])
        assert await volume.read(0, MIB) == b"c" * MIB
        # the head builds on this one: it goes when there is another on top, and a purge sees to that
        await volume.write(0, b"d" * BLOCK)
        await delete(volume, "c")
        await volume.purger.finish()
        assert [(entry.name, entry.removed) for entry in (await listed(volume)).snapshots] == [("c", True)]
        with pytest.raises(SnapshotTakenError, match="deleted but not merged away yet"):
            await create(volume, "c")
        purged = await purge(volume)
        assert purged.merged == ("c",)
        assert purged.copied == BLOCK
        (system,) = (await listed(volume)).snapshots
        assert (system.user_created, system.removed) == (False, True)
        assert (await purge(volume)).merged == ()
        assert await volume.read(0, 2 * BLOCK) == b"d" * BLOCK + b"c" * BLOCK
    three.stop()
    assert_alike(three)


async def until_async(volume: Controller, names: list[str]) -> None:
    with trio.fail_after(20):
        while [entry.name for entry in (await listed(volume)).snapshots] != names:
            await trio.sleep(0.02)


async def test_merging_goes_on_with_the_next_engine(three: Cluster) -> None:
    async with three.attached() as volume:
        for name in ("a", "b"):
            await _fill(volume, 4)
            await create(volume, name)
        async with volume.exclusive("a test"):
            await volume.chains.remove("a")
    async with three.attached() as volume:
        await until_async(volume, ["b"])
    three.stop()
    assert_alike(three)


async def _fill(volume: Controller, mib: int) -> None:
    for number in range(mib):
        await volume.write(number * MIB, os.urandom(MIB))


async def test_a_replica_that_fails_the_switch_leaves_before_the_answer(
    three: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with three.attached(request_timeout=1.0) as volume:
        await volume.write(0, b"x" * BLOCK)
        call_all = volume.call_all

        async def stop_and_call(mask: int, kind: FrameType, message: messages.Message | None = None) -> Answers:
            if kind == FrameType.SNAPSHOT:
                os.kill(three.processes["r2"].pid, signal.SIGSTOP)
            return await call_all(mask, kind, message)

        monkeypatch.setattr(volume, "call_all", stop_and_call)
        await create(volume, "s")
        assert three.store.read().in_sync == ("r1", "r3")
        os.kill(three.processes["r2"].pid, signal.SIGCONT)


async def test_a_replica_without_the_snapshot_is_rebuilt(three: Cluster) -> None:
    async with three.attached() as volume:
        await volume.write(0, b"x" * BLOCK)
        three.kill("r3")
        await volume.write(0, b"y" * BLOCK)
        await create(volume, "s")
        assert three.store.read().in_sync == ("r1", "r2")
        three.start("r3")
        await until(lambda: in_sync(volume) == set(three.names))
    three.stop()
    assert_alike(three)


async def test_a_replica_that_missed_a_deletion_follows(three: Cluster) -> None:
    async with three.attached() as volume:
        for name in ("a", "b"):
            await volume.write(0, name.encode() * BLOCK)
            await create(volume, name)
        three.kill("r1")
        await volume.write(BLOCK, b"c" * BLOCK)
        await delete(volume, "a")
        await purge(volume)
        three.start("r1")
        await until(lambda: in_sync(volume) == set(three.names))
    three.stop()
    assert_alike(three)


async def test_a_replica_that_missed_a_revert_gets_everything_or_is_rebuilt(three: Cluster) -> None:
    async with three.attached() as volume:
        await volume.write(0, b"a" * BLOCK)
        await create(volume, "a")
        await volume.write(0, b"lost" * (BLOCK // 4))
        await volume.write(3 * MIB, b"lost" * (BLOCK // 4))
    # a clean end: no map tells of these writes any more
    async with three.attached() as volume:
        three.kill("r2")
        await volume.flush()
        await revert(volume, "a")
        assert three.store.read().reverted_without == ("r2",)
        three.start("r2")
        await until(lambda: in_sync(volume) == set(three.names))
        assert three.store.read().reverted_without == ()
        for _ in three.names:  # each answers in turn
            assert await volume.read(0, BLOCK) == b"a" * BLOCK
            assert await volume.read(3 * MIB, BLOCK) == bytes(BLOCK)
        # the next one is aside for the members, and below the head for who was away: that cannot be told by maps
        await create(volume, "b")
        three.kill("r2")
        await volume.write(0, b"b" * BLOCK)
        await revert(volume, "a")
        three.start("r2")
        await until(lambda: in_sync(volume) == set(three.names))
    three.stop()
    assert_alike(three)


async def test_254_snapshots_and_a_clear_error_after(tmp_path: Path) -> None:
    with cluster(tmp_path, replicas=1, size=MIB) as made:
        async with made.attached() as volume:
            for number in range(254):
                await volume.chains.switch(*named(f"s{number}"))
            with pytest.raises(TooManySnapshotsError, match="has 254 snapshots, and cannot have more: delete some"):
                await create(volume, "more")
            await delete(volume, "s7")
            await purge(volume)
            await create(volume, "more")
            assert len((await listed(volume)).snapshots) == 254


async def test_clients_wait_no_longer_than_the_timeout_and_are_answered_then(three: Cluster) -> None:
    async with three.attached(request_timeout=1.0) as volume:
        # a membership change that cannot be recorded keeps a write under way
        os.rename(three.directory / "record.json", three.directory / "away.json")
        os.kill(three.processes["r3"].pid, signal.SIGSTOP)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(volume.write, 0, b"x" * BLOCK)
                await until(lambda: not volume.core.quiet)
                began = trio.current_time()
                with pytest.raises(NotEqualError, match="requests under way are not answered"):
                    await volume.chains.switch(*named("s"))
                assert trio.current_time() - began < 3
                assert not volume.core.holding
                with pytest.raises(NotEqualError, match="does not know yet that r3 is lost"):
                    await snapshots.create(volume, SnapshotCreate(name="s", patience=0.1), Progress())
                os.rename(three.directory / "away.json", three.directory / "record.json")
            assert await volume.read(0, BLOCK) == b"x" * BLOCK
            await create(volume, "s")
        finally:
            os.kill(three.processes["r3"].pid, signal.SIGCONT)


async def test_an_engine_error_is_raised_when_nothing_answers(tmp_path: Path) -> None:
    with cluster(tmp_path, replicas=1) as made, pytest.raises(BaseExceptionGroup):
        async with made.attached() as volume:
            made.kill("r1")
            with pytest.raises(EngineError):
                await create(volume, "s")
            raise RuntimeError("end")
