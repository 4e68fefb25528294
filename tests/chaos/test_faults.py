"""Which faults come, and that a disk's faults stay on that disk."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.store.sums import Sums
from tests.chaos.disk import Disk
from tests.chaos.faults import KINDS, schedule
from tests.chaos.flips import flip

NAMES = ["r1", "r2", "r3"]


@given(st.text(max_size=5))
def test_each_kind_comes_once_before_any_comes_twice(seed: str) -> None:
    first = list(islice(schedule(seed, KINDS, NAMES), len(KINDS)))
    assert {kind.name for kind, _ in first} == {kind.name for kind in KINDS}
    assert first == list(islice(schedule(seed, KINDS, NAMES), len(KINDS)))


@given(st.text(max_size=5), st.integers(2, 5))
def test_targets_and_times_are_those_of_the_kind(seed: str, replicas: int) -> None:
    names = [f"r{i}" for i in range(replicas)]
    for kind, fault in islice(schedule(seed, KINDS, names), 60):
        assert len(fault.targets) == (replicas if kind.targets < 0 else min(kind.targets, replicas))
        assert kind.seconds[0] <= fault.seconds <= kind.seconds[1]


def test_a_flip_changes_one_bit_of_what_is_written(tmp_path: Path) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(1 << 20)
    assert flip(image, Random(1)) is None
    with image.open("r+b") as file:
        file.seek(512 << 10)
        file.write(bytes(range(256)) * 32)
    # nobody would find it: the region has no checksums yet
    assert flip(image, Random(1)) is None
    sums = Sums(tmp_path, "image")
    write = sums.begin([0])
    with image.open("rb") as file:
        write.run(file.fileno())
    sums.finish(write)
    sums.close()
    before = image.read_bytes()
    offset = flip(image, Random(1))
    after = image.read_bytes()
    assert offset is not None
    assert 512 << 10 <= offset < 520 << 10
    assert [i for i in range(len(before)) if before[i] != after[i]] == [offset]
    assert (before[offset] ^ after[offset]).bit_count() == 1


async def test_a_disk_that_is_not_mounted_is_left_alone(tmp_path: Path) -> None:
    disk = Disk(tmp_path, "r1", 1 << 20)
    disk.image.touch()
    disk.place.mkdir()
    for act in (disk.fill, disk.cut, disk.free):
        with pytest.raises(OSError, match="nothing is mounted"):
            act()
    assert list(disk.place.iterdir()) == []
