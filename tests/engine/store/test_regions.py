from __future__ import annotations

import pytest

from engine.store import regions
from engine.store.regions import Regions


def written(maps: Regions, region: int, seq: int) -> None:
    if not maps.touch(region, region, seq):
        maps.mark(maps.missing(region, region))
        maps.confirm([region])
        assert maps.touch(region, region, seq)


def test_a_region_is_missing_until_its_bit_is_durable() -> None:
    maps = Regions(8)
    assert not maps.touch(2, 3, seq=1)
    assert maps.missing(2, 3) == [2, 3]
    assert maps.mark([2, 3]) == [2, 3]
    assert maps.mark([2, 3]) == []
    assert maps.missing(2, 3) == [2, 3]
    assert not maps.touch(3, 3, seq=2)
    maps.confirm([2, 3])
    assert maps.touch(2, 3, seq=3)
    assert maps.dirty == 2


def test_settled_regions_stay_set_until_they_are_idle() -> None:
    maps = Regions(8)
    written(maps, 1, seq=1)
    assert maps.settled(2, inherited=False) == []
    maps.now = regions.IDLE_SECONDS - 1
    written(maps, 1, seq=5)
    maps.now = regions.IDLE_SECONDS + 1
    assert maps.expire() == []
    maps.now = 3 * regions.IDLE_SECONDS
    assert maps.expire() == []
    assert maps.settled(6, inherited=False) == [1]
    assert maps.dirty == 0


def test_idle_regions_go_without_another_settled() -> None:
    maps = Regions(8)
    written(maps, 1, seq=1)
    assert maps.settled(2, inherited=False) == []
    maps.now = 2 * regions.IDLE_SECONDS
    assert maps.expire() == [1]


def test_too_many_are_cleared_oldest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regions, "HIGH_WATER", 10)
    monkeypatch.setattr(regions, "LOW_WATER", 6)
    maps = Regions(32)
    for region in range(10):
        written(maps, region, seq=region + 1)
    assert maps.settled(100, inherited=False) == []
    written(maps, 0, seq=100)
    written(maps, 10, seq=101)
    assert maps.settled(101, inherited=False) == [1, 2, 3, 4, 5]


def test_inherited_bits_wait_for_equalisation_even_when_written_since() -> None:
    maps = Regions(8, inherited=[1, 2, 3])
    assert maps.touch(1, 1, seq=1)
    maps.now = 2 * regions.IDLE_SECONDS
    assert maps.settled(5, inherited=False) == []
    assert maps.touch(2, 2, seq=7)
    assert sorted(maps.settled(6, inherited=True)) == [1, 3]
    assert maps.dirty == 1


def test_a_clean_close_keeps_what_nobody_equalised() -> None:
    maps = Regions(8, inherited=[1, 2])
    written(maps, 2, seq=1)
    written(maps, 3, seq=2)
    assert maps.clear_settled_attachment() == [3]
    assert maps.dirty == 2


def test_seqs_of_an_earlier_attachment_settle_nothing() -> None:
    maps = Regions(8)
    written(maps, 1, seq=3)
    maps.inherit()
    maps.now = 2 * regions.IDLE_SECONDS
    assert maps.settled(100, inherited=False) == []
    assert maps.settled(100, inherited=True) == [1]


def test_an_inherited_bit_on_its_way_to_disk_is_not_lost_track_of() -> None:
    maps = Regions(8)
    maps.touch(1, 1, seq=1)
    maps.mark([1])
    maps.inherit()
    assert maps.settled(1, inherited=True) == []
    maps.confirm([1])
    maps.now = 2 * regions.IDLE_SECONDS
    assert maps.expire() == [1]
