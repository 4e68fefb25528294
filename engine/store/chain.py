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
from collections.abc import Iterator, Sequence

from crc32c import crc32c

from engine.store.index import BLOCK as BLOCK
from engine.store.index import CHUNK, CHUNK_BLOCKS, LayerIndex
from engine.store.sums import Sums
from engine.wire.frame import Buffer

# ext4 keeps what one call wrote in one folio of the page cache, and goes through all blocks of the folio whenever one
# of them is written again: a replica's system time for a random 4 KiB write, where large writes were there before, is
# 7.1 µs with this, 5.5 with 32 KiB and 5.0 with 16. Large writes pay for smaller ones: a stream through NFS ran at 0.49
# to 0.56 of the reference with this, 0.46 with 32 KiB and 0.45 with 16.
PIECE = 64 << 10
# The disk begins with a large write at once, while the next one is received, or a flush behind many of them would begin
# with all (see Linux' sync_file_range(2): no more than a hint here, nothing relies on it).
_WRITE_BEHIND = 64 << 10
_SYNC_FILE_RANGE_WRITE = 2

_PUNCH_HOLE = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, linux/falloc.h

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = _libc.fallocate64 if hasattr(_libc, "fallocate64") else _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

_sync_file_range = _libc.sync_file_range
_sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


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
    """In pieces of `PIECE`. Raises OSError; the range is undefined then."""
    if len(data) < _WRITE_BEHIND and os.pwrite(fd, data, offset) == len(data):
        return
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(fd, view[done : done + PIECE - (offset + done) % PIECE], offset + done)
    if done >= _WRITE_BEHIND:
        _sync_file_range(fd, offset, done, _SYNC_FILE_RANGE_WRITE)


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
    def __init__(
        self, layers: list[int], size: int, max_mixed: int | None = None, sums: Sequence[Sums] | None = None
    ) -> None:
        """`layers` are descriptors, the oldest snapshot first, the head last; the caller closes them.

        `max_mixed` bounds the index, in KiB. `sums` are those of the layers, for `read_checked`.
        """
        self.size = size
        self._layers = list(layers)
        self._head = layers[-1]
        self._level = len(layers)
        self._single = len(layers) == 1
        self._index = LayerIndex(max_mixed)
        self._moved: tuple[int, int] | None = None
        self.sums = sums or ()

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
        known = self._index.chunks
        for number in range(first, last) if last - first < len(known) else list(known):
            if (count := min(CHUNK, end - number * CHUNK) // BLOCK) > 0:
                self._index.lower(number, count, level)

    def forget_moved(self) -> None:
        """Nothing goes away any more: the files tell where everything is."""
        self._moved = None

    def merged(self, level: int) -> None:
        """Layer `level` holds all of layer `level` + 1, which is no longer part of the chain."""
        self._index.renumber(bytes(value if value <= level else value - 1 for value in range(256)))
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

    def read_checked(self, offset: int, length: int) -> tuple[bytes, int]:
        """The bytes and their CRC-32C. Raises CorruptBlockError, OSError."""
        if (offset | length) & (BLOCK - 1):
            start = offset & -BLOCK
            whole, _ = self.read_checked(start, (offset + length - start + BLOCK - 1) & -BLOCK)
            data = whole[offset - start : offset - start + length]
            return data, crc32c(data)
        if self._single:
            data = os.pread(self._head, length, offset)
            if len(data) != length:
                data = self._rest(self._head, data, offset, length)
            crc: int = crc32c(data)
            bad = self.sums[0].check(offset, data, crc)
            if bad >= 0:
                raise self.sums[0].corrupt(bad)
            return data, crc
        parts: list[bytes] = []
        at, end = offset, offset + length
        while at < end:
            level, stop = self._run(at, end)
            if level:
                fd, sums = self._layers[level - 1], self.sums[level - 1]
                data = self._rest(fd, os.pread(fd, stop - at, at), at, stop - at)
                crc = crc32c(data)
                bad = sums.check(at, data, crc)
                if bad >= 0:
                    raise sums.corrupt(bad)
            else:
                data = bytes(stop - at)
                crc = crc32c(data)
            parts.append(data)
            at = stop
        if len(parts) == 1:
            return parts[0], crc
        data = b"".join(parts)
        return data, crc32c(data)

    def read(self, offset: int, length: int) -> bytes:
        """Without a look at the checksums. Raises OSError."""
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

    def pieces(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(descriptor, start, end) of every part of `start..end` that a layer holds. Raises OSError."""
        at = start
        while at < end:
            level, stop = self._run(at, end)
            if level:
                yield self._layers[level - 1], at, stop
            at = stop

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
            paint(covered, extents(fd, start, end), start, 1)
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

    def _chunk(self, number: int) -> bytes | bytearray:
        known = self._index.chunks.get(number)
        if known is not None:
            return known
        chunk = bytearray(CHUNK_BLOCKS)
        start = number * CHUNK
        for level, fd in enumerate(self._layers, 1):
            paint(chunk, extents(fd, start, start + CHUNK), start, level)
        if self._moved is not None:  # the upper layer may have lost a block since it was looked at
            self._lower(chunk, start)
        return self._index.put(number, chunk)

    def _run(self, at: int, end: int) -> tuple[int, int]:
        """Layer of the block at `at`, and how far (up to `end`, within the chunk) the same layer goes on."""
        chunk = self._chunk(at // CHUNK)
        start = at - at % CHUNK
        block = (at - start) // BLOCK
        level = chunk[block]
        last = min(CHUNK_BLOCKS, -(-(end - start) // BLOCK))
        while block < last and chunk[block] == level:
            block += 1
        return level, min(end, start + block * BLOCK)

    def _set(self, first: int, last: int, level: int) -> None:
        while first < last:
            number, at = divmod(first, CHUNK_BLOCKS)
            count = min(last - first, CHUNK_BLOCKS - at)
            self._index.paint(number, at, count, level)
            first += count

    def changed(self, offset: int, length: int) -> None:
        """A layer was written past this object."""
        first, last = offset // CHUNK, (offset + length - 1) // CHUNK
        if last - first < len(self._index.chunks):
            self._forget(offset, offset + length)
        else:
            for number in [number for number in self._index.chunks if first <= number <= last]:
                self._index.forget(number)

    def _forget(self, start: int, end: int) -> None:
        for number in range(start // CHUNK, (end - 1) // CHUNK + 1):
            self._index.forget(number)


def paint(blocks: bytearray, extents: Iterator[tuple[int, int]], base: int, value: int) -> None:
    """Set `value` for each block, counted from offset `base`, that an extent touches."""
    for start, end in extents:
        first, last = (start - base) // BLOCK, -(-(end - base) // BLOCK)
        blocks[first:last] = bytes((value,)) * (last - first)
