"""Which write is followed by a flush: what a journal does, it does over and over in the same way.

A journal's commit is a write, a flush, a write, a flush, each begun when the one before has been answered. Who knows
that a flush will come can have it done together with the write before it.
"""

from __future__ import annotations

from mypy_extensions import mypyc_attr

_HISTORY = 0xFFFF  # four operations, four bits each
_FLUSH = 0
_LARGEST = 64 << 10
_SURE, _MOST = 2, 3


def _code(length: int) -> int:
    """1 to 6, by size: journals write one block, some, or many."""
    return min((length - 1 >> 12).bit_length() + 1, 6)


@mypyc_attr(allow_interpreted_subclasses=True)
class Foresight:
    """Learns from a sequence of writes and flushes. One wrong guess among right ones does not change its mind."""

    def __init__(self) -> None:
        self._history = 0
        self._seen = bytearray(_HISTORY + 1)
        self._open = False

    def write(self, length: int) -> bool:
        """A write of `length` bytes begins: whether a flush is what comes next."""
        if self._open and self._seen[self._history]:
            self._seen[self._history] -= 1
        self._history = (self._history << 4 | _code(length)) & _HISTORY
        self._open = True
        return length <= _LARGEST and self._seen[self._history] >= _SURE

    def flush(self) -> None:
        if self._open:
            self._seen[self._history] = min(self._seen[self._history] + 1, _MOST)
        self._history = (self._history << 4 | _FLUSH) & _HISTORY
        self._open = False
