"""Replicas on small real disks that run full, one, the last, or all at once, and get room again."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import trio

from engine.controller.driver import Controller
from tests.disks import MIB, fill, move_onto, small_disk
from tests.engine.cluster import Cluster, until

pytestmark = pytest.mark.system

BLOCK = 4096
SIZE = 128 * MIB
DISK = 40 * MIB


class Disks:
    """Two replicas, each on a disk of its own."""

    def __init__(self, of: Cluster, disks: dict[str, Path]) -> None:
        self.cluster = of
        self.disks = disks

    def fill(self, name: str, leave: int = 0) -> None:
        fill(self.disks[name], leave)

    def free(self, name: str) -> None:
        (self.disks[name] / "ballast").unlink()


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Disks]:
    with contextlib.ExitStack() as stack:
        made = Cluster(tmp_path, replicas=2, size=SIZE)
        stack.callback(made.abandon)
        disks = {}
        for name in made.names:
            disks[name] = stack.enter_context(small_disk(tmp_path / f"of-{name}", DISK))
            move_onto(tmp_path / name, disks[name])
        stack.callback(made.abandon)
        made.start()
        yield Disks(made, disks)


class Blocks:
    """What was written where. After a write that failed a block may be as before or as it was to become."""

    def __init__(self, volume: Controller, seed: int) -> None:
        self.volume = volume
        self.random = Random(seed)
        self.known: dict[int, bytes] = {}
        self.maybe: dict[int, set[bytes]] = {}
        self.errors: list[int] = []

    async def write(self, block: int, count: int = 1) -> bool:
        data = [self.random.randbytes(16) * (BLOCK // 16) for _ in range(count)]
        try:
            with trio.fail_after(20):
                await self.volume.write(block * BLOCK, b"".join(data))
        except OSError as error:
            self.errors.append(error.errno or 0)
            for at, content in enumerate(data, block):
                self.maybe.setdefault(at, {self.known.get(at, bytes(BLOCK))}).add(content)
            return False
        for at, content in enumerate(data, block):
            self.known[at] = content
            self.maybe.pop(at, None)
        return True

    async def check(self) -> None:
        for block in sorted(self.known.keys() | self.maybe.keys()):
            found = await self.volume.read(block * BLOCK, BLOCK)
            if block in self.maybe:
                assert found in self.maybe[block], f"block {block} is torn"
            else:
                assert found == self.known[block], f"block {block} is not what was acknowledged"


def in_sync(volume: Controller) -> set[str]:
    return {replica.name for replica in volume.status("", "").replicas if replica.state == "in_sync"}


async def fill_up(blocks: Blocks, first: int) -> int:
    """Write on and on, from block `first`, until a write fails; the first block that was not tried."""
    while await blocks.write(first, 16):
        first += 16
        assert first * BLOCK < SIZE, "the disk does not become full"
    return first + 16


async def test_a_full_replica_leaves_and_copies_what_it_missed_when_it_has_room(two: Disks) -> None:
    copied: list[int] = []
    async with two.cluster.attached() as volume:
        blocks = Blocks(volume, 1)
        for block in range(0, 512, 16):
            assert await blocks.write(block, 16)
        await volume.flush()
        with volume.events() as events:
            two.fill("r2", leave=MIB)
            for block in range(512, 1536, 16):
                assert await blocks.write(block, 16)
            await until(lambda: in_sync(volume) == {"r1"})
            assert two.cluster.store.read().in_sync == ("r1",)
            await volume.flush()
            await blocks.check()
            two.free("r2")
            await until(lambda: in_sync(volume) == {"r1", "r2"}, timeout=40)
        async for event in events:
            copied.extend([event.total] if event.event == "replica_resyncing" else [])
        assert copied
        assert copied[-1] < 20 * MIB, "that is more than what was written"
        assert blocks.errors == []
        await blocks.check()
    two.cluster.stop()
    two.cluster.assert_identical()


async def test_the_last_replica_full_is_an_error_to_the_writer_and_no_more(two: Disks) -> None:
    two.cluster.kill("r2")
    async with two.cluster.attached() as volume:
        blocks = Blocks(volume, 2)
        assert await blocks.write(0, 256)
        two.fill("r1", leave=2 * MIB)
        tried = await fill_up(blocks, 256)
        for _ in range(20):  # again and again
            await blocks.write(tried + blocks.random.randrange(4096))
        assert set(blocks.errors) == {errno.ENOSPC}
        assert in_sync(volume) == {"r1"}
        await blocks.check()
        await volume.flush()
        # what has its room already can be written
        assert await blocks.write(0, 128)
        two.free("r1")
        assert await blocks.write(tried, 64)
        await volume.flush()
        await blocks.check()
        assert volume.failure is None
    two.cluster.stop()


async def test_both_full_at_once_the_volume_lives_is_attached_anew_and_is_equal_again(two: Disks) -> None:
    async with two.cluster.attached() as volume:
        blocks = Blocks(volume, 3)
        assert await blocks.write(0, 256)
        await volume.flush()
        two.fill("r1", leave=MIB)
        two.fill("r2", leave=MIB)
        tried = await fill_up(blocks, 256)
        for _ in range(20):
            await blocks.write(tried + blocks.random.randrange(4096))
        assert set(blocks.errors) == {errno.ENOSPC}
        assert in_sync(volume)
        await blocks.check()
    # on a full disk it still attaches, or nobody could delete anything
    async with two.cluster.attached() as volume:
        blocks.volume = volume
        await blocks.check()
        last = tried + 5000
        while await blocks.write(last):  # down to the last block
            last += 1
            assert last < tried + 8000
        await volume.unmap(0, 64 * BLOCK)
        for block in range(64):
            blocks.known[block] = bytes(BLOCK)
        assert await blocks.write(tried + 9000), "the room that was given back can be used"
        for name in two.cluster.names:
            two.free(name)
        await until(lambda: in_sync(volume) == {"r1", "r2"}, timeout=40)
        assert await blocks.write(tried, 256)
        await blocks.check()
    two.cluster.stop()
    two.cluster.assert_identical()


async def test_many_kills_on_full_disks_lose_nothing(two: Disks) -> None:
    """Metadata of each attachment and of each departure needs room of its own, again and again."""
    for name in two.cluster.names:
        two.fill(name, leave=MIB)
    known: dict[int, bytes] = {}
    for round_ in range(4):
        async with two.cluster.attached() as volume:
            blocks = Blocks(volume, 10 + round_)
            blocks.known = known
            await fill_up(blocks, 300 * round_)
            assert set(blocks.errors) == {errno.ENOSPC}
            await blocks.check()
            await volume.flush()
            # whoever had no room is out, or has found some meanwhile
            other = min({"r1", "r2"} - in_sync(volume), default="r2")
            two.cluster.kill(other)
            two.cluster.start(other)
            for block in list(blocks.known)[: 16 * round_ : 4]:
                assert await blocks.write(block)
            for name in two.cluster.names:
                left = os.statvfs(two.disks[name])
                assert left.f_bavail < 256
            known = {block: data for block, data in blocks.known.items() if block not in blocks.maybe}
    for name in two.cluster.names:
        two.free(name)
    async with two.cluster.attached() as volume:
        await until(lambda: in_sync(volume) == {"r1", "r2"}, timeout=40)
        blocks = Blocks(volume, 99)
        blocks.known = known
        await blocks.check()
    two.cluster.stop()
    two.cluster.assert_identical()
