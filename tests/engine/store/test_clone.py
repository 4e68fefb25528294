"""Clones of a replica: linked at once, then independent."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import SnapshotInUseError, SnapshotNotFoundError, StoreError
from engine.store import Store, chain, clone, create_replica, index, inspect_replica, layout, link_replica
from engine.store.snapshots import snapshot_name
from tests.engine.store.powercut import materialise, recording
from tests.engine.store.test_snapshots import BLOCK, SIZE, WHEN, Model, lengths, make, offsets


def link(base: Path, snapshot: str, name: str = "c1") -> Store:
    link_replica(base / "r1", snapshot, base / name, volume="w", uuid="x", replica="r1")
    return Store.open(base / name)


def small_chunks(patch: pytest.MonkeyPatch, blocks: int) -> None:
    patch.setattr(index, "_uniform", {})
    for module in (chain, index):
        patch.setattr(module, "CHUNK_BLOCKS", blocks)
    for module in (chain, clone):
        patch.setattr(module, "CHUNK", blocks * BLOCK)


class Sharing(Model):
    """A volume that others share snapshots with, or that shares another's."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.inherited: set[str] = set()

    def clone(self, name: str, directory: Path) -> Sharing:
        link_replica(self.directory, name, directory, volume="w", uuid="x", replica="r1")
        made = Sharing(directory)
        made.count = self.count + 100
        made.head = bytearray(self.snapshots[name])
        made.snapshots = {name: bytes(self.snapshots[name])}
        made.removed = {info.name for info in made.store.list_snapshots()} - {name}
        made.inherited = set(made.removed)
        return made

    def step(self, offset: int, length: int) -> None:
        before = {info.name: info for info in self.store.list_snapshots()}
        try:
            super().step(offset, length)
        except (SnapshotInUseError, AssertionError):
            name = sorted(self.removed)[offset % len(self.removed)]
            assert before[name].pinned
            with pytest.raises(SnapshotInUseError, match=r"shared until|still shares"):
                self.store.coalesce_step(name, length)

    def pull(self, offset: int, length: int) -> None:
        step = self.store.begin_pull(length)
        if step is None:
            return
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(clone, "pwrite_all", self._disturbed(chain.pwrite_all))
            step.run()
        self._disturb()
        if self.store.finish_pull(step) or step.pull.switched:
            self.removed -= self.inherited
            self.inherited = set()
        self._disturb()

    def reopen(self, offset: int, length: int) -> None:
        super().reopen(offset, length)
        if (origin := self.store.origin) is not None:
            # a pull that had copied all and not taken its place yet is where it was: what lies below is there again
            self.inherited = set(map(snapshot_name, origin.below))
            self.removed |= self.inherited


KINDS = ["write"] * 4 + ["unmap", "read", "look", "snapshot", "snapshot", "revert", "remove", "step", "step", "reopen"]
changes = st.lists(st.tuples(st.sampled_from(KINDS), offsets, lengths), max_size=25)
more = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from([*KINDS, "pull", "pull", "clone"]), offsets, lengths), max_size=50
)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(changes, more, st.booleans(), st.sampled_from([0, 1, 1 << 30]))
def test_a_clone_and_its_source_never_see_each_other(
    first: list[tuple[str, int, int]], then: list[tuple[int, str, int, int]], always: bool, sync_every: int
) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as base, pytest.MonkeyPatch.context() as patch:
        small_chunks(patch, 8)
        patch.setattr(clone, "SYNC_EVERY", sync_every)
        patch.setattr(layout, "RESERVE_SIZE", 16)
        make(Path(base)).close()
        volumes = [Sharing(Path(base) / "r1")]
        try:
            for kind, offset, length in first:
                getattr(volumes[0], kind)(offset, min(length, SIZE - offset))
            volumes[0].snapshot(0, 0)
            volumes.append(volumes[0].clone(f"s{volumes[0].count}", Path(base) / "c1"))
            for which, kind, offset, length in then:
                volume = volumes[which % len(volumes)]
                if kind != "clone":
                    getattr(volume, kind)(offset, min(length, SIZE - offset))
                elif volume.snapshots and len(volumes) < 3:
                    names = sorted(volume.snapshots)
                    volumes.append(volume.clone(names[offset % len(names)], Path(base) / "c2"))
                for one in volumes if always else ():
                    one.check()
            for volume in volumes:
                volume.check()
                volume.store.pull()
                volume.removed -= volume.inherited
                volume.inherited = set()
            for volume in volumes:
                volume.check()
                assert not any(info.pinned for info in volume.store.list_snapshots())
                volume.reopen(0, 0)
                volume.check()
                assert all(path.stat().st_nlink == 1 for path in volume.directory.iterdir())
        finally:
            for volume in volumes:
                volume.store.close()


def put(store: Store, *blocks: int, fill: str) -> None:
    for block in blocks:
        store.write(block * BLOCK, fill.encode() * BLOCK)


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(layout, "RESERVE_SIZE", 16)
    # inode numbers are not used twice there
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


def build(base: Path) -> Store:
    """a <- b <- c, each hiding some of what lies below, and a clone of c with a head and a snapshot of its own."""
    create_replica(base / "r1", volume="v", uuid="u", replica="r1", size=12 * BLOCK)
    store = Store.open(base / "r1")
    for name, blocks in (("a", (0, 1, 2, 5)), ("b", (1, 2, 6)), ("c", (2, 8, 9))):
        put(store, *blocks, fill=name)
        store.snapshot(name, created=WHEN)
    put(store, 0, 11, fill="h")
    return store


@pytest.mark.parametrize("budget", [BLOCK, 3 * BLOCK, 1 << 20])
@pytest.mark.parametrize("sync_every", [1, 3 * BLOCK, 1 << 30])
def test_power_cut_anywhere_in_a_pull_changes_nothing(
    base: Path, monkeypatch: pytest.MonkeyPatch, budget: int, sync_every: int
) -> None:
    small_chunks(monkeypatch, 2)
    monkeypatch.setattr(clone, "SYNC_EVERY", sync_every)
    build(base).close()
    store = link(base, "c")
    put(store, 3, 8, fill="x")
    store.snapshot("own", created=WHEN)
    put(store, 2, 4, fill="y")
    store.sync()

    def contents(store: Store) -> list[bytes]:
        return [store.read(0, 12 * BLOCK), *(store.read_snapshot(name, 0, 12 * BLOCK) for name in ("c", "own"))]

    def pull(store: Store) -> None:
        while (step := store.begin_pull(budget)) is not None:
            step.run()
            store.finish_pull(step)

    wanted = contents(store)
    assert [wanted[0][block * BLOCK : block * BLOCK + 1] for block in range(12)] == [
        letter.encode() if letter != "." else b"\0" for letter in "abyxyab.xc.."
    ]
    with recording(base / "c1") as recorder:
        pull(store)
    assert contents(store) == wanted
    store.close()
    assert len(recorder.states) > 15
    for number, state in enumerate(recorder.states):
        crashed = base / f"crash{number}"
        materialise(state, crashed)
        store = Store.open(crashed)
        try:
            assert contents(store) == wanted
            pull(store)
            assert contents(store) == wanted
            assert [info.name for info in store.list_snapshots()] == ["c", "own"]
            names = {path.name for path in crashed.iterdir()}
            assert not names & {"origin.img", "origin.json"}
            assert {name for name in names if name.endswith(".img")} == {
                "volume-snap-c.img",
                "volume-snap-own.img",
                store.meta.head,
            }
        finally:
            store.close()
        shutil.rmtree(crashed)


def test_a_clone_has_these_files(base: Path) -> None:
    build(base).close()
    store = link(base, "b")
    found = {path.name: path for path in (base / "c1").iterdir()}
    assert found["origin.json"].read_bytes() == (
        b'{"format":1,"volume":"v","uuid":"u","snapshot":"b","image":"volume-snap-b.img",'
        b'"below":["volume-snap-a.img"],"cursor":0,"passed":0,"copied":0}\n'
    )
    metas = {name: json.loads(found[f"{name}.meta"].read_bytes()) for name in found if f"{name}.meta" in found}
    common = {"Created": WHEN, "UserCreated": False, "Labels": None}
    head = metas.pop("volume-head-000.img")
    assert head["Parent"] == "volume-snap-b.img"
    assert metas == {
        "volume-snap-b.img": {"Name": "volume-snap-b.img", "Parent": "volume-snap-a.img", "Removed": False} | common,
        "volume-snap-a.img": {"Name": "volume-snap-a.img", "Parent": "", "Removed": True} | common,
    }
    for image in metas:
        assert os.path.samefile(base / "r1" / image, base / "c1" / image)
    info = inspect_replica(base / "c1")
    assert (info.volume, info.uuid, info.replica, info.size) == ("w", "x", "r1", 12 * BLOCK)
    store.close()


def test_a_snapshot_that_a_clone_shares_stays_until_it_does_not(base: Path) -> None:
    source = build(base)
    copy = link(base, "b")
    before = copy.read(0, 12 * BLOCK)
    source.mark_removed("a")
    source.mark_removed("b")
    assert [info.pinned for info in source.list_snapshots()] == [True, True, False]
    for name in ("a", "b"):
        with pytest.raises(SnapshotInUseError, match="a clone still shares the data of snapshot"):
            source.coalesce(name)
        with pytest.raises(SnapshotInUseError, match=r"not marked as removed|until the clone is independent"):
            copy.coalesce(name)
    wanted = source.read(0, 12 * BLOCK)
    copy.pull()
    assert copy.read(0, 12 * BLOCK) == before
    source.coalesce("a")
    source.coalesce("b")
    assert source.read(0, 12 * BLOCK) == wanted
    assert copy.read(0, 12 * BLOCK) == before
    assert [info.name for info in copy.list_snapshots()] == ["b"]
    source.close()
    copy.close()


def test_a_base_that_is_removed_before_it_is_replaced_keeps_what_lies_below_it(base: Path) -> None:
    build(base).close()
    store = link(base, "c")
    wanted = store.read(0, 12 * BLOCK)
    step = store.begin_pull(1 << 20)
    assert step is not None
    step.run()
    store.finish_pull(step)
    assert step.pull.switched
    store.mark_removed("c")
    store.snapshot("own", created=WHEN)
    assert store.read_snapshot("own", 0, 12 * BLOCK) == wanted
    store.close()
    store = Store.open(base / "c1")
    assert store.read(0, 12 * BLOCK) == wanted
    store.pull()
    assert store.read(0, 12 * BLOCK) == wanted
    assert [info.removed for info in store.list_snapshots() if info.name == "c"] == [True]
    store.close()


@pytest.mark.parametrize("gone", ["r1", "c1"])
def test_either_may_be_deleted_first(base: Path, gone: str) -> None:
    source, copy = build(base), link(base, "c")
    stays = copy if gone == "r1" else source
    wanted = stays.read(0, 12 * BLOCK)
    (source if gone == "r1" else copy).close()
    shutil.rmtree(base / gone)
    stays.pull()
    if gone == "c1":
        stays.mark_removed("a")
        stays.coalesce("a")
    assert stays.read(0, 12 * BLOCK) == wanted
    stays.close()


def test_a_fold_that_is_under_way_finishes_after_the_clone_is_independent(base: Path) -> None:
    source = build(base)
    source.mark_removed("b")
    assert not source.coalesce_step("b", BLOCK)
    assert not source.coalesce_step("b", BLOCK)  # part of c is in b, and punched out of c
    copy = link(base, "c")
    wanted = source.read_snapshot("c", 0, 12 * BLOCK)
    with pytest.raises(SnapshotInUseError):
        source.coalesce("b")
    assert copy.read(0, 12 * BLOCK) == wanted
    copy.pull()
    source.coalesce("b")
    assert source.read_snapshot("c", 0, 12 * BLOCK) == copy.read(0, 12 * BLOCK) == wanted
    source.close()
    copy.close()


def test_clones_are_made_while_snapshots_are_folded(base: Path) -> None:
    """Whatever a clone meets, it reads like the snapshot."""
    create_replica(base / "r1", volume="v", uuid="u", replica="r1", size=64 * BLOCK)
    store = Store.open(base / "r1")
    rounds, contents = 12, {}
    for number in range(rounds * 2):
        put(store, *range(number % 7, 64, 3), fill=chr(ord("a") + number))
        store.snapshot(f"s{number:02d}")
        contents[f"s{number:02d}"] = store.read(0, 64 * BLOCK)
    ready, stop = threading.Event(), threading.Event()

    def fold() -> None:
        for name in list(contents)[: rounds * 2 - 1 : 2]:
            store.mark_removed(name)
            ready.set()
            while not stop.is_set():
                try:
                    if store.coalesce_step(name, BLOCK):
                        break
                except SnapshotInUseError:
                    continue

    folding = threading.Thread(target=fold)
    folding.start()
    try:
        assert ready.wait(10)
        for number, name in enumerate(list(contents)[1::2]):
            copy = link(base, name, f"c{number}")
            assert copy.read(0, 64 * BLOCK) == contents[name]
            copy.pull()
            assert copy.read(0, 64 * BLOCK) == contents[name]
            copy.close()
        folding.join(20)
        assert not folding.is_alive()
    finally:
        stop.set()
        folding.join()
        store.close()


def test_what_cannot_be_cloned_is_said(base: Path, tmp_path: Path) -> None:
    store = build(base)
    store.mark_removed("b")
    for name in ("z", "b", "../c", "", "a\0"):
        with pytest.raises(SnapshotNotFoundError):
            link(base, name)
    # half of a snapshot: its name is there, and volume.meta does not say so yet
    os.link(base / "r1" / store.meta.head, base / "r1" / "volume-snap-new.img")
    os.link(base / "r1" / f"{store.meta.head}.meta", base / "r1" / "volume-snap-new.img.meta")
    with pytest.raises(SnapshotNotFoundError):
        link(base, "new")
    with pytest.raises(StoreError, match="it is not on the file system of"):
        link_replica(base / "r1", "c", tmp_path / "c1", volume="w", uuid="x", replica="r1")
    assert not list(tmp_path.iterdir())
    assert [path.name for path in base.iterdir()] == ["r1"]
    store.close()


@pytest.mark.parametrize("call", ["link", "rename", "replace"])
def test_a_clone_is_made_wholly_or_not_at_all(base: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    store = build(base)
    inner: Callable[..., None] = getattr(os, call)
    for number in range(1, 20):
        left = number

        def failing(*args: object, **kwargs: object) -> None:
            nonlocal left
            left -= 1
            if not left:
                raise OSError(errno.EIO, "the disk is gone")
            inner(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            try:
                link(base, "c").close()
                break
            except StoreError as error:
                assert "the disk is gone" in str(error)  # noqa: PT017
        assert [path.name for path in base.iterdir()] == ["r1"]
    assert number > 1
    assert (base / "c1").is_dir()
    store.close()


def test_a_full_disk_stops_a_pull_and_harms_nothing(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(base).close()
    store = link(base, "c")
    wanted = store.read(0, 12 * BLOCK)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("pwrite_all", "write_origin"):
        with monkeypatch.context() as patch:
            patch.setattr(clone, name, full)
            with pytest.raises(OSError, match="No space left"):
                store.pull()
        assert store.read(0, 12 * BLOCK) == wanted
    store.pull()
    assert store.read(0, 12 * BLOCK) == wanted
    assert store.origin is None
    store.close()


def test_a_revert_in_the_middle_of_the_last_step_keeps_what_is_read(base: Path) -> None:
    build(base).close()
    store = link(base, "c")
    wanted = store.read(0, 12 * BLOCK)
    while (step := store.begin_pull(1 << 20)) is not None:
        step.run()
        store.finish_pull(step)
        if step.pull.switched:
            break
    put(store, 0, fill="z")
    store.revert("c")
    assert store.read(0, 12 * BLOCK) == wanted
    store.pull()
    assert store.read(0, 12 * BLOCK) == wanted
    assert [info.name for info in store.list_snapshots()] == ["c"]
    store.close()


@pytest.mark.system
def test_where_blocks_can_be_shared_nothing_is_copied(tmp_path: Path) -> None:
    if os.geteuid() != 0 or shutil.which("mkfs.xfs") is None:
        pytest.skip("needs root and mkfs.xfs")
    image, place = tmp_path / "xfs.img", tmp_path / "xfs"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(320 << 20)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(place)], check=True)
    try:
        create_replica(place / "r1", volume="v", uuid="u", replica="r1", size=64 << 20)
        source = Store.open(place / "r1")
        source.write(0, b"a" * (8 << 20))
        source.snapshot("a")
        source.write(4 << 20, b"b" * (8 << 20))
        source.snapshot("b")
        copy = link(place, "b")
        free = os.statvfs(place).f_bfree
        while (step := copy.begin_pull(1 << 20)) is not None:
            step.run()
            copy.finish_pull(step)
        assert (step is None, copy.origin) == (True, None)
        assert (free - os.statvfs(place).f_bfree) * os.statvfs(place).f_frsize < 1 << 20
        for name in ("a", "b"):
            source.mark_removed(name)
        source.write(0, b"c" * (16 << 20))
        source.snapshot("c")
        source.coalesce("a")
        source.coalesce("b")
        assert copy.read(0, 12 << 20) == b"a" * (4 << 20) + b"b" * (8 << 20)
        source.close()
        copy.close()
    finally:
        subprocess.run(["umount", str(place)], check=True)
