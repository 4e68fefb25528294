"""Memory for large payloads: page-aligned, used again as soon as nobody looks at it."""

from __future__ import annotations

import mmap
from sys import getrefcount

# MiB, mostly, that stay at hand between bursts: as many as a frontend takes in at a time
KEEP = 8
# the list's, the loop's and getrefcount's own
_IDLE = 3


class BufferPool:
    """Nobody gives a buffer back: it is free when no view of it is left, which CPython's reference counts tell.

    So a payload may be queued on several sockets and be sliced, and whoever is last with it need not be known.
    """

    def __init__(self, size: int, keep: int = KEEP) -> None:
        """Buffers of `size` bytes, a multiple of the page size; no more than `keep` of them outlive their use."""
        self._size = size
        self._keep = keep
        self._buffers: list[mmap.mmap] = []

    def take(self) -> memoryview:
        """A whole buffer, with whatever was left in it. The one used last comes first: it is still in the caches."""
        for buffer in self._buffers:
            if getrefcount(buffer) == _IDLE:
                return memoryview(buffer)
        buffer = mmap.mmap(-1, self._size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if len(self._buffers) < self._keep:
            self._buffers.append(buffer)
        return memoryview(buffer)
