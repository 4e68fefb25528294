"""Which flushes wait for which writes, when writes complete in any order.

An *era* is the writes that were submitted between two flushes. A flush waits until its era and all before it are
empty, and never for a write that came after it.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Era(Generic[T]):
    __slots__ = ("count", "waiting")

    def __init__(self) -> None:
        self.count = 0
        self.waiting: list[T] = []


class Barrier(Generic[T]):
    """`T` is whatever the driver parks. A write does `era = barrier.current; era.count += 1`, later `done(era)`."""

    def __init__(self) -> None:
        self.current: Era[T] = Era()
        self._eras: deque[Era[T]] = deque([self.current])

    def park(self, item: T) -> bool:
        """`item` waits for all writes that are under way; False when there are none."""
        if self.current.count:
            self.current.waiting.append(item)
            self.current = Era()
            self._eras.append(self.current)
            return True
        if len(self._eras) == 1:
            return False
        self._eras[-2].waiting.append(item)
        return True

    def done(self, era: Era[T]) -> list[T]:
        """A write of this era has completed; returns what need not wait any more, in order."""
        era.count -= 1
        released: list[T] = []
        while len(self._eras) > 1 and not self._eras[0].count:
            released += self._eras.popleft().waiting
        return released

    @property
    def idle(self) -> bool:
        return len(self._eras) == 1 and not self.current.count

    def discard(self) -> list[T]:
        """Forget everything parked, and return it."""
        dropped: list[T] = []
        for era in self._eras:
            dropped += era.waiting
            era.waiting = []
        return dropped
