"""Growing an attached volume: replicas first, then the record, whatever is killed in between."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from engine.controller.driver import Controller
from engine.controller.progress import Progress
from engine.controller.resize import resize
from engine.errors import BusyError, RecordError, ResizeError
from engine.operations import Resize, Resized
from engine.record import FileRecordStore, VolumeRecord
from engine.store import inspect_replica
from tests.engine.cluster import Cluster, cluster, until

BLOCK = 4096


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Cluster]:
    with cluster(tmp_path) as made:
        yield made


class Away(FileRecordStore):
    """A store that takes no new size."""

    def swap(self, expected_version: int, new: VolumeRecord) -> None:
        if new.size != self.read().size:
            raise RecordError("away")
        super().swap(expected_version, new)


async def grow(volume: Controller, size: int) -> Resized:
    return await resize(volume, Resize(size=size), Progress())


def sizes(of: Cluster) -> list[int]:
    return [inspect_replica(of.directory / name).size for name in of.names]


def in_sync(volume: Controller) -> set[str]:
    return {replica.name for replica in volume.status("", "").replicas if replica.state == "in_sync"}


async def test_a_volume_grows_under_its_writers(three: Cluster) -> None:
    old, new = three.size, 2 * three.size + BLOCK
    written: list[int] = []
    async with three.attached() as volume:
        told: list[int] = []
        volume.watch_size(lambda: told.append(volume.size))

        async def work() -> None:
            while True:
                await volume.write(len(written) * BLOCK, b"w" * BLOCK)
                written.append(0)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(work)
            await until(lambda: len(written) > 20)
            assert await grow(volume, new) == Resized(size=new, before=old)
            so_far = len(written)
            await until(lambda: len(written) > so_far + 20)
            nursery.cancel_scope.cancel()
        assert sizes(three) == [new] * 3
        assert (three.store.read().size, volume.size, told) == (new, new, [new])
        await volume.write(new - BLOCK, b"x" * BLOCK)
        assert await grow(volume, new) == Resized(size=new, before=new)
        with pytest.raises(ResizeError, match="can only grow, not shrink"):
            await grow(volume, old)
        with pytest.raises(ResizeError, match="multiple of 4096"):
            await grow(volume, new + 1)
        async with volume.exclusive("a rebuild"):
            assert volume.status("", "").busy == "a rebuild"
            with pytest.raises(BusyError):
                await grow(volume, 2 * new)
        assert volume.status("", "").busy == ""
    async with three.attached() as volume:
        assert await volume.read(new - BLOCK, BLOCK) == b"x" * BLOCK
    three.stop()
    three.assert_identical()


async def test_a_replica_that_was_away_is_grown_when_it_comes_back(three: Cluster) -> None:
    new = 3 * three.size
    async with three.attached() as volume:
        await volume.write(0, b"a" * BLOCK)
        three.kill("r3")
        await volume.write(BLOCK, b"b" * BLOCK)
        await grow(volume, new)
        await volume.write(new - BLOCK, b"c" * BLOCK)
        assert sizes(three) == [new, new, three.size]
        three.start("r3")
        await until(lambda: in_sync(volume) == set(three.names))
        assert sizes(three) == [new] * 3
    three.stop()
    three.assert_identical()


async def test_a_replica_that_dies_meanwhile_leaves_and_the_volume_grows(three: Cluster) -> None:
    new = 2 * three.size
    async with three.attached(request_timeout=0.5) as volume:
        pid = three.processes["r2"].pid
        os.kill(pid, signal.SIGSTOP)
        await grow(volume, new)
        await until(lambda: in_sync(volume) == {"r1", "r3"})
        os.kill(pid, signal.SIGCONT)
        await until(lambda: in_sync(volume) == set(three.names))
        assert sizes(three) == [new] * 3


async def test_an_engine_cut_off_between_replicas_and_record_leaves_the_old_size_and_takes_it_again(
    three: Cluster,
) -> None:
    old, new = three.size, 2 * three.size

    async with three.attached(store=Away(three.store.path)) as volume:
        with trio.move_on_after(0.5):
            await grow(volume, new)
        assert volume.size == old
        with pytest.raises(OSError, match="outside the volume"):
            await volume.write(old, bytes(BLOCK))
    assert sizes(three) == [new] * 3
    assert three.store.read().size == old
    async with three.attached() as volume:
        await volume.write(old - BLOCK, b"e" * BLOCK)
        await grow(volume, new)
        await volume.write(new - BLOCK, b"f" * BLOCK)
        assert three.store.read().size == new
    three.stop()
    three.assert_identical()
