"""The intent rule under crashes at every point.

The worst a crash can do is assumed at every step: the head is on disk as it is, a bit that was set counts only since
an fdatasync of its map, and a bit that was cleared is gone at once.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.replica.gate import Gate
from engine.store import REGION_SIZE, create_replica, regions
from engine.store.maps import DATA_OFFSET, MapSync, RegionMaps, TrackSync, list_changes, set_bits

COUNT = 20
SIZE = COUNT * REGION_SIZE - 4096
NAMES = ("r1", "r2", "x..y")

Write = tuple[int, range]


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.base = Path(tempfile.mkdtemp(dir="/dev/shm"))
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(regions, "HIGH_WATER", 5)
        self.patch.setattr(regions, "LOW_WATER", 3)
        self.on_disk: dict[int, bytes] = {}
        for name in ("fsync", "fdatasync"):
            self.patch.setattr(os, name, self._remember(getattr(os, name)))

    def _remember(self, inner: Callable[[int], None]) -> Callable[[int], None]:
        def sync(fd: int) -> None:
            inner(fd)
            opened = Path(f"/proc/self/fd/{fd}")
            if not opened.is_dir() and os.fstat(fd).st_size < 1 << 20:
                self.on_disk[os.fstat(fd).st_ino] = opened.read_bytes()

        return sync

    def teardown(self) -> None:
        self.patch.undo()
        shutil.rmtree(self.base)

    @initialize()
    def create(self) -> None:
        create_replica(self.base / "r", volume="v", uuid="u", replica="r", size=SIZE)
        self.unsettled: list[Write] = []
        self.inherited: set[int] = set()
        self.must_track: dict[str, set[int]] = {}
        self.attach()

    def attach(self) -> None:
        self.maps = RegionMaps(self.base / "r", SIZE)
        self.gate: Gate[Write] = Gate(self.maps)
        self.parked: list[Write] = []
        self.sync: MapSync | None = None
        self.tracking: TrackSync | None = None
        self.wanted: tuple[str, ...] = ()
        self.seq = 0

    def applied(self, write: Write) -> None:
        self.unsettled.append(write)
        for tracked in self.must_track.values():
            tracked.update(write[1])

    # the replica's own steps

    @rule(first=st.integers(0, COUNT - 1), count=st.integers(1, 3))
    def write(self, first: int, count: int) -> None:
        self.seq += 1
        touched = range(first, min(first + count, COUNT))
        offset, end = first * REGION_SIZE + 4096, min(touched.stop * REGION_SIZE, SIZE)
        write = (self.seq, touched)
        if self.maps.touch(offset, end - offset, self.seq):
            self.applied(write)
        else:
            self.gate.park(write, offset, end - offset)
            self.parked.append(write)

    @precondition(lambda self: self.sync is None)
    @rule()
    def begin(self) -> None:
        self.sync = self.gate.begin()

    @precondition(lambda self: self.sync is not None)
    @rule()
    def finish(self) -> None:
        assert self.sync is not None
        self.sync.run()
        done = self.gate.finish(self.sync)
        self.sync = None
        for write in done:
            self.parked.remove(write)
            self.applied(write)

    @rule(seconds=st.sampled_from([1.0, 11.0]))
    def pass_time(self, seconds: float) -> None:
        self.maps.regions.now += seconds
        self.maps.expire()

    # what an engine may say

    def bound(self) -> int:
        return min([self.seq + 1, *(seq for seq, _ in self.parked)])

    @rule(back=st.integers(0, 4), equalised=st.booleans())
    def settled(self, back: int, equalised: bool) -> None:
        bound = max(0, self.bound() - back)
        self.unsettled = [write for write in self.unsettled if write[0] >= bound]
        if equalised:
            self.inherited.clear()
        self.maps.settled(bound, equalised)

    @precondition(lambda self: self.tracking is None)
    @rule(names=st.sets(st.sampled_from(NAMES)))
    def begin_track(self, names: set[str]) -> None:
        self.tracking = self.maps.begin_track(names)
        self.wanted = tuple(names)
        for name in self.must_track.keys() - names:
            del self.must_track[name]
        self.owed = {name: self.must_set() for name in names - self.must_track.keys()}

    @precondition(lambda self: self.tracking is not None)
    @rule()
    def finish_track(self) -> None:
        assert self.tracking is not None
        self.tracking.run()
        self.maps.finish_track(self.tracking)
        self.tracking = None
        self.must_track |= self.owed
        assert self.maps.tracked == tuple(sorted(self.wanted))

    @rule()
    def reopened_by_a_new_engine(self) -> None:
        for write in self.gate.discard():
            self.parked.remove(write)
        self.inherited = self.must_set()
        self.unsettled = []
        self.maps.regions.inherit()
        self.seq = 0

    @precondition(lambda self: not self.parked and self.sync is None)
    @rule()
    def clean_close(self) -> None:
        self.unsettled = []
        self.maps.clear_settled_attachment()
        self.maps.sync()
        self.reopened_by_a_new_engine()

    @rule()
    def kill(self) -> None:
        tracked = set(self.must_track)
        self.maps.close()
        self.inherited = self.must_set()
        self.unsettled = []
        self.attach()
        assert tracked <= set(self.maps.tracked)
        # a track that was not acknowledged may or may not have happened
        for name in set(self.maps.tracked) - tracked:
            self.must_track.pop(name, None)

    # promises

    def must_set(self) -> set[int]:
        return self.inherited | {region for _, touched in self.unsettled for region in touched}

    def durable(self, name: str) -> set[int]:
        path = self.base / "r" / name
        then = set_bits(self.on_disk[path.stat().st_ino][DATA_OFFSET:])
        now = set_bits(path.read_bytes()[DATA_OFFSET:])
        return set(then) & set(now)

    @invariant()
    def every_unsettled_write_has_its_bits_on_disk(self) -> None:
        if hasattr(self, "maps"):
            assert self.must_set() <= self.durable("intent.map")
            files = list_changes(self.base / "r")
            for name, must in self.must_track.items():
                assert must <= self.durable(files[name])

    @invariant()
    def every_intent_is_in_every_tracked_map(self) -> None:
        if hasattr(self, "maps"):
            intent = set(set_bits(self.maps.bitmap("")))
            for name in self.maps.tracked:
                assert intent <= set(set_bits(self.maps.bitmap(name)))


TestIntentRule = Machine.TestCase
TestIntentRule.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
