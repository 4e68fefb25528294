"""Which layer of a chain holds each block, for the chunks of the volume that were touched: a bounded cache.

A chunk that one layer holds alone, or none, is an object that all such chunks share, so memory follows what is written
in pieces, not what is read. Beyond the bounds those that were looked up first go first.
"""

from __future__ import annotations

from itertools import islice

BLOCK = 4096
CHUNK = 4 << 20
CHUNK_BLOCKS = CHUNK // BLOCK

# KiB, for 32 GiB of volume in which every chunk is a mixture
MAX_MIXED = 8192
# some 100 bytes each, for 256 GiB of volume
MAX_CHUNKS = 65536

_uniform: dict[int, bytes] = {}


def _all(level: int) -> bytes:
    chunk = _uniform.get(level)
    if chunk is None:
        chunk = _uniform[level] = bytes((level,)) * CHUNK_BLOCKS
    return chunk


class LayerIndex:
    """`chunks`: by number, a byte for each block with its layer, counted from 1, the oldest; 0 for none."""

    def __init__(self, max_mixed: int | None = None) -> None:
        self.chunks: dict[int, bytes | bytearray] = {}
        self._mixed = 0
        self._max_mixed = max_mixed or MAX_MIXED

    def put(self, number: int, chunk: bytearray) -> bytes | bytearray:
        """Keep it; the object that is kept."""
        self._make_room()
        self.forget(number)
        level = chunk[0]
        if chunk.count(level) == CHUNK_BLOCKS:
            self.chunks[number] = _all(level)
        else:
            self.chunks[number] = chunk
            self._mixed += 1
        return self.chunks[number]

    def paint(self, number: int, at: int, count: int, level: int) -> None:
        """`count` blocks from `at` on are with `level` now."""
        chunk = self.chunks.get(number)
        if chunk is None:
            return
        if isinstance(chunk, bytes):
            if chunk[at] == level:
                return
            if self._mixed >= self._max_mixed:
                self.forget(number)  # looked up again when it is needed, in the place of others
                return
            chunk = self.chunks[number] = bytearray(chunk)
            self._mixed += 1
        chunk[at : at + count] = bytes((level,)) * count
        # looked at once in a while: a sequential writer ends each chunk
        if at + count == CHUNK_BLOCKS and chunk.count(level) == CHUNK_BLOCKS:
            self.chunks[number] = _all(level)
            self._mixed -= 1

    def lower(self, number: int, count: int, level: int) -> None:
        """Of the first `count` blocks those of `level` + 1 are with `level` now."""
        chunk = self.chunks.get(number)
        if chunk is None or level + 1 not in chunk[:count]:
            return
        self.put(number, bytearray(chunk[:count].replace(bytes((level + 1,)), bytes((level,))) + chunk[count:]))

    def renumber(self, table: bytes) -> None:
        """`table[level]` is the new number of each level."""
        for number, chunk in self.chunks.items():
            self.chunks[number] = _all(table[chunk[0]]) if isinstance(chunk, bytes) else chunk.translate(table)

    def forget(self, number: int) -> None:
        if isinstance(self.chunks.pop(number, None), bytearray):
            self._mixed -= 1

    def clear(self) -> None:
        self.chunks.clear()
        self._mixed = 0

    def _make_room(self) -> None:
        if len(self.chunks) >= MAX_CHUNKS or self._mixed >= self._max_mixed:
            for number in list(islice(self.chunks, len(self.chunks) // 4 + 1)):
                self.forget(number)
