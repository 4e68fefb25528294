"""Reads and writes through a chain of sparse images: a block is where the topmost layer has data, else zeros.

With a head alone the file system is the index. With snapshots below it an index says for each 4 KiB block which
layer holds it, built chunk by chunk from the layers' extents when a request first needs it, so its memory follows
what is touched. It is only a cache of what the files say.

While a layer is folded into the one below it (coalesce.py), another thread changes both files. What it does there
never changes what the two together say; `moved` keeps the index off the parts of the upper one that go away.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator

from engine.wire.frame import Buffer

BLOCK = 4096
CHUNK = 4 << 20
_CHUNK_BLOCKS = CHUNK // BLOCK
# 64 MiB of index, for 256 GiB of volume; beyond it the cache starts anew
MAX_CHUNKS = 65536

_PUNCH_HOLE = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, linux/falloc.h

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = _libc.fallocate64 if hasattr(_libc, "fallocate64") else _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def punch_hole(fd: int, offset: int, length: int) -> bool:
    """Give the range back to the file system; False when it cannot do that. Raises OSError."""
    while _fallocate(fd, _PUNCH_HOLE, offset, length):
        code = ctypes.get_errno()
        if code == errno.EOPNOTSUPP:
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return True


def pwrite_all(fd: int, data: Buffer, offset: int) -> None:
    """Raises OSError; the range is undefined then."""
    done = os.pwrite(fd, data, offset)
    while done < len(data):
        done += os.pwrite(fd, memoryview(data)[done:], offset + done)


def extents(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Parts of `start..end` where the file has data."""
    while start < end:
        try:
            data = os.lseek(fd, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        if data >= end:
            return
        start = os.lseek(fd, data, os.SEEK_HOLE)
        yield data, min(start, end)


class Chain:
    def __init__(self, layers: list[int], size: int, max_chunks: int | None = None) -> None:
        """`layers` are descriptors, the oldest snapshot first, the head last; the caller closes them.

        `max_chunks` bounds the index, in KiB.
        """
        self.size = size
        self._layers = list(layers)
        self._head = layers[-1]
        self._level = len(layers)
        self._single = len(layers) == 1
        self._index: dict[int, bytearray] = {}
        self._max_chunks = max_chunks
        self._moved: tuple[int, int] | None = None

    def push(self, head: int) -> None:
        """The head becomes a snapshot below `head`, which is empty."""
        self._layers.append(head)
        self._head = head
        self._level += 1
        self._single = False

    def moved(self, level: int, end: int) -> None:
        """All that layer `level` + 1 holds below offset `end` is in layer `level` too, and may go from the upper one.

        Levels count from 1, the oldest.
        """
        start = self._moved[1] if self._moved is not None and self._moved[0] == level else 0
        self._moved = level, end
        first, last = start // CHUNK, -(-end // CHUNK)
        numbers = range(first, last) if last - first < len(self._index) else list(self._index)
        for number in numbers:
            chunk = self._index.get(number)
            if chunk is not None:
                self._lower(chunk, number * CHUNK)

    def forget_moved(self) -> None:
        """Nothing goes away any more: the files tell where everything is."""
        self._moved = None

    def merged(self, level: int) -> None:
        """Layer `level` holds all of layer `level` + 1, which is no longer part of the chain."""
        table = bytes(value if value <= level else value - 1 for value in range(256))
        for number, chunk in self._index.items():
            self._index[number] = chunk.translate(table)
        del self._layers[level]
        self._level -= 1
        self._single = self._level == 1
        self._moved = None

    def _lower(self, chunk: bytearray, start: int) -> None:
        assert self._moved is not None
        level, end = self._moved
        count = min(CHUNK, end - start) // BLOCK
        if count > 0:
            chunk[:count] = chunk[:count].replace(bytes((level + 1,)), bytes((level,)))

    def read(self, offset: int, length: int) -> bytes:
        """Raises OSError."""
        if self._single:
            data = os.pread(self._head, length, offset)
            return data if len(data) == length else self._rest(self._head, data, offset, length)
        parts: list[bytes] = []
        at, end = offset, offset + length
        while at < end:
            level, stop = self._run(at, end)
            if level:
                fd = self._layers[level - 1]
                parts.append(self._rest(fd, os.pread(fd, stop - at, at), at, stop - at))
            else:
                parts.append(bytes(stop - at))
            at = stop
        return parts[0] if len(parts) == 1 else b"".join(parts)

    @staticmethod
    def _rest(fd: int, data: bytes, offset: int, length: int) -> bytes:
        while len(data) < length:
            more = os.pread(fd, length - len(data), offset + len(data))
            if not more:  # a layer made before the volume grew
                return data.ljust(length, b"\0")
            data += more
        return data

    def write(self, offset: int, data: Buffer) -> None:
        """Raises OSError; the range is undefined then."""
        if self._single:
            if os.pwrite(self._head, data, offset) != len(data):
                pwrite_all(self._head, data, offset)
            return
        start, end = offset, offset + len(data)
        # what lies below a block that the head takes over in part comes up with it, in the same pwrite
        before = self._below(start - start % BLOCK, start) if start % BLOCK else b""
        after = self._below(end, end + -end % BLOCK) if end % BLOCK else b""
        if before or after:
            data = b"".join((before, data, after))
        start -= len(before)
        try:
            pwrite_all(self._head, data, start)
        except OSError:
            self._forget(start, end)
            raise
        self._set(start // BLOCK, -(-end // BLOCK), self._level)

    def _below(self, start: int, end: int) -> bytes:
        """This part of a block when a layer below the head holds it, else nothing."""
        level = self._chunk(start // CHUNK)[start % CHUNK // BLOCK]
        return self.read(start, end - start) if 0 < level < self._level else b""

    def unmap(self, offset: int, length: int) -> None:
        """The range reads as zeros afterwards. Raises OSError; the range is undefined then."""
        if self._single:
            if not punch_hole(self._head, offset, length):
                pwrite_all(self._head, bytes(length), offset)
            return
        at, end = offset, offset + length
        while at < end:
            if at % BLOCK or end - at < BLOCK:
                stop = min(end, at - at % BLOCK + BLOCK)
                if self._chunk(at // CHUNK)[at % CHUNK // BLOCK]:
                    self.write(at, bytes(stop - at))
            else:
                stop = min(end - end % BLOCK, at - at % CHUNK + CHUNK)
                self._unmap_blocks(at, stop)
            at = stop

    def _unmap_blocks(self, start: int, end: int) -> None:
        """Whole blocks of one chunk: a hole only where no lower layer would show through it."""
        covered = bytearray((end - start) // BLOCK)
        for fd in self._layers[:-1]:
            _paint(covered, extents(fd, start, end), start, 1)
        at = 0
        while at < len(covered):
            below = covered[at]
            stop = covered.find(1 - below, at)
            stop = len(covered) if stop < 0 else stop
            offset, length = start + at * BLOCK, (stop - at) * BLOCK
            if not below and punch_hole(self._head, offset, length):
                self._set(offset // BLOCK, (offset + length) // BLOCK, 0)
            else:
                self.write(offset, bytes(length))
            at = stop

    def _chunk(self, number: int) -> bytearray:
        chunk = self._index.get(number)
        if chunk is None:
            if len(self._index) >= (self._max_chunks or MAX_CHUNKS):
                self._index.clear()
            chunk = bytearray(_CHUNK_BLOCKS)
            start = number * CHUNK
            for level, fd in enumerate(self._layers, 1):
                _paint(chunk, extents(fd, start, start + CHUNK), start, level)
            if self._moved is not None:  # the upper layer may have lost a block since it was looked at
                self._lower(chunk, start)
            self._index[number] = chunk
        return chunk

    def _run(self, at: int, end: int) -> tuple[int, int]:
        """Layer of the block at `at`, and how far (up to `end`, within the chunk) the same layer goes on."""
        chunk = self._chunk(at // CHUNK)
        start = at - at % CHUNK
        block = (at - start) // BLOCK
        level = chunk[block]
        last = min(_CHUNK_BLOCKS, -(-(end - start) // BLOCK))
        while block < last and chunk[block] == level:
            block += 1
        return level, min(end, start + block * BLOCK)

    def _set(self, first: int, last: int, level: int) -> None:
        while first < last:
            number, at = divmod(first, _CHUNK_BLOCKS)
            count = min(last - first, _CHUNK_BLOCKS - at)
            chunk = self._index.get(number)
            if chunk is not None:
                chunk[at : at + count] = bytes((level,)) * count
            first += count

    def _forget(self, start: int, end: int) -> None:
        for number in range(start // CHUNK, (end - 1) // CHUNK + 1):
            self._index.pop(number, None)


def _paint(blocks: bytearray, extents: Iterator[tuple[int, int]], base: int, value: int) -> None:
    for start, end in extents:
        first, last = (start - base) // BLOCK, -(-(end - base) // BLOCK)
        blocks[first:last] = bytes((value,)) * (last - first)
