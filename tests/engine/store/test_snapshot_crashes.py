from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.errors import SnapshotExistsError, SnapshotNotFoundError
from engine.store import Store, create_replica, layout
from engine.store.layout import SNAPSHOT_IMAGE
from tests.engine.store.powercut import materialise, recording

BLOCK = 4096
SIZE = 12 * BLOCK


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(layout, "RESERVE_SIZE", 16)
    # inode numbers are not used twice there
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


def put(store: Store, *blocks: int, fill: str) -> None:
    for block in blocks:
        store.write(block * BLOCK, fill.encode() * BLOCK)


def build(directory: Path) -> Store:
    """a <- b <- c <- head, and d aside on top of b. Every layer hides some of those below and some not."""
    create_replica(directory, volume="v", uuid="u", replica="r1", size=SIZE)
    store = Store.open(directory)
    for name, blocks in (("a", (0, 1, 2, 3, 4)), ("b", (1, 2, 6, 7)), ("d", (2, 8))):
        put(store, *blocks, fill=name)
        store.snapshot(name, created="2024-05-06T07:08:09Z")
    store.revert("b")
    put(store, 2, 3, 7, 9, 10, fill="c")
    store.unmap(4 * BLOCK, BLOCK)
    store.snapshot("c")
    put(store, 0, 6, 11, fill="h")
    store.sync()
    return store


def contents(store: Store) -> dict[str, bytes]:
    return {
        info.name: bytes(store.read_snapshot(info.name, 0, SIZE)) for info in store.list_snapshots() if not info.removed
    }


def replay(
    base: Path, prepare: Callable[[Store], None], change: Callable[[Store], None], heads: Callable[[Store], list[bytes]]
) -> int:
    """Cut the power at every point of `change`; `heads` says what the volume may read like. Returns the number."""
    store = build(base / "r1")
    prepare(store)
    before = contents(store)
    allowed = heads(store)
    with recording(base / "r1") as recorder:
        change(store)
    after = contents(store)
    store.close()
    for number, state in enumerate(recorder.states):
        crashed = base / f"crash{number}"
        materialise(state, crashed)
        store = Store.open(crashed)
        try:
            assert store.read(0, SIZE) in allowed
            found = contents(store)
            assert found in (before, after)
            listed = {f"volume-snap-{info.name}.img" for info in store.list_snapshots()}
            images = {path.name for path in crashed.glob("*.img")}
            assert images == listed | {store.meta.head}
            assert {path.name for path in crashed.glob("*.meta")} == {f"{image}.meta" for image in images} | {
                "volume.meta"
            }
            assert not list(crashed.glob(".*"))
            # nothing of the chain shares a file with the head
            head = store.read(0, SIZE)
            put(store, *range(12), fill="z")
            assert contents(store) == found
            store.write(0, head)
            change(store)
            assert store.read(0, SIZE) in allowed
            assert contents(store) == after
            assert not any(SNAPSHOT_IMAGE.fullmatch(name) for name in store.chain[:1])
        finally:
            store.close()
        shutil.rmtree(crashed)
    return len(recorder.states)


def nothing(store: Store) -> None:
    pass


def test_a_snapshot_is_there_or_not(base: Path) -> None:
    def change(store: Store) -> None:
        try:
            store.snapshot("new", created="2024-05-06T07:08:09Z")
        except SnapshotExistsError:
            assert store.read_snapshot("new", 0, SIZE) == store.read(0, SIZE)

    assert replay(base, nothing, change, lambda store: [bytes(store.read(0, SIZE))]) > 12


@pytest.mark.parametrize("name", ["c", "a", "d"])
def test_a_revert_has_happened_or_not(base: Path, name: str) -> None:
    def heads(store: Store) -> list[bytes]:
        return [bytes(store.read(0, SIZE)), bytes(store.read_snapshot(name, 0, SIZE))]

    assert replay(base, nothing, lambda store: store.revert(name), heads) > 8


@pytest.mark.parametrize("budget", [BLOCK, 2 * BLOCK, SIZE])
@pytest.mark.parametrize(
    "names",
    # the middle, the oldest, what only a leaf builds on, a leaf; and one after the other
    [("b",), ("a",), ("d",), ("b", "a")],
)
def test_a_coalesce_cannot_be_seen(base: Path, names: tuple[str, ...], budget: int) -> None:
    def prepare(store: Store) -> None:
        store.mark_removed("d")
        if names != ("d",):
            store.coalesce("d")
        for name in names:
            store.mark_removed(name)

    def change(store: Store) -> None:
        for name in names:
            try:
                while not store.coalesce_step(name, budget):
                    pass
            except SnapshotNotFoundError:
                continue

    assert replay(base, prepare, change, lambda store: [bytes(store.read(0, SIZE))]) > 2


def test_a_mark_is_there_or_not(base: Path) -> None:
    replay(base, nothing, lambda store: store.mark_removed("b"), lambda store: [bytes(store.read(0, SIZE))])
