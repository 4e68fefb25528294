"""Damage on real replicas' disks: what clients read, what a scrub finds, and what is there afterwards."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from random import Random

import pytest
import trio

from engine.client import EngineEvent
from engine.controller.driver import Controller
from engine.controller.progress import Progress
from engine.controller.scrub import Judgement, Seen, judge, scrub
from engine.errors import BusyError
from engine.operations import Scrub, Scrubbed
from engine.store.digest import BAD, GOOD, HELD, UNREADABLE, UNSUMMED
from engine.wire import messages
from engine.wire.frame import FrameType
from tests.engine.cluster import Cluster, cluster, until

BLOCK = 4096
REGION = 1 << 20
HEAD = "volume-head-000.img"
SNAPSHOT = "volume-snap-s.img"


def content(seed: int, length: int = REGION) -> bytes:
    return Random(seed).randbytes(length)


def flip(made: Cluster, replica: str, offset: int, image: str = HEAD, value: int = 0x20) -> None:
    """On the disk; a page cache that had the block has it no more."""
    fd = os.open(made.directory / replica / image, os.O_RDWR)
    try:
        byte = os.pread(fd, 1, offset)[0]
        os.pwrite(fd, bytes([byte ^ value]), offset)
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def block_of(made: Cluster, replica: str, offset: int, image: str = HEAD) -> bytes:
    with open(made.directory / replica / image, "rb") as file:
        file.seek(offset)
        return file.read(BLOCK)


async def summed(made: Cluster, regions: int) -> None:
    for name in made.names:
        with trio.fail_after(20):
            while (await made.status(name)).summed_regions < regions:
                await trio.sleep(0.02)


async def prepared(made: Cluster, regions: int = 4) -> None:
    """Content everywhere, at rest, with checksums."""
    async with made.attached() as controller:
        for number in range(regions):
            await controller.write(number * REGION, content(number))
    await summed(made, regions)


async def scrubbed(controller: Controller, *, repair: bool = True) -> Scrubbed:
    with trio.fail_after(60):
        return await scrub(controller, Scrub(rate=0, repair=repair), Progress())


def found(result: Scrubbed) -> set[tuple[str, str, int, str, str]]:
    return {(one.replica, one.snapshot, one.offset, one.kind, one.outcome) for one in result.findings}


def verdicts(**seen: tuple[int, int]) -> Judgement | None:
    return judge({name: Seen(crc, flags | HELD) for name, (crc, flags) in seen.items()})


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ({"a": (1, GOOD), "b": (1, GOOD)}, None),
        ({"a": (1, GOOD), "b": (1, UNSUMMED)}, None),
        ({"a": (1, UNSUMMED)}, None),
        # a checksum says who is wrong
        ({"a": (1, BAD), "b": (2, UNSUMMED)}, (("a",), ("b",))),
        ({"a": (1, BAD), "b": (2, GOOD), "c": (2, GOOD)}, (("a",), ("b", "c"))),
        ({"a": (0, UNREADABLE), "b": (2, UNSUMMED)}, (("a",), ("b",))),
        # then more than half
        ({"a": (1, UNSUMMED), "b": (2, UNSUMMED), "c": (2, UNSUMMED)}, (("a",), ("b", "c"))),
        ({"a": (1, GOOD), "b": (2, GOOD), "c": (2, GOOD)}, (("a",), ("b", "c"))),
        # it was made of what was damaged before
        ({"a": (1, GOOD), "b": (2, UNSUMMED), "c": (2, UNSUMMED)}, (("a",), ("b", "c"))),
        # or who is right
        ({"a": (1, GOOD), "b": (2, UNSUMMED)}, (("b",), ("a",))),
        ({"a": (1, GOOD), "b": (2, UNSUMMED), "c": (3, UNSUMMED)}, (("b", "c"), ("a",))),
        # the content is right, the checksum is what is damaged
        ({"a": (1, BAD), "b": (1, GOOD)}, (("a",), ("b",))),
        # nobody can tell
        ({"a": (1, UNSUMMED), "b": (2, UNSUMMED)}, (("a", "b"), ())),
        ({"a": (1, GOOD), "b": (2, GOOD)}, (("a", "b"), ())),
        ({"a": (1, BAD)}, (("a",), ())),
        ({"a": (1, BAD), "b": (1, BAD)}, (("a", "b"), ())),
        ({"a": (0, UNREADABLE), "b": (2, BAD)}, (("a", "b"), ())),
        ({"a": (1, BAD), "b": (2, UNSUMMED), "c": (3, UNSUMMED)}, (("a",), ())),
    ],
)
def test_who_is_right(
    seen: dict[str, tuple[int, int]], expected: tuple[tuple[str, ...], tuple[str, ...]] | None
) -> None:
    assert verdicts(**seen) == (None if expected is None else Judgement(*expected))


@pytest.mark.parametrize("replicas", [2, 3])
async def test_a_flip_is_never_read_and_is_put_right(tmp_path: Path, replicas: int) -> None:
    with cluster(tmp_path, replicas, rest=0) as made:
        await prepared(made)
        flip(made, "r1", REGION + 5 * BLOCK + 9)
        flip(made, "r2", REGION + 7 * BLOCK + 9)
        async with made.attached() as controller:
            with controller.events() as events:
                for _ in range(2 * replicas):
                    assert await controller.read(REGION, REGION) == content(1)
                for name in ("r1", "r2"):
                    await until(lambda name=name: controller.health[name].repaired, what=f"{name} is repaired")
                assert all(controller.core.state(name).value == "in_sync" for name in made.names)
                told = drained(events)
            assert {(event.event, event.replica) for event in told} >= {
                ("replica_damaged", "r1"),
                ("replica_repaired", "r1"),
                ("replica_damaged", "r2"),
                ("replica_repaired", "r2"),
            }
            assert any(f"at {REGION + 5 * BLOCK} " in event.message for event in told)
            status = controller.status("", "")
            assert {replica.name: replica.repaired for replica in status.replicas}["r1"] == 1
        made.assert_identical()
        assert block_of(made, "r1", REGION + 5 * BLOCK) == content(1)[5 * BLOCK : 6 * BLOCK]
        # put back by its checksum, which still is there
        assert (await made.status("r1")).summed_regions == 4


def drained(events: trio.MemoryReceiveChannel[EngineEvent]) -> list[EngineEvent]:
    told = []
    with contextlib.suppress(trio.WouldBlock):
        while True:
            told.append(events.receive_nowait())
    return told


async def test_what_no_replica_can_read_is_an_error_and_nothing_is_lost(tmp_path: Path) -> None:
    with cluster(tmp_path, 2, rest=0) as made:
        await prepared(made)
        for name in made.names:
            flip(made, name, 3 * BLOCK, value=1 + made.names.index(name))
        async with made.attached() as controller:
            for _ in range(3):
                with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                    await controller.read(0, 8 * BLOCK)
            assert await controller.read(0, 3 * BLOCK) == content(0)[: 3 * BLOCK]
            assert await controller.read(4 * BLOCK, BLOCK) == content(0)[4 * BLOCK : 5 * BLOCK]
            result = await scrubbed(controller)
            assert found(result) == {(name, "", 3 * BLOCK, "checksum", "undecidable") for name in made.names}
            assert controller.core.members(controller.core.in_sync) == ("r1", "r2")
            # it is gone when somebody writes there
            await controller.write(3 * BLOCK, bytes(BLOCK))
            assert await controller.read(0, 4 * BLOCK) == content(0)[: 3 * BLOCK] + bytes(BLOCK)


async def test_a_scrub_finds_and_repairs_what_nobody_has_read(tmp_path: Path) -> None:
    with cluster(tmp_path, 3, rest=0) as made:
        await prepared(made)
        flip(made, "r1", 5 * BLOCK)
        flip(made, "r3", 2 * REGION + 7 * BLOCK)
        flip(made, "r3", 2 * REGION + 8 * BLOCK)
        expected = {("r1", "", 5 * BLOCK, "checksum"), ("r3", "", 2 * REGION + 7 * BLOCK, "checksum")}
        async with made.attached() as controller:
            result = await scrubbed(controller, repair=False)
            assert found(result) == {(*one, "found") for one in expected}
            assert (result.found, result.repaired, result.undecidable) == (2, 0, 0)
            assert result.verified >= 3 * 4 * REGION
            result = await scrubbed(controller)
            assert found(result) == {(*one, "repaired") for one in expected}
            assert result.repaired == 2
            assert (await scrubbed(controller)).found == 0
            status = {replica.name: replica for replica in controller.status("", "").replicas}
            assert status["r1"].damaged == 2
            assert status["r1"].scrubbed_at > 0
        made.assert_identical()


@pytest.mark.parametrize("replicas", [1, 2, 3])
async def test_without_checksums_the_majority_is_right(tmp_path: Path, replicas: int) -> None:
    with cluster(tmp_path, replicas, rest=3600) as made:
        async with made.attached() as controller:
            await controller.write(0, content(0))
        flip(made, "r1", 5 * BLOCK)
        damaged = block_of(made, "r1", 5 * BLOCK)
        async with made.attached() as controller:
            result = await scrubbed(controller)
            if replicas == 1:
                assert result.found == 0
            elif replicas == 2:
                assert found(result) == {(name, "", 5 * BLOCK, "differs", "undecidable") for name in made.names}
                assert block_of(made, "r1", 5 * BLOCK) == damaged
            else:
                assert found(result) == {("r1", "", 5 * BLOCK, "differs", "repaired")}
        if replicas == 3:
            made.assert_identical()


async def test_a_single_replica_says_what_it_lost(tmp_path: Path) -> None:
    with cluster(tmp_path, 1, rest=0) as made:
        await prepared(made)
        flip(made, "r1", 5 * BLOCK)
        async with made.attached() as controller:
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                await controller.read(4 * BLOCK, 4 * BLOCK)
            result = await scrubbed(controller)
            assert found(result) == {("r1", "", 5 * BLOCK, "checksum", "undecidable")}


async def snapshot(controller: Controller, made: Cluster) -> None:
    body = messages.Snapshot(name="s", created="2024-01-02T03:04:05Z")
    for name in made.names:
        await controller.ask(name, FrameType.SNAPSHOT, body)


@pytest.mark.parametrize("replicas", [2, 3])
async def test_flips_in_snapshots_are_found_and_put_right(tmp_path: Path, replicas: int) -> None:
    with cluster(tmp_path, replicas, rest=0) as made:
        async with made.attached() as controller:
            for number in range(3):
                await controller.write(number * REGION, content(number))
            await controller.flush()
            await snapshot(controller, made)
            await controller.write(REGION, content(7, 4 * BLOCK))
        await summed(made, 4)
        flip(made, "r1", 6 * BLOCK, SNAPSHOT)  # seen through the head
        flip(made, "r2", REGION + 2 * BLOCK, SNAPSHOT)  # hidden by the head
        async with made.attached() as controller:
            for _ in range(replicas):
                assert await controller.read(0, REGION) == content(0)
            await until(lambda: controller.health["r1"].repaired, what="the repair")
            assert block_of(made, "r1", 6 * BLOCK, SNAPSHOT) == content(0)[6 * BLOCK : 7 * BLOCK]
            flip(made, "r1", 9 * BLOCK, SNAPSHOT)
            result = await scrubbed(controller)
            assert result.snapshots == 1
            assert found(result) == {
                ("r1", "s", 9 * BLOCK, "checksum", "repaired"),
                ("r2", "s", REGION + 2 * BLOCK, "checksum", "repaired"),
            }
            assert (await scrubbed(controller)).found == 0
        for name in made.names:
            assert (made.directory / name / SNAPSHOT).read_bytes()[: 3 * REGION] == b"".join(map(content, range(3)))


async def test_writes_while_a_scrub_runs_are_no_damage(tmp_path: Path) -> None:
    with cluster(tmp_path, 3, size=8 << 20, rest=0) as made:
        await prepared(made, 8)
        async with made.attached() as controller, trio.open_nursery() as nursery:
            written = 0

            async def load(rng: Random) -> None:
                nonlocal written
                while True:
                    length = rng.choice((512, BLOCK, 3 * BLOCK, 128 << 10))
                    offset = rng.randrange((8 << 20) - length) & -512
                    if rng.random() < 0.1:
                        await controller.unmap(offset, length)
                    else:
                        await controller.write(offset, rng.randbytes(length))
                    written += 1

            for number in range(4):
                nursery.start_soon(load, Random(number))
            for _ in range(3):
                result = await scrubbed(controller)
                assert result.found == 0, result.findings
                assert result.verified > 3 * 8 * (REGION - 4 * BLOCK)
            assert written > 50
            nursery.cancel_scope.cancel()


async def test_one_scrub_at_a_time_and_a_cancelled_one_holds_nothing(tmp_path: Path) -> None:
    with cluster(tmp_path, 2, rest=0) as made:
        await prepared(made)
        async with made.attached() as controller:
            async with trio.open_nursery() as nursery:
                progress = Progress()
                nursery.start_soon(scrub, controller, Scrub(rate=1 << 20), progress)
                await until(lambda: progress.latest is not None and progress.latest.done, what="progress")
                with pytest.raises(BusyError):
                    await scrubbed(controller)
                nursery.cancel_scope.cancel()
            for number in range(4):
                await controller.write(number * REGION, content(number + 1))
            assert controller.core.idle
            assert (await scrubbed(controller)).found == 0
