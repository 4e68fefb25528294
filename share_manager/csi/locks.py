"""One operation on a thing at a time: a second one is told so, it does not wait (specification, "Concurrency")."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

from share_manager.csi.errors import AbortedError


class Locks:
    """Things are volumes, or places of them. A volume is held alone, or by any number of operations on different
    places of it."""

    def __init__(self) -> None:
        self._alone: set[str] = set()
        self._places: Counter[str] = Counter()
        self._held: set[tuple[str, str]] = set()

    @contextlib.contextmanager
    def alone(self, volume: str) -> Iterator[None]:
        """Raises AbortedError."""
        if volume in self._alone or self._places[volume]:
            raise AbortedError(f"another operation on volume {volume} is under way")
        self._alone.add(volume)
        try:
            yield
        finally:
            self._alone.discard(volume)

    @contextlib.contextmanager
    def place(self, volume: str, place: str) -> Iterator[None]:
        """Raises AbortedError."""
        if volume in self._alone or (volume, place) in self._held:
            raise AbortedError(f"another operation on volume {volume} is under way")
        self._held.add((volume, place))
        self._places[volume] += 1
        try:
            yield
        finally:
            self._held.discard((volume, place))
            self._places[volume] -= 1
            if not self._places[volume]:
                del self._places[volume]
