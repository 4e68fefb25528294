"""Which regions of a replica may differ from its peers: bookkeeping of the intent map, without any file.

A region is `clear`, `pending` (its bit is set in memory, but not known to be on disk) or `durable`. Invariant: a
request may touch the head only while all its regions are durable, and a durable region is cleared only when every
write to it is settled, that is, flushed on every in-sync replica.

Two reasons keep a bit set, and both must be gone before it is cleared: a write of this attachment (`_last` has its
seq), and an earlier attachment that ended without a clean close (`_inherited`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

REGION_SHIFT: Final = 20
REGION_SIZE: Final = 1 << REGION_SHIFT

CLEAR: Final = 0
PENDING: Final = 1
DURABLE: Final = 2

# A workload that calls fsync after each write would otherwise pay one more fdatasync, of the map, for every write
# that comes back to a region.
IDLE_SECONDS = 10.0
HIGH_WATER = 4096
LOW_WATER = 3072


class Regions:
    def __init__(self, count: int, inherited: Iterable[int] = ()) -> None:
        self.count = count
        self._state = bytearray(count)
        self._inherited = set(inherited)
        for region in self._inherited:
            self._state[region] = DURABLE
        self._last: dict[int, tuple[int, float]] = {}  # ordered by the time of the last touch
        self._bound = 0
        self.now = 0.0
        # while the replica is rebuilt: the last request that made a region like the source's
        self.filling: dict[int, int] | None = None

    def grow(self, count: int) -> None:
        """There are `count` regions now; the new ones are clear."""
        self._state.extend(bytes(count - self.count))
        self.count = count

    def touch(self, first: int, last: int, seq: int) -> bool:
        """Note that write `seq` is about to touch regions `first..last`; True when it may do so at once."""
        stamp = (seq, self.now)
        touched, state = self._last, self._state
        durable = True
        for region in range(first, last + 1):
            before = touched.pop(region, stamp)
            touched[region] = stamp if before[0] <= seq else (before[0], self.now)
            if state[region] != DURABLE:
                durable = False
        return durable

    def state(self, region: int) -> int:
        """`CLEAR`, `PENDING` or `DURABLE`."""
        return self._state[region]

    def dirty_regions(self) -> list[int]:
        return [region for region in range(self.count) if self._state[region] != CLEAR]

    def missing(self, first: int, last: int) -> list[int]:
        """Regions among `first..last` whose bit is not known to be durable."""
        state = self._state
        return [region for region in range(first, last + 1) if state[region] != DURABLE]

    def mark(self, regions: Iterable[int]) -> list[int]:
        """Set the bits of `regions`; return those that were clear."""
        fresh = [region for region in regions if self._state[region] == CLEAR]
        for region in fresh:
            self._state[region] = PENDING
            self._last.setdefault(region, (0, self.now))
        return fresh

    def follows(self, region: int) -> bool:
        """Whether the region before was written by this attachment."""
        return region - 1 in self._last

    def confirm(self, regions: Iterable[int]) -> None:
        """The bits of `regions`, marked before, are on disk."""
        for region in regions:
            if self._state[region] == PENDING:
                self._state[region] = DURABLE

    def settled(self, seq: int, inherited: bool) -> list[int]:
        """All writes below `seq` are flushed everywhere; return the regions that are now clear."""
        self._bound = max(self._bound, seq)
        cleared: list[int] = []
        if inherited:
            for region in self._inherited - self._last.keys():
                if self._state[region] == DURABLE:
                    self._state[region] = CLEAR
                    cleared.append(region)
                else:  # its bit is on the way to the disk: clear it later
                    self._last[region] = (0, self.now)
            self._inherited.clear()
        return cleared + self.expire()

    def expire(self) -> list[int]:
        """Clear what is settled and has been idle for long, or is too much; return those regions."""
        excess = len(self._last) - LOW_WATER if len(self._last) > HIGH_WATER else 0
        idle = self.now - IDLE_SECONDS
        cleared = []
        for region, (seq, touched) in self._last.items():
            if touched > idle and excess <= 0:
                break
            if seq < self._bound and region not in self._inherited and self._state[region] == DURABLE:
                cleared.append(region)
                excess -= 1
        for region in cleared:
            del self._last[region]
            self._state[region] = CLEAR
        return cleared

    def filled(self, first: int, end: int, seq: int) -> None:
        """Request `seq` gave regions `first` to `end` - 1 the content that they have in sync, whatever was there."""
        if self.filling is not None:
            self.filling.update(dict.fromkeys(range(first, end), seq))

    def take_filled(self) -> dict[int, int]:
        taken, self.filling = self.filling or {}, None if self.filling is None else {}
        return taken

    def fill_synced(self, taken: dict[int, int]) -> list[int]:
        """What was filled is on disk; return the regions that are now clear: those without a later write."""
        cleared = []
        for region, seq in taken.items():
            if self._last.get(region, (0, 0.0))[0] <= seq and self._state[region] == DURABLE:
                self._last.pop(region, None)
                self._inherited.discard(region)
                self._state[region] = CLEAR
                cleared.append(region)
        return cleared

    def clear_settled_attachment(self) -> list[int]:
        """A clean close: everything this attachment wrote is flushed everywhere. Inherited bits stay."""
        cleared = [region for region in self._last if region not in self._inherited and self._state[region] == DURABLE]
        self._last.clear()
        for region in cleared:
            self._state[region] = CLEAR
        return cleared

    def inherit(self) -> None:
        """A new attachment begins, whose seq numbers say nothing of the bits that are set."""
        self._inherited = set(self.dirty_regions())
        self._last.clear()
        if self.filling is not None:
            self.filling = {}
        self._bound = 0

    @property
    def dirty(self) -> int:
        return self.count - self._state.count(CLEAR)
