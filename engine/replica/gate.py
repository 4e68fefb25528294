"""The rule of the intent map: a write touches the head only after its regions' bits are on disk, in every map.

`Gate` holds back the writes that have to wait; one sync of the maps lets all through that waited when it began. It
does no waiting itself: its driver calls `begin`, runs the sync in a thread, and calls `finish`.
"""

from __future__ import annotations

from typing import Generic, TypeVar

from engine.store import RegionMaps
from engine.store.maps import MapSync

T = TypeVar("T")

# A sequential writer enters a new region every MiB. It gets the bits of the next ones with the first's sync.
AHEAD = 16


class Gate(Generic[T]):
    """`T` is whatever the driver parks, in the order in which it gets it back."""

    def __init__(self, maps: RegionMaps) -> None:
        self._maps = maps
        self._waiting: list[T] = []
        self._running: list[T] | None = None

    def park(self, item: T, offset: int, length: int) -> None:
        """`maps.touch` said no for this range: `item` waits for the next sync."""
        missing = self._maps.missing(offset, length)
        self._maps.mark(missing)
        if missing and self._maps.regions.follows(missing[0]):
            self._maps.mark(range(missing[-1] + 1, min(missing[-1] + AHEAD, self._maps.count)))
        self._waiting.append(item)

    def barrier(self, item: T) -> bool:
        """Park `item` behind all writes that are parked now; False when there are none."""
        if not self._waiting and self._running is None:
            return False
        self._waiting.append(item)
        return True

    @property
    def waiting(self) -> bool:
        return bool(self._waiting)

    @property
    def idle(self) -> bool:
        return not self._waiting and self._running is None

    def begin(self) -> MapSync:
        """Raises OSError."""
        sync = self._maps.begin()
        self._running, self._waiting = self._waiting, []
        return sync

    def finish(self, sync: MapSync) -> list[T]:
        """`sync.run` succeeded: what may be applied now."""
        self._maps.finish(sync)
        done, self._running = self._running or [], None
        return done

    def discard(self) -> list[T]:
        """Forget everything parked (their bits stay set), and return it."""
        dropped = (self._running or []) + self._waiting
        self._waiting = []
        if self._running is not None:
            self._running = []
        return dropped
