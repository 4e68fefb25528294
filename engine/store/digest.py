"""What the disk has of an image now, past the page cache: a page that is cached hides a flip below it."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import msgspec
from crc32c import crc32c

from engine.store.chain import extents, paint, pwrite_all
from engine.store.regions import REGION_SHIFT, REGION_SIZE
from engine.store.sums import BLOCK, BLOCK_SHIFT, Sums, sum_of_run

# of a block: what its image's checksums say of it, if anything; UNREADABLE has no content
UNSUMMED, GOOD, BAD, UNREADABLE = 0, 1, 2, 3
VERDICT = 3
# the image that was asked for has it, none below
HELD = 4


class RegionDigest(msgspec.Struct, frozen=True):
    """`sums` (CRC-32C) and `flags` of each block of a range; empty when the image asked for holds nothing there.

    `more` is where it holds something again, a multiple of the region size, or the size of the volume.
    """

    sums: tuple[int, ...]
    flags: bytes
    more: int


class DigestStep:
    """The digest of a range as one image of a chain has it: `run` in any thread, while the chain does not change.

    `sums` are those of the images, the oldest first. The range is within one region; its ends are multiples of 4 KiB,
    or the end of the volume.
    """

    def __init__(
        self, directory: Path, sums: list[Sums], size: int, offset: int, length: int, everything: bool
    ) -> None:
        self._directory = directory
        self._sums = sums
        self._size = size
        self._offset = offset
        self._blocks = -(-length // BLOCK)
        self._everything = everything

    def run(self) -> RegionDigest:
        """Raises OSError; not for what cannot be read."""
        start, count = self._offset, self._blocks
        end = start + count * BLOCK
        files: list[int] = []
        try:
            levels = bytearray(count)
            for level, sums in enumerate(self._sums, 1):
                files.append(_open(self._directory / sums.image))
                paint(levels, extents(files[-1], start, end), start, level)
            top = len(files)
            more = self._more(files[-1], end)
            if top not in levels and not self._everything:
                return RegionDigest((), b"", more)
            found: list[int] = []
            flags = bytearray()
            at = 0
            while at < count:
                level = levels[at]
                stop = at + 1
                while stop < count and levels[stop] == level:
                    stop += 1
                self._run(files, level, at, stop, found, flags)
                if level == top:
                    for block in range(at, stop):
                        flags[block] |= HELD
                at = stop
            return RegionDigest(tuple(found), bytes(flags), more)
        finally:
            for fd in files:
                os.close(fd)

    def _more(self, fd: int, end: int) -> int:
        for data, _ in extents(fd, end, self._size):
            return data >> REGION_SHIFT << REGION_SHIFT
        return self._size

    def _run(self, files: list[int], level: int, first: int, last: int, found: list[int], flags: bytearray) -> None:
        if not level:
            found += [_ZERO] * (last - first)
            flags += bytes((UNSUMMED,)) * (last - first)
            return
        offset = self._offset + first * BLOCK
        record = self._sums[level - 1].record(offset >> REGION_SHIFT)
        number = (offset & (REGION_SIZE - 1)) >> BLOCK_SHIFT
        for index, block in enumerate(_blocks(files[level - 1], offset, last - first)):
            if block is None:
                found.append(0)
                flags.append(UNREADABLE)
                continue
            crc = crc32c(block)
            found.append(crc)
            if record is None:
                flags.append(UNSUMMED)
            else:
                flags.append(GOOD if sum_of_run(record, number + index, number + index + 1) == crc else BAD)


_ZERO: int = crc32c(bytes(BLOCK))


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _blocks(fd: int, offset: int, count: int) -> list[bytes | None]:
    """None for what cannot be read; zeros beyond the end."""
    with mmap.mmap(-1, count * BLOCK) as buffer, memoryview(buffer) as view:
        try:
            _fill(fd, view, offset)
        except OSError:
            if count > 1:
                return [_blocks(fd, offset + index * BLOCK, 1)[0] for index in range(count)]
            return [None]
        return [bytes(view[index * BLOCK : (index + 1) * BLOCK]) for index in range(count)]


def _fill(fd: int, view: memoryview, offset: int) -> None:
    # does nothing to a descriptor that goes past the cache; what is dirty stays
    os.posix_fadvise(fd, offset, len(view), os.POSIX_FADV_DONTNEED)
    done = 0
    while done < len(view):
        try:
            count = os.preadv(fd, [view[done:]], offset + done)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # a file system that wants larger blocks than these for it, or took the flag and cannot do it
            plain = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.posix_fadvise(plain, offset, len(view), os.POSIX_FADV_DONTNEED)
                count = os.preadv(plain, [view[done:]], offset + done)
            finally:
                os.close(plain)
        if not count:
            return
        done += count
        if count % BLOCK:  # the end of the file
            return


class MendStep:
    """Puts back blocks of an image: `run` in any thread, while the chain does not change.

    The checksums are there before and after, so a crash in between leaves what was there, and it is known to be wrong.
    """

    def __init__(self, directory: Path, sums: Sums, offset: int, data: bytes, *, force: bool) -> None:
        """`data` is whole blocks. Raises CorruptBlockError when it is not what the sums remember, OSError."""
        self._path = directory / sums.image
        self.start, self.end = offset, offset + len(data)
        self._data = data
        self._sync = -1
        regions = range(self.start >> REGION_SHIFT, (self.end - 1 >> REGION_SHIFT) + 1)
        bad = sums.check(offset, data, crc32c(data))
        if force and bad >= 0:
            # the sums are what is wrong, and must not outlive the write
            self._sync = sums.forget(regions)
        elif not force and (bad >= 0 or not all(map(sums.has, regions))):
            raise sums.corrupt(max(bad, offset))

    def run(self) -> None:
        """Raises OSError."""
        if self._sync >= 0:
            os.fdatasync(self._sync)
        fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        try:
            pwrite_all(fd, self._data, self.start)
            os.fdatasync(fd)
        finally:
            os.close(fd)
