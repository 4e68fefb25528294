from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import StoreError
from engine.store import Store, create_replica, layout
from engine.store.chain import extents
from engine.store.layout import REBUILD, SNAPSHOT_IMAGE
from engine.store.rebuild import LayerState, RebuildState, read_extents, read_rebuild, write_extents
from tests.engine.store import test_clone
from tests.engine.store.powercut import materialise, recording
from tests.engine.store.test_snapshot_crashes import SIZE, build, contents, put

BLOCK = 4096
STEP = 2 * BLOCK
WHEN = "2024-05-06T07:08:09Z"


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(layout, "RESERVE_SIZE", 16)
    # inode numbers are not used twice there
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


def begin(source: Store, target: Store) -> RebuildState:
    target.set_marks(rebuilding=True)
    change = target.begin_rebuild(source.list_snapshots())
    change.run()
    target.finish_rebuild(change)
    change.release()
    return change.state


def fill(source: Store, target: Store, steps: int = 1 << 30) -> None:
    """At most so many pieces, each noted, from where it was; the head last."""
    state = target.rebuild
    assert state is not None
    for number, layer in enumerate(state.layers):
        while layer.filled < layer.size and steps:
            found, data, length = source.read_layer(layer.name, layer.filled, STEP)
            target.write_layer(layer.name, layer.filled, length, found, data)
            target.changed(layer.filled, length)
            layer = msgspec.structs.replace(layer, filled=layer.filled + length)
            layers = (*state.layers[:number], layer, *state.layers[number + 1 :])
            state = msgspec.structs.replace(state, layers=layers)
            target.sync_filled()
            target.save_rebuild(state)
            steps -= 1
    while state.head < SIZE and steps:
        found, data, _ = source.read_layer("", state.head, STEP)
        target.write_head(state.head, STEP, found, data)
        target.changed(state.head, STEP)
        state = msgspec.structs.replace(state, head=state.head + STEP)
        target.sync_filled()
        target.save_rebuild(state)
        steps -= 1


def image(store: Store, name: str) -> list[tuple[int, bytes]]:
    """What a snapshot's image holds itself, or with an empty name the head."""
    found, data, _ = store.read_layer(name, 0, SIZE)
    pieces, at = [], 0
    for start, length in found:
        pieces.append((start, bytes(data[at : at + length])))
        at += length
    return pieces


def assert_same(source: Store, target: Store) -> None:
    ours = [msgspec.structs.replace(info, allocated=0) for info in target.list_snapshots()]
    assert ours == [msgspec.structs.replace(info, allocated=0) for info in source.list_snapshots()]
    for name in ("", *(info.name for info in source.list_snapshots())):
        assert image(target, name) == image(source, name), name
    assert target.read(0, SIZE) == source.read(0, SIZE)
    assert contents(target) == contents(source)


def assert_promised(source: Store, directory: Path, target: Store) -> None:
    """What `rebuild.json` says is complete is so."""
    state = target.rebuild
    if state is None:
        return
    known = {info.name: info for info in source.list_snapshots()}
    for layer in state.layers:
        if layer.filled and layer.name in known and known[layer.name].created == layer.created:
            mine = [piece for piece in image(target, layer.name) if piece[0] < layer.filled]
            assert mine == [piece for piece in image(source, layer.name) if piece[0] < layer.filled]


def fresh(base: Path) -> Store:
    create_replica(base / "r2", volume="v", uuid="u", replica="r2", size=SIZE, rebuilding=True)
    return Store.open(base / "r2")


def other(base: Path) -> Store:
    """a is the same as the source's; b and its head went another way."""
    create_replica(base / "r2", volume="v", uuid="u", replica="r2", size=SIZE)
    store = Store.open(base / "r2")
    put(store, 0, 1, 2, 3, 4, fill="a")
    store.snapshot("a", created=WHEN)
    put(store, 5, 6, fill="x")
    store.snapshot("x", created=WHEN)
    put(store, 8, 9, fill="y")
    store.sync()
    return store


def test_every_layer_and_hole_arrives(base: Path) -> None:
    source, target = build(base / "r1"), fresh(base)
    assert target.rebuild == RebuildState()
    state = begin(source, target)
    assert [layer.filled for layer in state.layers] == [0, 0, 0, 0]
    # a client's writes come in meanwhile, and are overwritten with what the source has
    target.write(5, b"client")
    target.unmap(3 * BLOCK, BLOCK)
    fill(source, target)
    assert_same(source, target)
    target.set_marks(rebuilding=False)
    assert not (base / "r2" / REBUILD).exists()
    target.close()
    target = Store.open(base / "r2")
    assert_same(source, target)
    target.close()
    source.close()


@pytest.mark.parametrize("done", [0, 1, 3, 9, 14])
def test_an_interrupted_rebuild_goes_on_where_it_was(base: Path, done: int) -> None:
    source, target = build(base / "r1"), fresh(base)
    begin(source, target)
    fill(source, target, done)
    before = target.rebuild
    target.close()
    target = Store.open(base / "r2")
    assert target.rebuild == before
    assert begin(source, target) == before
    fill(source, target)
    assert_same(source, target)
    target.close()
    source.close()


def test_what_is_the_same_stays_and_the_rest_is_dropped(base: Path) -> None:
    source, target = build(base / "r1"), other(base)
    state = begin(source, target)
    assert {layer.name: layer.filled == layer.size for layer in state.layers} == {
        "a": True, "b": False, "c": False, "d": False,
    }  # fmt: skip
    assert state.head == 0
    assert not list((base / "r2").glob("*snap-x*"))
    fill(source, target)
    assert_same(source, target)
    target.close()
    source.close()


def test_merging_on_the_source_lets_go_of_what_it_changes(base: Path) -> None:
    source, target = build(base / "r1"), fresh(base)
    source.mark_removed("d")
    source.coalesce("d")
    begin(source, target)
    fill(source, target, 12)
    source.mark_removed("b")
    assert not source.coalesce_step("b", BLOCK)
    state = begin(source, target)
    assert {layer.name: layer.filled > 0 for layer in state.layers} == {"a": True, "b": False, "c": False}
    fill(source, target)
    assert_same(source, target)
    source.coalesce("b")
    begin(source, target)
    fill(source, target)
    assert_same(source, target)
    target.close()
    source.close()


@pytest.mark.parametrize("kind", ["fresh", "other", "interrupted"])
def test_power_may_fail_at_any_point_of_the_beginning(base: Path, kind: str) -> None:
    source = build(base / "r1")
    target = other(base) if kind == "other" else fresh(base)
    if kind == "interrupted":
        begin(source, target)
        fill(source, target, 8)
        source.mark_removed("b")
    target.set_marks(rebuilding=True)
    with recording(base / "r2") as recorder:
        begin(source, target)
    target.close()
    assert len(recorder.states) > 20
    for number, crash in enumerate(recorder.states):
        crashed = base / f"crash{number}"
        materialise(crash, crashed)
        store = Store.open(crashed)
        assert_promised(source, crashed, store)
        begin(source, store)
        assert_promised(source, crashed, store)
        fill(source, store)
        assert_same(source, store)
        store.close()
        names = {path.name for path in crashed.glob("*.img")}
        assert names == {path for path in names if SNAPSHOT_IMAGE.fullmatch(path)} | {store.meta.head}
        shutil.rmtree(crashed)
    source.close()


def test_a_replica_that_is_not_rebuilt_takes_no_images(base: Path) -> None:
    store = build(base / "r1")
    with pytest.raises(StoreError, match="not being rebuilt"):
        store.write_layer("a", 0, BLOCK, [], b"")
    with pytest.raises(StoreError, match="not marked as rebuilding"):
        store.begin_rebuild([])
    store.close()


def test_names_that_reach_outside_are_refused_and_others_times_are_not(base: Path) -> None:
    source, target = build(base / "r1"), fresh(base)
    target.set_marks(rebuilding=True)
    (first, *_) = source.list_snapshots()
    for name in ("a/../../b", "", "a\0b"):
        with pytest.raises(StoreError, match="cannot be the name"):
            target.begin_rebuild([msgspec.structs.replace(first, name=name)])
    target.begin_rebuild([msgspec.structs.replace(first, name="odd_name+1", created="2024-05-06T07:08:09+02:00")])
    target.close()
    source.close()


def test_golden_bytes_and_damage(base: Path) -> None:
    target = fresh(base)
    layer = LayerState(name="a", parent="", created=WHEN, size=8192, filled=4096, copied=4096)
    target.save_rebuild(RebuildState(layers=(layer,), parent="a", head=4096))
    assert (base / "r2" / REBUILD).read_bytes() == (
        b'{"format":1,"layers":[{"name":"a","parent":"","created":"2024-05-06T07:08:09Z","size":8192,"filled":4096,'
        b'"copied":4096}],"parent":"a","head":4096}\n'
    )
    target.close()
    # damaged, or of a newer release, it promises nothing
    for raw in (b"", b"{", b'{"format":2,"head":99}\n', b'{"format":1,"layers":7}'):
        (base / "r2" / REBUILD).write_bytes(raw)
        assert read_rebuild(base / "r2") == RebuildState()
    (base / "r2" / REBUILD).unlink()
    assert read_rebuild(base / "r2") is None


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, 64))
def test_a_range_of_a_file_becomes_exactly_what_another_has(seed: int, count: int) -> None:
    rng = Random(seed)
    size = 64 * BLOCK
    with tempfile.TemporaryFile(dir="/dev/shm") as one, tempfile.TemporaryFile(dir="/dev/shm") as two:
        for file in (one, two):
            file.truncate(size)
            for _ in range(rng.randrange(count)):
                file.seek(rng.randrange(64) * BLOCK)
                file.write(rng.randbytes(BLOCK))
            file.flush()
        offset = rng.randrange(64)
        length = rng.randint(1, 64 - offset) * BLOCK
        offset *= BLOCK
        two.seek(0)
        before = two.read()
        found, data, covered = read_extents(one.fileno(), offset, length)
        assert covered >= length
        assert covered == length or not found
        write_extents(two.fileno(), offset, length, found, data)
        one.seek(offset)
        two.seek(0)
        assert two.read() == before[:offset] + one.read(length) + before[offset + length :]

        def inside(fd: int) -> list[tuple[int, int]]:
            return list(extents(fd, offset, offset + length))

        assert inside(two.fileno()) == inside(one.fileno())


@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize("snapshot", ["a", "c"])
@pytest.mark.parametrize("steps", [0, 1, 1 << 30])
def test_a_replica_of_a_clone_is_rebuilt_without_touching_the_source(
    base: Path, monkeypatch: pytest.MonkeyPatch, independent: bool, snapshot: str, steps: int
) -> None:
    test_clone.small_chunks(monkeypatch, 2)
    source = test_clone.build(base)
    wanted = [source.read(0, SIZE), *(source.read_snapshot(name, 0, SIZE) for name in "abc")]
    peer, target = (test_clone.link(base, snapshot, name) for name in ("c1", "c2"))
    put(peer, 1, 7, fill="p")
    peer.snapshot("own", created=WHEN)
    put(peer, 2, fill="q")
    if independent:
        peer.pull()
    put(target, 4, 5, fill="s")
    for _ in range(min(steps, 1)):
        step = target.begin_pull(BLOCK)
        assert step is not None
        step.run()
        target.finish_pull(step)
    begin(peer, target)
    fill(peer, target, steps)
    if steps < 1 << 30:  # cut off, and begun again
        target.close()
        target = Store.open(base / "c2")
        begin(peer, target)
        fill(peer, target)
    target.set_marks(rebuilding=False)
    for _ in range(2):
        assert target.read(0, SIZE) == peer.read(0, SIZE)
        assert contents(target) == contents(peer)
        assert [source.read(0, SIZE), *(source.read_snapshot(name, 0, SIZE) for name in "abc")] == wanted
        target.pull()
    for store in (source, peer, target):
        store.close()
