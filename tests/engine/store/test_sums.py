from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from crc32c import crc32c
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import CorruptBlockError, StoreError
from engine.store import Store, adopt_replica, create_replica, layout, sums
from engine.store.chain import extents
from engine.store.sums import BLOCKS, Sums, decode_record, encode_record, running_sums, sum_of_run
from tests.engine.store.powercut import materialise, recording

BLOCK = 4096
REGION = 1 << 20
SIZE = 4 * REGION


class Life:
    """A store used by the rules: intents before writes, flushes, and what is settled told."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.seq = 0
        self.clock = 0.0
        self.store = self._open()

    def _open(self) -> Store:
        self.closed = False
        store = Store.open(self.directory, rest=60)
        store.maps.regions.now = store.summing._since = self.clock
        return store

    def admit(self, offset: int, length: int) -> None:
        self.seq += 1
        maps = self.store.maps
        if not maps.touch(offset, length, self.seq):
            maps.mark(maps.missing(offset, length))
            maps.sync()

    def write(self, offset: int, data: bytes) -> None:
        self.admit(offset, len(data))
        self.store.write(offset, data)

    def unmap(self, offset: int, length: int) -> None:
        self.admit(offset, length)
        self.store.unmap(offset, length)

    def settle(self) -> None:
        self.store.sync()
        self.store.maps.settled(self.seq + 1, True)

    def wait(self, seconds: float) -> None:
        self.clock += seconds
        self.store.maps.regions.now = self.clock
        self.store.maps.expire()

    def rest(self) -> None:
        """Everything is flushed, left alone for long, and summed."""
        self.settle()
        self.wait(11)
        self.wait(61)
        self.store.make_sums()

    def close(self) -> None:
        if not self.closed:
            self.store.close()
            self.closed = True

    def reopen(self) -> None:
        self.close()
        self.store = self._open()
        self.store.maps.regions.inherit()
        self.seq = 0


@pytest.fixture
def base() -> Iterator[Path]:
    # inode numbers are not used twice there
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


def new_life(base: Path) -> Life:
    create_replica(base / "r1", volume="v", uuid="u", replica="r1", size=SIZE)
    return Life(base / "r1")


@pytest.fixture
def life(base: Path) -> Iterator[Life]:
    made = new_life(base)
    yield made
    made.close()


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def pattern(seed: int, length: int) -> bytes:
    return bytes((seed * 37 + at * 7 + (at >> 8)) & 255 for at in range(BLOCK)) * (length // BLOCK)


def test_golden_bytes(tmp_path: Path) -> None:
    (tmp_path / "x.img").write_bytes(b"a" * BLOCK + b"b" * BLOCK)
    found = Sums(tmp_path, "x.img")
    write = found.begin([0])
    fd = os.open(tmp_path / "x.img", os.O_RDONLY)
    write.run(fd)
    os.close(fd)
    found.finish(write)
    found.close()
    raw = (tmp_path / "x.img.sums").read_bytes()
    assert raw[:28].hex() == "534d424c4b53554d010000000c00000014000000000000006c701ff9"
    assert raw[28:4096] == bytes(4068)
    assert raw[4096:8192] == b"\1" + bytes(4095)
    record = raw[8192:]
    assert len(record) == 1028
    assert record[:8].hex() == "a24cc726e902fef2"
    assert record[:4] == crc32c(b"a" * BLOCK).to_bytes(4, "little")
    assert record[4:8] == crc32c(b"a" * BLOCK + b"b" * BLOCK).to_bytes(4, "little")
    assert record[-4:] == crc32c(bytes(8) + record[:-4]).to_bytes(4, "little")


@given(st.binary(min_size=1, max_size=64), st.data())
def test_the_sum_of_any_run_follows_from_the_record(seed: bytes, data: st.DataObject) -> None:
    content = (seed * (REGION // len(seed) + 1))[: data.draw(st.integers(1, REGION))]
    made = decode_record(7, encode_record(7, running_sums(content)))
    assert made is not None
    padded = content.ljust(REGION, b"\0")
    first = data.draw(st.integers(0, BLOCKS - 1))
    last = data.draw(st.integers(first + 1, BLOCKS))
    assert sum_of_run(made, first, last) == crc32c(padded[first * BLOCK : last * BLOCK])


def test_a_damaged_record_is_none(life: Life) -> None:
    life.write(0, pattern(1, REGION))
    life.rest()
    life.close()
    path = life.directory / "volume-head-000.img.sums"
    flip(path, 8192 + 40)
    life.reopen()
    assert life.store.read_checked(0, REGION)[0] == pattern(1, REGION)
    raw = bytearray(path.read_bytes())
    raw[8] = 9  # a version of the future
    life.close()
    path.write_bytes(raw)
    life.reopen()
    assert not path.exists()
    life.wait(61)
    life.store.make_sums()
    assert path.exists()


@pytest.mark.parametrize("length", [BLOCK, 3 * BLOCK, REGION])
def test_a_flip_is_found_with_its_offset(life: Life, length: int) -> None:
    for number in range(4):
        life.write(number * REGION, pattern(number, REGION))
    life.rest()
    flip(life.directory / "volume-head-000.img", REGION + 5 * BLOCK + 17)
    with pytest.raises(CorruptBlockError) as found:
        life.store.read_checked(REGION + 5 * BLOCK, length if length < REGION else 3 * BLOCK)
    assert found.value.offset == REGION + 5 * BLOCK
    assert found.value.image == "volume-head-000.img"
    # a read of parts of blocks, one across regions, and of those beside it
    with pytest.raises(CorruptBlockError) as found:
        life.store.read_checked(REGION + 5 * BLOCK + 4000, 200)
    assert found.value.offset == REGION + 5 * BLOCK
    with pytest.raises(CorruptBlockError):
        life.store.read_checked(REGION - 8 * BLOCK, 16 * BLOCK)
    with pytest.raises(CorruptBlockError):
        life.store.checked(REGION + 5 * BLOCK, life.store.read(REGION + 5 * BLOCK, BLOCK))
    for offset in (REGION + 4 * BLOCK, REGION + 6 * BLOCK):
        data, crc = life.store.read_checked(offset, BLOCK)
        assert data == pattern(1, BLOCK)
        assert crc == crc32c(data)
    # what is written anew is right again
    life.write(REGION + 5 * BLOCK, pattern(1, BLOCK))
    assert life.store.read_checked(REGION, REGION)[0] == pattern(1, REGION)
    life.rest()
    assert life.store.read_checked(REGION, REGION)[0] == pattern(1, REGION)


def test_only_what_is_at_rest_has_sums(life: Life) -> None:
    head = life.store._sums_of("volume-head-000.img")
    life.write(0, pattern(1, REGION))
    life.settle()
    life.wait(11)
    life.write(REGION, pattern(1, BLOCK))
    life.wait(59)
    life.store.make_sums()
    assert head.regions == 0
    life.wait(2)
    life.store.make_sums()
    assert [head.has(region) for region in range(4)] == [True, False, False, False]
    life.settle()
    life.wait(5)
    life.wait(61)
    life.store.make_sums()
    assert head.regions == 2
    # marked ahead of a sequential writer, and not written yet
    life.store.maps.mark([0])
    life.store.maps.sync()
    assert [head.has(region) for region in range(4)] == [False, True, False, False]


def test_a_write_while_a_record_is_made_leaves_the_region_without(life: Life) -> None:
    life.write(0, pattern(1, 2 * REGION))
    life.settle()
    life.wait(11)
    life.wait(61)
    step = life.store.begin_sums(8)
    assert step is not None
    life.write(BLOCK, pattern(2, BLOCK))
    step.run()
    life.write(2 * BLOCK, pattern(3, BLOCK))
    life.store.finish_sums(step)
    head = life.store._sums_of("volume-head-000.img")
    assert [head.has(region) for region in range(3)] == [False, True, False]
    assert life.store.read_checked(0, 2 * BLOCK)[0] == pattern(1, BLOCK) + pattern(2, BLOCK)


def test_sums_go_with_the_head_into_a_snapshot_which_then_gets_all(life: Life) -> None:
    life.write(0, pattern(1, REGION))
    life.rest()
    life.write(REGION, pattern(2, REGION))
    life.settle()
    life.store.snapshot("s")
    life.write(0, pattern(3, BLOCK))
    image = "volume-snap-s.img"
    assert life.store._sums_of(image).has(0)
    assert not life.store._sums_of(image).has(1)
    assert not list(life.directory.glob("volume-head*.sums"))
    life.reopen()
    assert life.store._sums_of(image).has(0)
    life.store.make_sums()
    assert [life.store._sums_of(image).has(region) for region in range(3)] == [True, True, False]
    flip(life.directory / image, REGION + 7)
    flip(life.directory / image, 7)  # hidden by the head
    with pytest.raises(CorruptBlockError) as found:
        life.store.read_checked(REGION, BLOCK)
    assert found.value.image == image
    assert life.store.read_checked(0, BLOCK)[0] == pattern(3, BLOCK)
    with pytest.raises(CorruptBlockError):
        life.store.read_snapshot("s", 0, BLOCK)
    assert life.store.read_snapshot("s", BLOCK, BLOCK) == pattern(1, BLOCK)


def test_another_snapshot_of_that_name_gets_no_old_sums(life: Life) -> None:
    life.write(0, pattern(1, REGION))
    life.store.snapshot("a")
    life.store.snapshot("b")
    life.store.make_sums()
    life.store.mark_removed("a")
    sums_of_a = (life.directory / "volume-snap-a.img.sums").read_bytes()
    life.store.coalesce("a")
    assert not list(life.directory.glob("*.sums"))
    # what a kill in the middle of a deletion might leave
    life.close()
    (life.directory / "volume-snap-a.img.sums").write_bytes(sums_of_a)
    life.reopen()
    assert not list(life.directory.glob("*.sums"))


def test_adoption_trusts_no_old_sums(life: Life) -> None:
    life.write(0, pattern(1, REGION))
    life.rest()
    life.close()
    (life.directory / "share-manager.json").unlink()
    with open(life.directory / "volume-head-000.img", "r+b") as image:
        image.write(pattern(9, BLOCK))
    adopt_replica(life.directory, volume="v", uuid="u", replica="r1")
    life.reopen()
    assert life.store.read_checked(0, BLOCK)[0] == pattern(9, BLOCK)


def test_memory_is_bounded(life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "MAX_RECORDS", 2)
    life.write(0, pattern(1, REGION))
    for region in range(1, 4):
        life.write(region * REGION, pattern(region, REGION))
    life.rest()
    head = life.store._sums_of("volume-head-000.img")
    for region in range(4):
        life.store.read_checked(region * REGION, BLOCK)
        assert len(head._records) <= 2


def test_a_merge_is_read_without_sums_until_it_is_done(life: Life) -> None:
    life.write(0, pattern(1, REGION))
    life.store.snapshot("a")
    life.write(0, pattern(2, 40 * BLOCK))
    life.store.snapshot("b")
    life.store.snapshot("c")
    life.store.make_sums()
    assert life.store.read_snapshot("b", 0, BLOCK) == pattern(2, BLOCK)
    life.store.mark_removed("a")
    expected = life.store.read(0, SIZE)
    while not life.store.coalesce_step("a", 8 * BLOCK):
        life.store.make_sums()
        assert life.store.read_checked(0, SIZE)[0] == expected
        assert life.store.read_snapshot("b", 0, SIZE) == expected
    assert life.store._sums_of("volume-snap-b.img").regions == 0
    life.store.make_sums()
    assert life.store._sums_of("volume-snap-b.img").regions == 1
    assert life.store.read_checked(0, SIZE)[0] == expected


def test_a_bit_is_written_when_its_record_is_on_disk(life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of sums after a power cut: any of the writes since its last sync may be there, and any may not."""
    path = life.directory / "volume-head-000.img.sums"
    image = life.directory / "volume-head-000.img"
    life.write(0, pattern(1, 2 * REGION))
    life.rest()
    durable = bytearray(path.read_bytes())
    unsynced: list[tuple[bytes, int]] = []
    pwrite, fdatasync = os.pwrite, os.fdatasync
    checked = 0

    def ours(fd: int) -> bool:
        return os.fstat(fd).st_ino == path.stat().st_ino

    def apply(to: bytearray, what: list[tuple[bytes, int]]) -> None:
        for data, at in what:
            to.extend(bytes(max(0, at + len(data) - len(to))))
            to[at : at + len(data)] = data

    def check() -> None:
        nonlocal checked
        content = image.read_bytes()
        for chosen in range(1 << len(unsynced)):
            raw = durable[:]
            apply(raw, [write for index, write in enumerate(unsynced) if chosen >> index & 1])
            for region in range(4):
                at = 8192 + region * 1028
                if raw[4096] >> region & 1 and (made := decode_record(region, bytes(raw[at : at + 1028]))):
                    assert made == running_sums(content[region * REGION : (region + 1) * REGION])
                    checked += 1

    def traced_pwrite(fd: int, data: bytes, offset: int) -> int:
        done = pwrite(fd, data, offset)
        if ours(fd):
            unsynced.append((bytes(data), offset))
        check()
        return done

    def traced_sync(fd: int) -> None:
        fdatasync(fd)
        if ours(fd):
            apply(durable, unsynced)
            unsynced.clear()
        check()

    monkeypatch.setattr(os, "pwrite", traced_pwrite)
    monkeypatch.setattr(os, "fdatasync", traced_sync)
    for number in (5, 6):
        life.write(REGION + BLOCK, pattern(number, BLOCK))
        life.write(REGION // 2, pattern(number + 2, BLOCK))
        life.rest()
    life.write(0, pattern(9, BLOCK))
    assert checked > 20


actions = st.one_of(
    st.tuples(st.just("write"), st.integers(0, SIZE // 512 - 1), st.integers(1, 600), st.integers(1, 250)),
    st.tuples(st.just("unmap"), st.integers(0, SIZE // 512 - 1), st.integers(1, 2048)),
    st.tuples(st.just("settle")),
    st.tuples(st.just("wait"), st.sampled_from([5.0, 11.0, 61.0])),
    st.tuples(st.just("sum"), st.integers(1, 3)),
    st.tuples(st.just("begin"), st.integers(1, 3)),
    st.tuples(st.just("finish")),
    st.tuples(st.just("rest")),
    st.tuples(st.just("snapshot")),
    st.tuples(st.just("revert"), st.integers(0, 9)),
    st.tuples(st.just("coalesce"), st.integers(0, 9), st.integers(1, 3)),
    st.tuples(st.just("reopen")),
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(actions, max_size=30), st.data())
def test_sums_agree_with_a_model_of_any_life(steps: list[tuple[object, ...]], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        life = new_life(Path(directory))
        try:
            _live(life, steps)
            _find_a_flip(life, data)
        finally:
            life.close()


def _live(life: Life, steps: list[tuple[object, ...]]) -> None:
    model = bytearray(SIZE)
    saved: dict[str, bytes] = {}
    made = 0
    open_step = None
    for name, *values in steps:
        numbers = [value for value in values if isinstance(value, int)]
        store = life.store
        if name in ("snapshot", "revert", "coalesce", "reopen", "rest", "sum") and open_step is not None:
            # one change of the chain at a time; a killed process never finishes
            if name != "reopen":
                store.finish_sums(open_step)
            open_step = None
        if name == "write":
            offset = numbers[0] * 512
            content = bytes([numbers[2]]) * min(numbers[1] * 512, SIZE - offset)
            life.write(offset, content)
            model[offset : offset + len(content)] = content
        elif name == "unmap":
            offset = numbers[0] * 512
            length = min(numbers[1] * 512, SIZE - offset)
            life.unmap(offset, length)
            model[offset : offset + length] = bytes(length)
        elif name == "settle":
            life.settle()
        elif name == "wait":
            assert isinstance(values[0], float)
            life.wait(values[0])
        elif name == "sum":
            store.make_sums()
        elif name == "begin" and open_step is None:
            open_step = store.begin_sums(numbers[0])
            if open_step is not None:
                open_step.run()
        elif name == "finish" and open_step is not None:
            store.finish_sums(open_step)
            open_step = None
        elif name == "rest":
            life.rest()
        elif name == "snapshot":
            made += 1
            store.snapshot(f"s{made}")
            saved[f"s{made}"] = bytes(model)
        elif name == "revert" and saved:
            to = sorted(saved)[numbers[0] % len(saved)]
            store.revert(to)
            model = bytearray(saved[to])
        elif name == "coalesce" and saved:
            gone = sorted(saved)[numbers[0] % len(saved)]
            try:
                store.mark_removed(gone)
                for _ in range(numbers[1]):
                    if store.coalesce_step(gone, 64 << 10):
                        break
            except StoreError:
                pass
            del saved[gone]
        elif name == "reopen":
            life.reopen()
        assert life.store.read_checked(0, SIZE)[0] == model
        for snapshot, content in saved.items():
            assert life.store.read_snapshot(snapshot, 0, SIZE) == content
    if open_step is not None:
        life.store.finish_sums(open_step)


def _find_a_flip(life: Life, data: st.DataObject) -> None:
    """Whatever block has a checksum: a flip in it cannot be read."""
    life.rest()
    store = life.store
    offset = data.draw(st.integers(0, SIZE // BLOCK - 1)) * BLOCK
    for image, fd in zip(reversed(store.chain), store._files, strict=True):
        found = store._sums_of(image)
        if found.has(offset >> 20) and any(start <= offset < end for start, end in extents(fd, 0, SIZE)):
            flip(life.directory / image, offset + data.draw(st.integers(0, BLOCK - 1)))
            block = os.pread(fd, BLOCK, offset)
            assert found.check(offset, block, crc32c(block)) == offset


def rewrite(life: Life) -> None:
    life.write(3 * BLOCK, pattern(5, BLOCK))
    life.store.sync()
    life.write(REGION + BLOCK, pattern(6, 2 * BLOCK))


def again_at_rest(life: Life) -> None:
    life.write(0, pattern(7, BLOCK))
    life.rest()
    life.write(BLOCK, pattern(8, BLOCK))
    life.rest()
    life.write(0, pattern(9, BLOCK))


def frozen(life: Life) -> None:
    life.store.snapshot("s")
    life.write(BLOCK, pattern(4, BLOCK))
    life.store.make_sums()
    life.rest()


def merged(life: Life) -> None:
    life.store.snapshot("s")
    life.write(BLOCK, pattern(4, BLOCK))
    life.store.snapshot("t")
    life.rest()
    life.store.snapshot("u")
    life.store.mark_removed("s")
    life.store.coalesce("s")
    life.rest()


def reverted(life: Life) -> None:
    life.store.snapshot("s")
    life.write(BLOCK, pattern(4, BLOCK))
    life.rest()
    life.store.revert("s")
    life.write(BLOCK, pattern(5, BLOCK))
    life.rest()


@pytest.mark.parametrize("change", [rewrite, again_at_rest, frozen, merged, reverted])
def test_power_cut_at_any_point_leaves_no_sums_of_old_data(
    base: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Life], None]
) -> None:
    monkeypatch.setattr(layout, "RESERVE_SIZE", 16)
    life = new_life(base)
    life.write(0, pattern(1, 4 * BLOCK))
    life.write(REGION, pattern(2, 4 * BLOCK))
    life.rest()
    with recording(base / "r1") as recorder:
        change(life)
    life.close()
    assert len(recorder.states) > 4
    for number, state in enumerate(recorder.states):
        crashed = base / f"crash{number}"
        materialise(state, crashed)
        found = Life(crashed)
        try:
            # an interrupted write may have left anything; what it left must not contradict the sums
            for offset in range(0, SIZE, REGION):
                found.store.read_checked(offset, REGION)
            # what this life does with them, and a kill of it, neither
            found.write(2 * BLOCK, pattern(3, BLOCK))
            found.settle()
            found.wait(11)
            found.reopen()
            for offset in range(0, SIZE, REGION):
                found.store.read_checked(offset, REGION)
            found.wait(61)
            found.store.make_sums()
            found.write(2 * BLOCK, pattern(4, BLOCK))
            found.reopen()
            for offset in range(0, SIZE, REGION):
                found.store.read_checked(offset, REGION)
            for info in found.store.list_snapshots():
                if not info.removed:
                    found.store.read_snapshot(info.name, 0, REGION)
        finally:
            found.close()
        shutil.rmtree(crashed)
