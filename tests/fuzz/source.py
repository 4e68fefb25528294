"""Bytes that a fuzzer made, read as decisions: every input means something, and small changes of it change little."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

# in memory, because what is fuzzed syncs a lot
HOME = os.environ.get("FUZZ_HOME", "/dev/shm")

_T = TypeVar("_T")


class Source:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, count: int) -> bytes:
        """At most that many bytes."""
        found = self._data[self._at : self._at + count]
        self._at += len(found)
        return found

    def number(self, size: int = 1) -> int:
        """Of `size` bytes; zero when nothing is left."""
        return int.from_bytes(self.take(size), "little")

    def chance(self, of: int) -> bool:
        """True once in about `of` times; never when nothing is left."""
        return self.left > 0 and self.number() % of == 0

    def choice(self, options: Sequence[_T]) -> _T:
        return options[self.number() % len(options)]

    def noise(self) -> bytes:
        return self.take(self.number() % 64)

    def mutated(self, valid: bytes) -> bytes:
        """As it is, or with a few bytes changed, cut off, repeated or put in."""
        out = bytearray(valid)
        for _ in range(self.number() % 4):
            at = self.number(2) % (len(out) + 1)
            match self.number() % 5:
                case 0 if at < len(out):
                    out[at] ^= 1 << self.number() % 8
                case 1 if at < len(out):
                    out[at] = self.number()
                case 2:
                    del out[at:]
                case 3:
                    out[at:at] = self.noise()
                case _:
                    out[at:at] = out[at : at + 1 + self.number()] * (1 + self.number())
        return bytes(out)
