"""A replica that grows while it is open, and whose machine loses power while it does."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.errors import StoreError
from engine.store import Store, create_replica, inspect_replica, layout, resize_replica
from tests.engine.store.powercut import materialise, recording

BLOCK = 4096
MIB = 1 << 20
SIZE, LARGER = 10 * MIB, 27 * MIB + BLOCK


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(layout, "RESERVE_SIZE", 16)
    # inode numbers are not used twice there
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


def build(directory: Path) -> Store:
    create_replica(directory, volume="v", uuid="u", replica="r1", size=SIZE)
    store = Store.open(directory)
    store.write(0, b"s" * BLOCK)
    store.snapshot("s")
    store.maps.track(["r2"])
    store.maps.mark([9])
    store.maps.sync()
    store.write(SIZE - BLOCK, b"end" + bytes(BLOCK - 3))
    store.sync()
    return store


def test_an_open_replica_grows_and_every_part_of_it_knows(base: Path) -> None:
    store = build(base / "r1")
    store.resize(LARGER)
    assert (store.size, inspect_replica(base / "r1").size) == (LARGER, LARGER)
    store.maps.mark([27])
    store.maps.sync()
    store.write(LARGER - BLOCK, b"x" * BLOCK)
    assert store.read(LARGER - 2 * BLOCK, 2 * BLOCK) == bytes(BLOCK) + b"x" * BLOCK
    assert store.read(SIZE - BLOCK, 3) == b"end"
    assert store.maps.bitmap("") == store.maps.bitmap("r2") == bytes((0, 2, 0, 8))
    assert store.read_snapshot("s", LARGER - BLOCK, BLOCK) == bytes(BLOCK)
    store.maps.track(["r2", "r3"])  # a map made after it fits
    store.resize(LARGER)
    with pytest.raises(StoreError, match="cannot shrink"):
        store.resize(SIZE)
    store.close()
    store = Store.open(base / "r1")
    assert store.read(LARGER - BLOCK, BLOCK) == b"x" * BLOCK
    assert store.maps.bitmap("r3")[3] == 8
    store.close()


def test_after_a_power_cut_at_any_point_it_has_the_old_or_the_new_size_and_grows_again(base: Path) -> None:
    store = build(base / "r1")
    with recording(base / "r1") as recorder:
        store.resize(LARGER)
    store.close()
    sizes = set()
    for number, state in enumerate(recorder.states):
        crashed = base / f"crash{number}"
        materialise(state, crashed)
        for _ in range(2):
            store = Store.open(crashed)
            sizes.add(store.size)
            assert store.read(SIZE - BLOCK, 4) == b"end\0"
            assert store.read(0, BLOCK) == b"s" * BLOCK
            count = (store.size + MIB - 1) // MIB
            bits = bytes((0, 2)).ljust((count + 7) // 8, b"\0")
            assert store.maps.bitmap("") == store.maps.bitmap("r2") == bits
            store.close()
            resize_replica(crashed, LARGER)
        assert inspect_replica(crashed).size == LARGER
    assert sizes == {SIZE, LARGER}
    assert len(recorder.states) > 6
