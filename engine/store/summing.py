"""Which regions get checksums next: those of the head that are at rest, and all that a snapshot holds.

A region is at rest when its intent bit has been clear for a while: what was written there is flushed on every in-sync
replica and is not written now. The records are made a few regions at a time, in a thread, while no change of the chain
is under way.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator

from engine.store.chain import extents
from engine.store.regions import CLEAR, REGION_SHIFT, REGION_SIZE, Regions
from engine.store.sums import RecordWrite, Sums

# looked at in one go for one that needs sums
LOOK = 512
# entries of what was left lately; what does not fit is found by the next walk
MAX_LEFT = 65536


class SumStep:
    """Makes some records of one image: `run` in any thread, then `Summing.finish`, or `abandon` when it failed."""

    def __init__(self, sums: Sums, write: RecordWrite, fd: int) -> None:
        self.sums = sums
        self.write = write
        self._fd = fd

    @property
    def regions(self) -> int:
        return len(self.write.regions)

    def run(self) -> None:
        """Raises OSError."""
        self.write.run(self._fd)


class _Walk:
    """Regions of an image that hold data, from the first on."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.size = os.fstat(fd).st_size
        self.at = 0

    def take(self, limit: int) -> tuple[list[int], bool]:
        """Some of them, and whether that is all. Raises OSError."""
        found: list[int] = []
        for start, end in extents(self.fd, self.at, self.size):
            first, last = max(start, self.at) >> REGION_SHIFT, (end - 1) >> REGION_SHIFT
            for region in range(first, last + 1):
                if len(found) >= limit:
                    return found, False
                found.append(region)
                self.at = (region + 1) << REGION_SHIFT
        return found, True


class Summing:
    """Watches the region maps (`engine.store.maps.Watcher`); `head` is exchanged with every switch of the head.

    Times are seconds of the clock of `regions.now`.
    """

    def __init__(self, regions: Regions, head: Sums, rest: float) -> None:
        """`rest`: how long a region must have been left alone."""
        self.rest = rest
        self._regions = regions
        self._head = head
        self._left: dict[int, float] = {}  # in the order of time
        self._walks: dict[str, _Walk] = {}
        self._done: set[str] = set()
        self._since: float | None = None  # from the first look on

    # of the region maps

    def entered(self, regions: Iterable[int]) -> int:
        """Raises OSError."""
        wanted = list(regions)
        for region in wanted:
            self._left.pop(region, None)
        return self._head.forget(wanted)

    def left(self, regions: Iterable[int]) -> None:
        for region in regions:
            self._left[region] = self._regions.now
        if len(self._left) > MAX_LEFT:
            self._left.clear()
            self.again(self._head.image)

    # of the store

    def switched(self, head: Sums) -> None:
        """A new head; what was left belongs to the old one."""
        self.again(self._head.image)
        self._head = head
        self._left.clear()
        self._since = None

    def again(self, image: str) -> None:
        """Look through `image` anew."""
        self._walks.pop(image, None)
        self._done.discard(image)

    # the work

    def begin(self, budget: int, images: Callable[[], Iterator[tuple[Sums, int]]]) -> SumStep | None:
        """Records of at most `budget` regions, or None when there is nothing to do at present.

        `images` gives each image's sums and descriptor, the head first. Raises OSError.
        """
        now = self._regions.now
        if self._since is None:
            self._since = now
        for sums, fd in images():
            wanted: list[int] = []
            if sums is self._head:
                wanted = self._due(now, fd, budget)
                if not wanted and now - self._since < self.rest:
                    continue
            if not wanted and sums.image not in self._done:
                wanted = self._walked(sums, fd, budget)
            if wanted:
                return SumStep(sums, sums.begin(wanted), fd)
        return None

    def _due(self, now: float, fd: int, budget: int) -> list[int]:
        due: list[int] = []
        for region, when in self._left.items():
            if now - when < self.rest or len(due) >= budget:
                break
            due.append(region)
        for region in due:
            del self._left[region]
        return [
            region for region in due if self._settled(region) and not self._head.has(region) and _has_data(fd, region)
        ]

    def _settled(self, region: int) -> bool:
        return self._regions.state(region) == CLEAR

    def _walked(self, sums: Sums, fd: int, budget: int) -> list[int]:
        walk = self._walks.get(sums.image)
        if walk is None or walk.fd != fd:
            walk = self._walks[sums.image] = _Walk(fd)
        wanted: list[int] = []
        looked = 0
        while len(wanted) < budget and looked < LOOK:
            found, end = walk.take(1)
            looked += 1
            for region in found:
                fresh = sums is self._head and (not self._settled(region) or region in self._left)
                if not fresh and not sums.has(region):
                    wanted.append(region)
            if end:
                self._walks.pop(sums.image, None)
                self._done.add(sums.image)
                break
        return wanted

    def finish(self, step: SumStep) -> None:
        """`step.run` succeeded. Raises OSError."""
        step.sums.finish(step.write)

    def abandon(self, step: SumStep) -> None:
        """`step.run` failed: look again later."""
        step.sums.abandon(step.write)
        self.again(step.sums.image)


def _has_data(fd: int, region: int) -> bool:
    """Intent bits run ahead of a sequential writer."""
    start = region << REGION_SHIFT
    return any(True for _ in extents(fd, start, start + REGION_SIZE))
