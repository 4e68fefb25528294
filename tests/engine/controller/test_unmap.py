"""Discards give room back on every replica: all of it without snapshots, the head's with them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.store import Store
from tests.engine.cluster import Cluster, cluster

BLOCK = 4096
MIB = 1 << 20


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Cluster]:
    with cluster(tmp_path, replicas=2) as made:
        yield made


def taken(of: Cluster, image: str) -> list[int]:
    return [(of.directory / name / image).stat().st_blocks * 512 for name in of.names]


async def test_a_discard_shrinks_the_head_of_every_replica(two: Cluster) -> None:
    async with two.attached() as volume:
        data = os.urandom(MIB)
        for at in range(4):
            await volume.write(at * MIB, data)
        await volume.flush()
        before = taken(two, "volume-head-000.img")
        assert min(before) >= 4 * MIB
        await volume.unmap(MIB + 100, MIB)  # parts of blocks are zeroed, whole ones given back
        await volume.unmap(3 * MIB, MIB)
        await volume.flush()
        after = taken(two, "volume-head-000.img")
        assert all(then - now >= 2 * MIB - 2 * BLOCK for then, now in zip(before, after, strict=True))
        assert await volume.read(MIB, 200) == data[:100] + bytes(100)
        assert await volume.read(2 * MIB, 200) == bytes(100) + data[100:200]
        assert await volume.read(3 * MIB, MIB) == bytes(MIB)
    two.stop()
    two.assert_identical()


async def test_with_snapshots_below_only_heads_shrink_and_old_content_never_shows_through(two: Cluster) -> None:
    old, new = os.urandom(2 * MIB), os.urandom(MIB)
    async with two.attached() as volume:
        for at in range(2):
            await volume.write(at * MIB, old[at * MIB : (at + 1) * MIB])
        await volume.flush()
    two.stop()
    for name in two.names:
        store = Store.open(two.directory / name)
        store.snapshot("s", created="2024-05-06T07:08:09Z")
        store.close()
    two.start()
    async with two.attached() as volume:
        await volume.write(MIB, new)  # over what the snapshot holds
        for at in range(4, 6):
            await volume.write(at * MIB, new)  # where it holds nothing
        await volume.flush()
        head, frozen = taken(two, "volume-head-001.img"), taken(two, "volume-snap-s.img")
        assert min(head) >= 3 * MIB
        await volume.unmap(4 * MIB, MIB)
        await volume.unmap(5 * MIB, MIB)
        await volume.unmap(0, MIB // 2)
        await volume.unmap(MIB, MIB)
        await volume.flush()
        after = taken(two, "volume-head-001.img")
        # zeros have to hide what lies below; elsewhere the room goes back
        assert all(then - now >= 2 * MIB - MIB // 2 for then, now in zip(head, after, strict=True))
        assert taken(two, "volume-snap-s.img") == frozen
        assert await volume.read(0, MIB) == bytes(MIB // 2) + old[MIB // 2 : MIB]
        for at in (1, 4, 5):
            assert await volume.read(at * MIB, MIB) == bytes(MIB)
    two.stop()
    for name in two.names:
        store = Store.open(two.directory / name)
        assert store.read(0, MIB) == bytes(MIB // 2) + old[MIB // 2 : MIB]
        assert store.read_snapshot("s", 0, 2 * MIB) == old
        store.close()
