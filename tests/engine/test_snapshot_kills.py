"""Engine and replicas are killed in the middle of changes of the snapshots; what follows finds a valid chain."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import msgspec
import pytest
import trio

from engine.client import EngineClient, EngineOperationError, EngineUnreachableError
from engine.controller import snapshots
from engine.controller.driver import Controller
from engine.controller.progress import Progress
from engine.durable import replace_file
from engine.frontend import NO_FRONTEND
from engine.launch import EngineConfig, engine_argv
from engine.operations import (
    Operation,
    SnapshotCreate,
    SnapshotCreated,
    SnapshotDelete,
    SnapshotDeleted,
    SnapshotList,
    SnapshotPurge,
    SnapshotPurged,
    SnapshotRevert,
    SnapshotReverted,
)
from engine.record import PendingRevert, bump_epoch
from engine.store import Store
from tests.engine.cluster import Cluster, cluster, until
from tests.engine.controller.test_snapshots import BLOCK, MIB, assert_alike, create, in_sync, listed, reason

SIZE = 4 * MIB


@contextlib.asynccontextmanager
async def engine(of: Cluster) -> AsyncIterator[subprocess.Popen[bytes]]:
    """A process, without a file. Killed at the end."""
    config = EngineConfig(
        record=str(of.store.path),
        secret_file=str(of.secret),
        epoch=bump_epoch(of.store).epoch,
        frontend=NO_FRONTEND,
        control=str(of.directory / "engine.sock"),
        open_timeout=5.0,
        reconnect_interval=0.05,
    )
    with (of.directory / "engine.log").open("ab") as log:
        process = subprocess.Popen(
            engine_argv(config, of.directory / "engine.json"), stdout=subprocess.PIPE, stderr=log
        )
    assert process.stdout is not None
    try:
        line = await trio.to_thread.run_sync(process.stdout.readline)
        assert json.loads(line)["event"] == "ready", line
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


async def content(volume: Controller) -> bytes:
    return b"".join([await volume.read(at, MIB) for at in range(0, SIZE, MIB)])


def copy_replica(of: Cluster, source: str, target: str) -> None:
    """What a rebuild does, by hand. Nobody runs."""
    shutil.rmtree(of.directory / target)
    # holes as they are: a hole that becomes zeros, or the other way round, is another chain
    argv = ["cp", "-a", "--sparse=auto", str(of.directory / source), str(of.directory / target)]
    subprocess.run(argv, check=True)
    for leftover in (of.directory / target).glob("changes-*.map"):
        leftover.unlink()
    identity = of.directory / target / "share-manager.json"
    known = json.loads(identity.read_bytes())
    replace_file(identity, msgspec.json.encode(known | {"replica": target}) + b"\n")


class Life:
    """A volume, what it should hold, and what became of its snapshots."""

    def __init__(self, of: Cluster, rng: Random) -> None:
        self.cluster = of
        self.rng = rng
        self.now = bytes(SIZE)
        # acknowledged ones, and those of which nobody knows
        self.snapshots: dict[str, bytes] = {}
        self.unsure: dict[str, bytes] = {}
        self.count = 0
        self.interrupted = 0

    async def look_and_write(self) -> None:
        async with self.cluster.attached() as volume:
            await until(lambda: not volume.core.dirty and not volume.core.leaving)
            found = await content(volume)
            assert found in (self.now, *self.reverted_to), "neither what it was nor what it should become"
            names = {entry.name for entry in (await listed(volume)).snapshots if not entry.removed}
            assert set(self.snapshots) <= names <= {*self.snapshots, *self.unsure}
            # what nobody heard of may be there or not, for good
            self.snapshots |= {name: data for name, data in self.unsure.items() if name in names}
            self.unsure = {}
            data = bytearray(found)
            for _ in range(8):
                at = self.rng.randrange(SIZE // BLOCK) * BLOCK
                data[at : at + BLOCK] = self.rng.randbytes(BLOCK)
                await volume.write(at, bytes(data[at : at + BLOCK]))
            self.now, self.reverted_to = bytes(data), ()
            with trio.move_on_after(10):
                while in_sync(volume) != set(self.cluster.names):
                    if any("needs a rebuild" in reason(volume, name) for name in self.cluster.names):
                        break
                    await trio.sleep(0.02)
            behind = sorted(set(self.cluster.names) - in_sync(volume))
        for name in behind:
            self.cluster.stop()
            (source, *_) = self.cluster.store.read().in_sync
            copy_replica(self.cluster, source, name)
            self.cluster.start()

    reverted_to: tuple[bytes, ...] = ()

    def next_operation(self) -> tuple[Operation, type[msgspec.Struct]]:
        self.count += 1
        names = sorted(self.snapshots)
        kind = self.rng.choice(("create", "create", "delete", "revert", "purge")) if len(names) > 1 else "create"
        if kind == "create":
            name = f"s{self.count}"
            self.unsure[name] = self.now
            return SnapshotCreate(name=name), SnapshotCreated
        if kind == "delete":
            name = self.rng.choice(names)
            self.unsure[name] = self.snapshots.pop(name)
            return SnapshotDelete(name=name), SnapshotDeleted
        if kind == "revert":
            name = self.rng.choice(names)
            self.reverted_to = (self.snapshots[name],)
            return SnapshotRevert(name=name), SnapshotReverted
        return SnapshotPurge(), SnapshotPurged

    def done(self, operation: Operation) -> None:
        """It was acknowledged."""
        if isinstance(operation, SnapshotCreate):
            self.snapshots[operation.name] = self.unsure.pop(operation.name)
        elif isinstance(operation, SnapshotDelete):
            del self.unsure[operation.name]
        elif isinstance(operation, SnapshotRevert):
            (self.now,), self.reverted_to = self.reverted_to, ()

    async def change_and_kill(self) -> None:
        operation, result = self.next_operation()
        kind = ""
        victim = self.rng.choice(("engine", "engine", *self.cluster.names))
        async with engine(self.cluster) as process, trio.open_nursery() as nursery:

            async def kill() -> None:
                await trio.sleep(self.rng.random() ** 2 * 0.06)
                if victim == "engine":
                    process.kill()
                else:
                    self.cluster.kill(victim)

            nursery.start_soon(kill)
            try:
                await EngineClient(self.cluster.directory / "engine.sock").run(operation, result)
                self.done(operation)
            except EngineUnreachableError:
                self.interrupted += 1
            except EngineOperationError as refused:
                # nothing has changed, or it could not be finished
                kind = refused.kind
                self.interrupted += 1
        assert kind in ("", "NotEqualError", "ReplicasRefuseError", "PurgeError", "NoSuchSnapshotError")
        if victim != "engine":
            self.cluster.start(victim)


@pytest.mark.parametrize("seed", [1, 2])
async def test_whatever_is_killed_the_snapshots_stay_whole(tmp_path: Path, seed: int) -> None:
    with cluster(tmp_path, size=SIZE) as three:
        life = Life(three, Random(seed))
        for _ in range(5):
            await life.look_and_write()
            await life.change_and_kill()
        await life.look_and_write()
        three.stop()
        assert_alike(three)
        for name, expected in life.snapshots.items():
            store = Store.open(three.directory / "r1")
            assert b"".join(store.read_snapshot(name, at, MIB) for at in range(0, SIZE, MIB)) == expected
            store.close()


async def test_a_revert_that_was_recorded_is_finished_before_the_first_read(tmp_path: Path) -> None:
    with cluster(tmp_path, size=SIZE) as three:
        async with three.attached() as volume:
            await volume.write(0, b"a" * BLOCK)
            await create(volume, "a")
            await volume.write(0, b"b" * BLOCK)
        three.stop()
        # the engine died when one replica had done it
        store = Store.open(three.directory / "r2")
        store.revert("a", created="2024-05-06T07:08:09Z")
        store.close()
        record = three.store.read()
        pending = PendingRevert(revert="a", created="2024-05-06T07:08:09Z")
        three.store.swap(record.version, record.next(pending=pending))
        # and one is away now
        three.start("r1", "r2")
        async with three.attached() as volume:
            for _ in three.names:
                assert await volume.read(0, BLOCK) == b"a" * BLOCK
            assert (three.store.read().pending, three.store.read().reverted_without) == (None, ("r3",))
            three.start("r3")
            await until(lambda: in_sync(volume) == set(three.names))
            for _ in three.names:
                assert await volume.read(0, BLOCK) == b"a" * BLOCK
        three.stop()
        assert_alike(three)


@pytest.mark.parametrize("partial", [("r1",), ("r2", "r3")])
async def test_a_snapshot_that_only_some_have_is_taken_back(tmp_path: Path, partial: tuple[str, ...]) -> None:
    with cluster(tmp_path, size=SIZE) as three:
        async with three.attached() as volume:
            await volume.write(0, b"a" * BLOCK)
            await create(volume, "whole")
            await volume.write(BLOCK, b"b" * BLOCK)
        three.stop()
        for name in partial:
            store = Store.open(three.directory / name)
            store.snapshot("half", created="2024-05-06T07:08:09.5Z")
            store.close()
        three.start()
        async with three.attached() as volume:
            assert in_sync(volume) == set(three.names)
            await volume.write(0, b"c" * BLOCK)
            with pytest.raises(Exception, match="'half' already, deleted but not merged away yet"):
                await create(volume, "half")
            await create(volume, "next")
            await volume.purger.finish()
            names = [entry.name for entry in (await listed(volume)).snapshots]
            assert names == ["whole", "next"]
            await create(volume, "half")
        three.stop()
        assert_alike(three)


async def test_a_removal_that_only_some_have_heard_of_is_finished(tmp_path: Path) -> None:
    with cluster(tmp_path, size=SIZE) as three:
        async with three.attached() as volume:
            for name in ("a", "b"):
                await volume.write(0, name.encode() * BLOCK)
                await create(volume, name)
        three.stop()
        store = Store.open(three.directory / "r3")
        store.mark_removed("a")
        store.close()
        three.start()
        async with three.attached() as volume:
            await volume.purger.finish()
            assert [entry.name for entry in (await listed(volume)).snapshots] == ["b"]
            assert in_sync(volume) == set(three.names)
        three.stop()
        assert_alike(three)


async def test_a_member_that_lacks_an_acknowledged_snapshot_leaves_and_is_filled_anew(tmp_path: Path) -> None:
    """Which no crash explains: somebody has put another directory in its place."""
    with cluster(tmp_path, size=SIZE) as three:
        async with three.attached() as volume:
            for name in ("a", "b"):
                await create(volume, name)
        three.stop()
        store = Store.open(three.directory / "r1")
        store.mark_removed("a")
        store.coalesce("a")
        store.close()
        three.start()
        async with three.attached() as volume:
            assert "its snapshots differ" in reason(volume, "r1")
            await until(lambda: in_sync(volume) == set(three.names))
            assert [entry.name for entry in (await listed(volume)).snapshots] == ["a", "b"]
        three.stop()
        store = Store.open(three.directory / "r1")
        assert [info.name for info in store.list_snapshots()] == ["a", "b"]
        store.close()


async def test_the_engine_answers_over_its_socket(tmp_path: Path) -> None:
    with cluster(tmp_path, size=SIZE) as three:
        async with engine(three) as process:
            client = EngineClient(three.directory / "engine.sock")
            made = await client.run(SnapshotCreate(name="a", labels={"k": "v"}), SnapshotCreated)
            assert made.created > snapshots.now()[:10]
            await client.run(SnapshotDelete(name="a"), SnapshotDeleted)
            with pytest.raises(EngineOperationError, match="has no snapshot 'a'"):
                await client.run(SnapshotRevert(name="a"), SnapshotReverted)
            assert (await client.run(SnapshotPurge(), SnapshotPurged)).merged == ("a",)
            process.send_signal(signal.SIGTERM)
            assert await trio.to_thread.run_sync(process.wait) == 0
        async with three.attached() as volume:
            await snapshots.list_snapshots(volume, SnapshotList(), Progress())
