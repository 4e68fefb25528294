from __future__ import annotations

import errno
import json
import os
import random
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import (
    OutOfRangeError,
    SnapshotExistsError,
    SnapshotInUseError,
    SnapshotNotFoundError,
    StoreError,
)
from engine.store import (
    Store,
    adopt_replica,
    chain,
    coalesce,
    create_replica,
    index,
    inspect_replica,
    layout,
    resize_replica,
    switch,
    views,
)
from tests.engine.store.chains import add_snapshot
from tests.engine.store.longhorn import longhorn_directory

BLOCK = 4096
SIZE = 40 * BLOCK
WHEN = "2024-05-06T07:08:09Z"


def make(base: Path, size: int = SIZE) -> Store:
    create_replica(base / "r1", volume="v", uuid="u", replica="r1", size=size)
    return Store.open(base / "r1")


offsets = st.one_of(st.integers(0, SIZE - 1), st.integers(0, SIZE // BLOCK - 1).map(lambda block: block * BLOCK))
lengths = st.one_of(st.integers(1, 3 * BLOCK), st.integers(1, 12).map(lambda blocks: blocks * BLOCK))
KINDS = ["write"] * 4 + ["unmap", "unmap", "read", "look", "snapshot", "snapshot", "snapshot", "revert", "remove"]
operations = st.lists(
    st.tuples(st.sampled_from([*KINDS, "remove", "step", "step", "step", "reopen"]), offsets, lengths), max_size=50
)


class Model:
    """A flat array for the head and one for each snapshot, beside the store."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.store = Store.open(directory)
        self.head = bytearray(SIZE)
        self.snapshots: dict[str, bytes] = {}
        self.removed: set[str] = set()
        self.count = 0
        self.random = random.Random(1)

    def write(self, offset: int, length: int) -> None:
        self.count += 1
        data = bytes((self.count % 255 + 1,)) * length
        self.store.write(offset, data)
        self.head[offset : offset + length] = data

    def unmap(self, offset: int, length: int) -> None:
        self.store.unmap(offset, length)
        self.head[offset : offset + length] = bytes(length)

    def read(self, offset: int, length: int) -> None:
        assert self.store.read(offset, length) == self.head[offset : offset + length]

    def look(self, offset: int, length: int) -> None:
        for name, content in self.snapshots.items():
            assert self.store.read_snapshot(name, offset, length) == content[offset : offset + length], name

    def snapshot(self, offset: int, length: int) -> None:
        self.count += 1
        self.store.snapshot(f"s{self.count}")
        self.snapshots[f"s{self.count}"] = bytes(self.head)

    def revert(self, offset: int, length: int) -> None:
        if self.snapshots:
            name = sorted(self.snapshots)[offset % len(self.snapshots)]
            self.store.revert(name)
            self.head = bytearray(self.snapshots[name])

    def remove(self, offset: int, length: int) -> None:
        if self.snapshots:
            name = sorted(self.snapshots)[offset % len(self.snapshots)]
            self.store.mark_removed(name)
            self.removed.add(name)
            del self.snapshots[name]

    def step(self, offset: int, length: int) -> None:
        """With client requests at every point at which another thread could see the files."""
        if not self.removed:
            return
        name = sorted(self.removed)[offset % len(self.removed)]
        infos = {info.name: info for info in self.store.list_snapshots()}
        latest = [info.name for info in infos.values() if info.live][-1:] == [name]
        try:
            step = self.store.begin_coalesce(name, length)
        except SnapshotInUseError:
            assert latest or infos[name].children > 1
            return
        assert not latest
        assert infos[name].children <= 1
        with pytest.MonkeyPatch.context() as patch:
            for change in ("pwrite_all", "punch_hole"):
                patch.setattr(coalesce, change, self._disturbed(getattr(coalesce, change)))
            step.run()
        self._disturb()
        if self.store.finish_coalesce(step):
            self.removed.remove(name)
        self._disturb()

    def _disturbed(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self._disturb()
            result = inner(*args)
            self._disturb()
            return result

        return call

    def _disturb(self) -> None:
        offset = self.random.randrange(SIZE)
        length = min(self.random.randrange(1, 3 * BLOCK), SIZE - offset)
        self.random.choice([self.read, self.look, self.write, self.unmap])(offset, length)

    def reopen(self, offset: int, length: int) -> None:
        self.store.close()
        self.store = Store.open(self.directory)

    def check(self) -> None:
        self.read(0, SIZE)
        self.look(0, SIZE)
        listed = {info.name: info for info in self.store.list_snapshots()}
        assert {name for name, info in listed.items() if not info.removed} == set(self.snapshots)
        assert {name for name, info in listed.items() if info.removed} == self.removed


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(operations, st.sampled_from([index.CHUNK, 8 * BLOCK]), st.booleans())
def test_every_snapshot_reads_like_a_flat_device(ops: list[tuple[str, int, int]], chunk: int, always: bool) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as base, pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain, "CHUNK", chunk)
        for module in (chain, index):
            patch.setattr(module, "CHUNK_BLOCKS", chunk // BLOCK)
        patch.setattr(index, "_uniform", {})
        patch.setattr(layout, "RESERVE_SIZE", 16)
        patch.setattr(views, "MAX_LAYERS", 6)
        make(Path(base)).close()
        model = Model(Path(base) / "r1")
        for kind, offset, length in ops:
            getattr(model, kind)(offset, min(length, SIZE - offset))
            if always:
                model.check()
        model.check()
        model.reopen(0, 0)
        model.check()
        # everything that is removed can be got rid of once the head builds on something else
        model.snapshot(0, 0)
        for _ in range(len(model.removed) + 1):
            for name in list(model.removed):
                try:
                    model.store.coalesce(name)
                    model.removed.remove(name)
                except SnapshotInUseError as error:
                    assert "several snapshots build on" in str(error)  # noqa: PT017
        model.check()
        model.store.close()


def files(directory: Path, pattern: str = "*") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob(pattern)}


def test_a_snapshot_has_these_bytes_on_disk(tmp_path: Path) -> None:
    store = make(tmp_path, 10 << 20)
    store.set_marks(dirty=True)
    store.write(0, b"x" * 4096)
    store.snapshot("daily-1", user_created=True, labels={"job": "daily"}, created=WHEN)
    store.write(4096, b"y" * 4096)
    store.snapshot("sys.2", user_created=False, created="2024-05-06T08:00:00.5Z")
    store.mark_removed("daily-1")
    assert files(tmp_path / "r1", "volume*.meta") == {
        "volume.meta": b'{"Size":10485760,"Head":"volume-head-002.img","Dirty":true,"Rebuilding":false,"Error":"",'
        b'"Parent":"volume-snap-sys.2.img","SectorSize":512,"BackingFilePath":""}\n',
        "volume-head-002.img.meta": b'{"Name":"volume-head-002.img","Parent":"volume-snap-sys.2.img","Removed":false,'
        b'"UserCreated":false,"Created":"2024-05-06T08:00:00.5Z","Labels":null}\n',
        "volume-snap-sys.2.img.meta": b'{"Name":"volume-snap-sys.2.img","Parent":"volume-snap-daily-1.img",'
        b'"Removed":false,"UserCreated":false,"Created":"2024-05-06T08:00:00.5Z","Labels":null}\n',
        "volume-snap-daily-1.img.meta": b'{"Name":"volume-snap-daily-1.img","Parent":"","Removed":true,'
        b'"UserCreated":true,"Created":"2024-05-06T07:08:09Z","Labels":{"job":"daily"}}\n',
    }
    sizes = {path.name: (path.stat().st_size, path.stat().st_blocks) for path in (tmp_path / "r1").glob("*.img")}
    assert sizes == {
        "volume-head-002.img": (10 << 20, 0),
        "volume-snap-sys.2.img": (10 << 20, 8),
        "volume-snap-daily-1.img": (10 << 20, 8),
    }
    assert (
        inspect_replica(tmp_path / "r1").chain
        == store.chain
        == (
            "volume-head-002.img",
            "volume-snap-sys.2.img",
            "volume-snap-daily-1.img",
        )
    )
    store.coalesce("daily-1")
    assert files(tmp_path / "r1", "volume-snap-*.meta") == {
        "volume-snap-sys.2.img.meta": b'{"Name":"volume-snap-sys.2.img","Parent":"","Removed":false,'
        b'"UserCreated":false,"Created":"2024-05-06T08:00:00.5Z","Labels":null}\n',
    }
    store.revert("sys.2", created=WHEN)
    assert json.loads((tmp_path / "r1" / "volume.meta").read_bytes())["Head"] == "volume-head-003.img"
    assert sorted(path.name for path in (tmp_path / "r1").glob("*.img")) == [
        "volume-head-003.img",
        "volume-snap-sys.2.img",
    ]
    store.close()


def test_snapshots_are_listed_with_their_sizes(tmp_path: Path) -> None:
    store = make(tmp_path)
    for name, blocks in (("a", 4), ("b", 2), ("c", 1)):
        store.write(0, b"x" * blocks * BLOCK)
        store.snapshot(name, labels={"n": name}, created=WHEN)
    store.revert("a")
    store.snapshot("d", user_created=False)
    store.mark_removed("c")
    found = store.list_snapshots()
    assert [(i.name, i.parent, i.live, i.removed, i.children, i.allocated // BLOCK) for i in found] == [
        ("a", "", True, False, 2, 4),
        ("d", "a", True, False, 1, 0),
        ("b", "a", False, False, 1, 2),
        ("c", "b", False, True, 0, 1),
    ]
    assert [(i.user_created, i.labels, i.size) for i in found[:2]] == [(True, {"n": "a"}, SIZE), (False, {}, SIZE)]
    assert found[0].created == WHEN
    store.close()


def test_looking_at_a_replica_while_its_chain_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make(tmp_path)
    read, taken = layout.read_volume_meta, 0

    def read_and_change(directory: Path) -> layout.VolumeMeta:
        nonlocal taken
        meta = read(directory)
        if taken < 2:
            taken += 1
            store.snapshot(f"s{taken}")
        return meta

    monkeypatch.setattr(layout, "read_volume_meta", read_and_change)
    assert inspect_replica(tmp_path / "r1").chain == store.chain
    assert taken == 2
    store.close()


def test_the_same_name_again_says_that_it_exists(tmp_path: Path) -> None:
    store = make(tmp_path)
    store.snapshot("a")
    for _ in range(2):
        with pytest.raises(SnapshotExistsError, match="snapshot 'a' exists already"):
            store.snapshot("a")
        store.mark_removed("a")
    assert store.chain == ("volume-head-001.img", "volume-snap-a.img")
    (tmp_path / "r1" / "volume-snap-b.img").write_bytes(b"of somebody")
    with pytest.raises(SnapshotExistsError, match="snapshot 'b' exists already"):
        store.snapshot("b")
    assert (tmp_path / "r1" / "volume-snap-b.img").read_bytes() == b"of somebody"
    store.snapshot("c")
    store.close()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-a", "a b", "a\n", "ä", "x" * 129, "volume-head"])
def test_names_that_cannot_be_file_names_are_refused(tmp_path: Path, name: str) -> None:
    store = make(tmp_path)
    with pytest.raises(StoreError, match="cannot be the name of a snapshot"):
        store.snapshot(name)
    with pytest.raises(SnapshotNotFoundError, match="there is no snapshot"):
        store.mark_removed(name)
    store.snapshot("x" * 128)
    store.close()


def test_what_is_not_a_time_or_too_much_is_refused(tmp_path: Path) -> None:
    store = make(tmp_path)
    with pytest.raises(StoreError, match="not a time in UTC"):
        store.snapshot("a", created="yesterday")
    with pytest.raises(StoreError, match="labels of snapshot 'a' need more than 2048 bytes"):
        store.snapshot("a", labels={"k": "v" * 2048})
    assert store.list_snapshots() == []
    store.close()


def test_what_builds_on_a_snapshot_keeps_it(tmp_path: Path) -> None:
    store = make(tmp_path)
    store.snapshot("a")
    with pytest.raises(SnapshotInUseError, match="not marked as removed"):
        store.coalesce("a")
    store.mark_removed("a")
    with pytest.raises(SnapshotInUseError, match="the head builds on snapshot 'a': take another one first"):
        store.coalesce("a")
    for use in (lambda: store.revert("a"), lambda: store.read_snapshot("a", 0, 1)):
        with pytest.raises(SnapshotInUseError, match="marked as removed"):
            use()
    with pytest.raises(SnapshotNotFoundError, match="there is no snapshot 'zz'"):
        store.coalesce("zz")
    store.snapshot("b")
    store.snapshot("c")
    store.revert("b")
    store.snapshot("d")
    store.mark_removed("b")
    with pytest.raises(SnapshotInUseError, match="several snapshots build on 'b': c, d"):
        store.coalesce("b")
    store.coalesce("a")
    store.mark_removed("c")
    store.coalesce("c")
    store.coalesce("b")
    assert [info.name for info in store.list_snapshots()] == ["d"]
    store.close()


def test_254_snapshots_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    store = make(tmp_path)
    for number in range(254):
        store.write(number % 40 * BLOCK, bytes((number + 1,)))
        store.snapshot(f"s{number}")
    with pytest.raises(StoreError, match=r"it has 254 snapshots.*cannot have more: remove some"):
        store.snapshot("one-more")
    store.write(0, b"head")
    assert store.read(0, 5) == b"head\0"
    assert store.read(13 * BLOCK, 1) == bytes((254,))
    assert store.read_snapshot("s0", 0, 1) == b"\x01"
    assert store.read_snapshot("s253", 13 * BLOCK, 1) == bytes((254,))
    store.mark_removed("s1")
    with pytest.raises(StoreError, match="cannot have more"):
        store.snapshot("one-more")
    store.coalesce("s1")
    store.snapshot("one-more")
    assert store.read(13 * BLOCK, 1) == bytes((254,))
    store.close()
    store = Store.open(tmp_path / "r1")
    assert store.read(0, 5) == b"head\0"
    store.close()


def test_a_coalesce_needs_no_more_room_than_a_step(tmp_path: Path) -> None:
    size = 32 << 20
    store = make(tmp_path, size)
    store.snapshot("a")
    store.write(0, b"x" * size)
    store.snapshot("b")
    store.mark_removed("a")
    most, steps = 0, 0
    while not store.coalesce_step("a", 1 << 20):
        store.sync()
        most = max(most, store.allocated)
        steps += 1
    assert most <= size + (4 << 20)
    assert steps == 31
    assert store.allocated <= size + (1 << 20)
    assert store.read(0, size) == b"x" * size
    store.close()


def test_a_coalesce_costs_what_the_child_holds(tmp_path: Path) -> None:
    store = make(tmp_path, 1 << 40)
    store.write(0, b"x" * (8 << 20))
    store.snapshot("big")
    store.write(1 << 39, b"y" * BLOCK)
    store.snapshot("small")
    store.mark_removed("big")
    step = store.begin_coalesce("big", 1 << 20)
    step.run()
    assert (step.done, step.copied) == (True, BLOCK)
    assert store.finish_coalesce(step)
    assert store.read((1 << 39) - 1, 3) == b"\0yy"
    assert store.read_snapshot("small", (8 << 20) - 1, 2) == b"x\0"
    store.close()


def test_a_coalesce_goes_on_where_a_killed_one_was(tmp_path: Path) -> None:
    store = make(tmp_path, 8 << 20)
    store.snapshot("a")
    store.write(0, b"x" * (8 << 20))
    store.snapshot("b")
    store.mark_removed("a")
    for _ in range(6):
        assert not store.coalesce_step("a", 1 << 20)
    store.close()
    store = Store.open(tmp_path / "r1")
    step = store.begin_coalesce("a", 1 << 30)
    step.run()
    # the last step's copy was not punched out of the child yet
    assert step.copied == 3 << 20
    assert store.finish_coalesce(step)
    assert store.read(0, 8 << 20) == b"x" * (8 << 20)
    store.close()


def test_a_coalesce_works_where_the_file_system_has_no_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coalesce, "punch_hole", lambda *_: False)
    store = make(tmp_path)
    store.snapshot("a")
    store.write(0, b"x" * SIZE)
    store.snapshot("b")
    store.mark_removed("a")
    while not store.coalesce_step("a", BLOCK):
        assert store.read(0, SIZE) == b"x" * SIZE
    assert store.read(0, SIZE) == store.read_snapshot("b", 0, SIZE) == b"x" * SIZE
    store.close()


@pytest.mark.parametrize("online", [True, False])
def test_growing_between_snapshots(tmp_path: Path, online: bool) -> None:
    store = make(tmp_path)
    store.write(0, b"x" * SIZE)
    store.snapshot("a")
    if online:
        store.resize(2 * SIZE)
    else:
        store.close()
        resize_replica(tmp_path / "r1", 2 * SIZE)
        store = Store.open(tmp_path / "r1")
    store.write(2 * SIZE - BLOCK, b"y" * BLOCK)
    store.snapshot("b")
    assert store.read_snapshot("a", SIZE - 1, 2) == b"x\0"
    assert [info.size for info in store.list_snapshots()] == [SIZE, 2 * SIZE]
    store.mark_removed("a")
    store.coalesce("a")
    assert store.read(0, 2 * SIZE) == b"x" * SIZE + bytes(SIZE - BLOCK) + b"y" * BLOCK
    assert (tmp_path / "r1" / "volume-snap-b.img").stat().st_size == 2 * SIZE
    store.close()


def test_reads_beyond_a_snapshot_are_refused(tmp_path: Path) -> None:
    store = make(tmp_path)
    store.snapshot("a")
    for offset, length in ((SIZE, 1), (-1, 1), (SIZE - 1, 2)):
        with pytest.raises(OutOfRangeError):
            store.read_snapshot("a", offset, length)
    store.close()


def test_readers_writers_and_a_coalesce_in_threads(tmp_path: Path) -> None:
    """The head belongs to this thread, as in the server; steps and reads of a snapshot run beside it."""
    store = make(tmp_path, 4 << 20)
    blocks = (4 << 20) // BLOCK
    rng = random.Random(7)
    model = bytearray(4 << 20)
    for layer in range(4):
        for block in rng.sample(range(blocks), blocks // 2):
            data = bytes((layer * 50 + block % 50 + 1,)) * BLOCK
            store.write(block * BLOCK, data)
            model[block * BLOCK : (block + 1) * BLOCK] = data
        store.snapshot(f"s{layer}")
    frozen = bytes(model)
    ended, wrong = threading.Event(), []

    def look() -> None:
        mine = random.Random(8)
        while not ended.is_set():
            at = mine.randrange(blocks - 8) * BLOCK
            if store.read_snapshot("s3", at, 8 * BLOCK) != frozen[at : at + 8 * BLOCK]:
                wrong.append(at)

    reader = threading.Thread(target=look)
    reader.start()
    try:
        for name in ("s1", "s0", "s2"):
            store.mark_removed(name)
            done = False
            while not done:
                step = store.begin_coalesce(name, 16 * BLOCK)
                worker = threading.Thread(target=step.run)
                worker.start()
                while worker.is_alive():
                    at = rng.randrange(blocks) * BLOCK
                    assert store.read(at, BLOCK) == model[at : at + BLOCK]
                    if rng.random() < 0.2:
                        store.write(at + 5, b"new")
                        model[at + 5 : at + 8] = b"new"
                worker.join()
                done = store.finish_coalesce(step)
    finally:
        ended.set()
        reader.join()
    assert not wrong
    assert store.read(0, 4 << 20) == model
    assert [info.name for info in store.list_snapshots()] == ["s3"]
    store.close()


@pytest.mark.parametrize("of", ["head", "snapshot"])
def test_an_index_that_is_built_while_blocks_go_from_a_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of: str
) -> None:
    """The hole comes between the look at the child's extents and the read."""
    store = make(tmp_path)
    store.snapshot("a")
    store.write(0, b"x" * SIZE)
    store.snapshot("b")
    store.mark_removed("a")
    assert not store.coalesce_step("a", 8 * BLOCK)
    store.content._index.clear()
    child = (tmp_path / "r1" / "volume-snap-b.img").stat().st_ino
    punch, lseek = chain.punch_hole, os.lseek
    looks = 0

    def late(*args: Any) -> bool:
        def held(fd: int, at: int, how: int) -> int:
            nonlocal looks
            found = lseek(fd, at, how)
            if how == os.SEEK_HOLE and os.fstat(fd).st_ino == child:
                looks += 1
                punch(*args)
            return found

        monkeypatch.setattr(os, "lseek", held)
        read = store.read(0, SIZE) if of == "head" else store.read_snapshot("b", 0, SIZE)
        monkeypatch.setattr(os, "lseek", lseek)
        assert read == b"x" * SIZE
        return True

    monkeypatch.setattr(coalesce, "punch_hole", late)
    assert not store.coalesce_step("a", 8 * BLOCK)
    assert looks == 1
    assert store.read(0, SIZE) == store.read_snapshot("b", 0, SIZE) == b"x" * SIZE
    store.close()


# a disk without room, and worse


def failing(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, code: int, after: int = 0) -> None:
    inner, calls = getattr(module, name), 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(code, os.strerror(code))
        return inner(*args, **kwargs)

    monkeypatch.setattr(module, name, call)


@pytest.mark.parametrize(
    ("name", "after"), [("write_image_meta", 0), ("write_image_meta", 1), ("write_volume_meta", 0)]
)
def test_a_snapshot_on_a_full_disk_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, after: int
) -> None:
    store = make(tmp_path)
    store.write(0, b"x" * BLOCK)
    before = files(tmp_path / "r1")
    failing(monkeypatch, switch, name, errno.ENOSPC, after)
    with pytest.raises(OSError, match="No space left"):
        store.snapshot("a")
    monkeypatch.undo()
    assert {**files(tmp_path / "r1"), layout.RESERVE: b""} == {**before, layout.RESERVE: b""}
    store.write(BLOCK, b"y" * BLOCK)
    store.snapshot("a")
    store.write(0, b"z" * BLOCK)
    assert store.read_snapshot("a", 0, 2 * BLOCK) == b"x" * BLOCK + b"y" * BLOCK
    store.close()


def test_a_full_disk_gives_a_snapshot_the_reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make(tmp_path)
    inner = layout.write_volume_meta

    def full(directory: Path, meta: layout.VolumeMeta) -> None:
        if (directory / layout.RESERVE).exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        inner(directory, meta)

    monkeypatch.setattr(switch, "write_volume_meta", full)
    store.snapshot("a")
    assert store.chain == ("volume-head-001.img", "volume-snap-a.img")
    assert (tmp_path / "r1" / layout.RESERVE).exists()
    store.close()


def test_a_rename_that_may_not_be_on_disk_is_not_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make(tmp_path)
    store.write(0, b"x")

    def unsure(directory: Path, meta: layout.VolumeMeta) -> None:
        layout.write_volume_meta(directory, meta)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(switch, "write_volume_meta", unsure)
    with pytest.raises(OSError, match="may or may not be on disk") as caught:
        store.snapshot("a")
    assert caught.value.errno == errno.EIO
    assert (tmp_path / "r1" / "volume-head-000.img").exists()
    store.close()
    store = Store.open(tmp_path / "r1")
    assert (store.read(0, 1), [info.name for info in store.list_snapshots()]) == (b"x", ["a"])
    assert not (tmp_path / "r1" / "volume-head-000.img").exists()
    store.close()


def test_a_coalesce_on_a_full_disk_can_be_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make(tmp_path)
    store.snapshot("a")
    store.write(0, b"x" * SIZE)
    store.snapshot("b")
    store.mark_removed("a")
    for after in range(5):
        failing(monkeypatch, coalesce, "pwrite_all", errno.ENOSPC, after)
        with pytest.raises(OSError, match="No space"):
            while not store.coalesce_step("a", 3 * BLOCK):
                pass
        monkeypatch.undo()
        assert store.read(0, SIZE) == store.read_snapshot("b", 0, SIZE) == b"x" * SIZE
    failing(monkeypatch, coalesce, "write_image_meta", errno.ENOSPC)
    with pytest.raises(OSError, match="No space"):
        store.coalesce("a")
    monkeypatch.undo()
    assert store.read(0, SIZE) == store.read_snapshot("b", 0, SIZE) == b"x" * SIZE
    store.coalesce("a")
    assert store.read(0, SIZE) == store.read_snapshot("b", 0, SIZE) == b"x" * SIZE
    store.close()


# directories of Longhorn


@pytest.fixture
def longhorn(tmp_path: Path) -> Path:
    return longhorn_directory(tmp_path / "pvc-1-abcd", SIZE)


def test_a_directory_of_longhorn_becomes_ours(longhorn: Path) -> None:
    before = files(longhorn)
    with pytest.raises(StoreError, match=r"share-manager\.json is missing"):
        Store.open(longhorn)
    adopt_replica(longhorn, volume="v", uuid="u", replica="r1")
    after = files(longhorn)
    assert {name: after.pop(name) for name in before} == before
    assert sorted(after) == ["intent.map", "share-manager.json", "share-manager.reserve"]
    with pytest.raises(StoreError, match="a replica of share-manager already"):
        adopt_replica(longhorn, volume="v", uuid="u", replica="r1")

    store = Store.open(longhorn)
    whole = b"base" * 1024 + b"new_" * 1024 + b"head" * 1024
    assert store.read(0, 3 * BLOCK) == whole
    assert store.read_snapshot("aside", 0, 2 * BLOCK) == b"base" * 1024 + b"side" * 1024
    assert [(info.name, info.live) for info in store.list_snapshots()] == [
        ("base", True),
        ("new", True),
        ("aside", False),
    ]
    store.mark_removed("aside")
    store.coalesce("aside")
    store.coalesce("base")
    assert not (longhorn / "volume-snap-new.img.checksum").exists()
    store.snapshot("ours", created=WHEN)
    store.close()
    meta = json.loads((longhorn / "volume.meta").read_bytes())
    assert (meta["Head"], meta["Parent"], meta["BackingFile"]) == ("volume-head-004.img", "volume-snap-ours.img", None)
    store = Store.open(longhorn)
    assert store.read(0, 3 * BLOCK) == whole
    assert [info.name for info in store.list_snapshots()] == ["new", "ours"]
    store.close()


def test_an_interrupted_adoption_is_repeated(longhorn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, layout, "write_identity", errno.EIO)
    with pytest.raises(StoreError, match="cannot adopt the replica"):
        adopt_replica(longhorn, volume="v", uuid="u", replica="r1")
    monkeypatch.undo()
    adopt_replica(longhorn, volume="v", uuid="u", replica="r1")
    Store.open(longhorn).close()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"Rebuilding": True}, "has not finished to rebuild"),
        ({"BackingFilePath": "/b"}, "backing image"),
        ({"Head": "volume-head-009.img"}, "is missing"),
    ],
)
def test_what_cannot_be_adopted_stays_as_it_is(longhorn: Path, change: dict[str, Any], reason: str) -> None:
    meta = json.loads((longhorn / "volume.meta").read_bytes())
    (longhorn / "volume.meta").write_text(json.dumps(meta | change))
    before = files(longhorn)
    with pytest.raises(StoreError, match=reason):
        adopt_replica(longhorn, volume="v", uuid="u", replica="r1")
    assert files(longhorn) == before


def test_snapshots_that_cannot_be_read_are_left_alone(tmp_path: Path) -> None:
    store = make(tmp_path)
    store.snapshot("a")
    store.close()
    directory = tmp_path / "r1"
    (directory / "volume-snap-torn.img").touch()
    (directory / "volume-snap-torn.img.meta").write_text("{")
    (directory / "volume-snap-lost.img.meta").write_text('{"Name": "volume-snap-lost.img"}')
    (directory / "volume-snap-orphan.img").touch()
    (directory / "volume-snap-orphan.img.meta").write_text('{"Name": "x", "Parent": "volume-snap-gone.img"}')
    before = files(directory)
    store = Store.open(directory)
    assert [info.name for info in store.list_snapshots()] == ["a"]
    store.close()
    assert files(directory) == before


def test_a_snapshot_of_a_hand_made_chain(tmp_path: Path) -> None:
    store = make(tmp_path)
    store.write(0, b"1" * BLOCK)
    store.close()
    add_snapshot(tmp_path / "r1", "a")
    store = Store.open(tmp_path / "r1")
    store.write(0, b"2")
    store.snapshot("b")
    assert store.read_snapshot("a", 0, 2) == b"11"
    assert store.read_snapshot("b", 0, 2) == store.read(0, 2) == b"21"
    store.close()
