from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from engine.errors import FormatError, OutOfRangeError
from engine.store import Store, chain, create_replica, index, inspect_replica, resize_replica
from tests.engine.store.chains import add_snapshot

BLOCK = 4096
SIZE = 40 * BLOCK

offsets = st.one_of(st.integers(0, SIZE - 1), st.integers(0, SIZE // BLOCK - 1).map(lambda block: block * BLOCK))
lengths = st.one_of(st.integers(1, 3 * BLOCK), st.integers(1, 12).map(lambda blocks: blocks * BLOCK))
operations = st.lists(
    st.tuples(st.sampled_from(["write", "write", "unmap", "unmap", "read", "snapshot", "reopen"]), offsets, lengths),
    max_size=25,
)


def make(base: Path, size: int = SIZE) -> Path:
    create_replica(base / "r1", volume="v", uuid="u", replica="r1", size=size)
    return base / "r1"


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(operations, st.sampled_from([index.CHUNK, 8 * BLOCK]))
@example([("write", 0, SIZE), ("snapshot", 0, 1), ("unmap", 100, SIZE - 100), ("reopen", 0, 1)], index.CHUNK)
@example(
    [("write", 0, BLOCK), ("snapshot", 0, 1), ("write", 10, 20), ("snapshot", 0, 1), ("write", 30, 5)], index.CHUNK
)
def test_a_chain_reads_like_a_flat_device(ops: list[tuple[str, int, int]], chunk: int) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as base, pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain, "CHUNK", chunk)
        for module in (chain, index):
            patch.setattr(module, "CHUNK_BLOCKS", chunk // BLOCK)
        patch.setattr(index, "_uniform", {})
        directory = make(Path(base))
        model = bytearray(SIZE)
        store = Store.open(directory)
        for step, (op, offset, length) in enumerate(ops):
            length = min(length, SIZE - offset)
            if op == "write":
                data = bytes((step % 255 + 1,)) * length
                store.write(offset, data)
                model[offset : offset + length] = data
            elif op == "unmap":
                store.unmap(offset, length)
                model[offset : offset + length] = bytes(length)
            elif op == "read":
                assert store.read(offset, length) == model[offset : offset + length]
            else:
                store.close()
                if op == "snapshot":
                    add_snapshot(directory, f"s{step}")
                store = Store.open(directory)
        assert store.read(0, SIZE) == model
        store.close()
        store = Store.open(directory)
        assert store.read(0, SIZE) == model
        store.close()


def test_a_snapshot_is_never_written(tmp_path: Path) -> None:
    directory = make(tmp_path)
    store = Store.open(directory)
    store.write(0, b"old" * 4096)
    store.close()
    add_snapshot(directory, "a")
    before = (directory / "volume-snap-a.img").read_bytes()
    store = Store.open(directory)
    store.write(5, b"new")
    store.unmap(0, 2 * BLOCK)
    store.close()
    assert (directory / "volume-snap-a.img").read_bytes() == before
    assert inspect_replica(directory).chain == ("volume-head-001.img", "volume-snap-a.img")


def test_unmap_gives_space_back(tmp_path: Path) -> None:
    store = Store.open(make(tmp_path))
    store.write(0, b"x" * SIZE)
    assert store.allocated >= SIZE
    store.unmap(0, SIZE)
    assert store.allocated == 0


def test_unmap_gives_space_back_where_no_snapshot_lies_below(tmp_path: Path) -> None:
    directory = make(tmp_path)
    store = Store.open(directory)
    store.write(0, b"x" * BLOCK)
    store.close()
    add_snapshot(directory, "a")
    store = Store.open(directory)
    store.write(0, b"y" * SIZE)
    store.unmap(0, SIZE)
    store.sync()
    assert store.allocated == 2 * BLOCK
    assert store.read(0, SIZE) == bytes(SIZE)


def test_unmap_writes_zeros_where_the_file_system_has_no_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "punch_hole", lambda *_: False)
    store = Store.open(make(tmp_path))
    store.write(0, b"x" * SIZE)
    store.unmap(10, SIZE - 20)
    assert store.read(0, SIZE) == b"x" * 10 + bytes(SIZE - 20) + b"x" * 10


def test_the_index_follows_what_is_touched(tmp_path: Path) -> None:
    directory = make(tmp_path, 1 << 40)
    add_snapshot(directory, "a")
    store = Store.open(directory)
    assert len(store.content._index.chunks) == 0
    store.write(1 << 39, b"x" * BLOCK)
    assert store.read(1 << 39, BLOCK) == b"x" * BLOCK
    assert len(store.content._index.chunks) == 1


@pytest.mark.parametrize("bound", ["MAX_CHUNKS", "MAX_MIXED"])
def test_the_index_forgets_what_was_looked_up_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    monkeypatch.setattr(index, bound, 2)
    directory = make(tmp_path, 8 * index.CHUNK)
    add_snapshot(directory, "a")
    store = Store.open(directory)
    for number in range(8):
        store.write(number * index.CHUNK, bytes((number + 1,)) * 100)
    for number in range(8):
        assert store.read(number * index.CHUNK, 101) == bytes((number + 1,)) * 100 + b"\0"
    assert len(store.content._index.chunks) <= 2


def test_snapshots_older_than_a_resize_read_as_zeros_beyond_their_end(tmp_path: Path) -> None:
    directory = make(tmp_path)
    store = Store.open(directory)
    store.write(0, b"x" * SIZE)
    store.close()
    add_snapshot(directory, "a")
    resize_replica(directory, 2 * SIZE)
    store = Store.open(directory)
    assert store.read(SIZE - 8, 16) == b"x" * 8 + bytes(8)
    store.write(SIZE - 8, b"y" * 16)
    assert store.read(SIZE - 9, 18) == b"x" + b"y" * 16 + b"\0"


@pytest.mark.parametrize(("offset", "length"), [(SIZE, 1), (SIZE - 1, 2), (-1, 1), (1 << 62, 4096)])
def test_requests_outside_the_volume_are_refused(tmp_path: Path, offset: int, length: int) -> None:
    store = Store.open(make(tmp_path))
    for use in (
        lambda: store.read(offset, length),
        lambda: store.write(offset, bytes(length)),
        lambda: store.unmap(offset, length),
    ):
        with pytest.raises(OutOfRangeError, match="outside the volume"):
            use()


def _link(directory: Path, image: str, parent: str) -> None:
    (directory / f"{image}.meta").write_text(json.dumps({"Name": image, "Parent": parent}))


def test_254_snapshots_open_and_one_more_is_refused(tmp_path: Path) -> None:
    directory = make(tmp_path)
    names = ["volume-head-000.img", *(f"volume-snap-{number}.img" for number in range(255))]
    for image, parent in zip(names, [*names[1:], ""], strict=True):
        _link(directory, image, parent)
        with open(directory / image, "ab") as file:
            file.truncate(SIZE)
    with pytest.raises(FormatError, match="more than 254 snapshots"):
        Store.open(directory)
    _link(directory, names[254], "")
    with open(directory / names[254], "r+b") as oldest:
        oldest.write(b"oldest")
    store = Store.open(directory)
    assert store.read(0, 6) == b"oldest"
    store.write(2, b"X")
    assert store.read(0, 6) == b"olXest"
    store.close()


def test_a_chain_in_a_circle_is_refused(tmp_path: Path) -> None:
    directory = make(tmp_path)
    add_snapshot(directory, "a")
    _link(directory, "volume-snap-a.img", "volume-snap-a.img")
    with pytest.raises(FormatError, match="circle"):
        Store.open(directory)


def test_a_missing_snapshot_is_named(tmp_path: Path) -> None:
    directory = make(tmp_path)
    add_snapshot(directory, "a")
    os.unlink(directory / "volume-snap-a.img")
    with pytest.raises(FormatError, match=r"volume-snap-a\.img is missing"):
        Store.open(directory)
