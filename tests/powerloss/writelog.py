"""The log of dm-log-writes, and the disk as it was at any point of it.

Format: Documentation/admin-guide/device-mapper/log-writes.rst and drivers/md/dm-log-writes.c of Linux 6.1. A write is
logged when the flush that follows its completion has completed, one with FUA when it has completed itself. So what
stands before a position is what the disk held for certain, and what the next flush brings is what may have been
there too.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

MAGIC = 0x6A736677736872
FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8
SECTOR = 512
BLOCK = 4096
_SUPER = struct.Struct("<QQQI")
_ENTRY = struct.Struct("<QQQQ")


class Entry(NamedTuple):
    """`sector` and `sectors` in units of 512 bytes; `data` is where their content stands in the log, in bytes."""

    sector: int
    sectors: int
    flags: int
    data: int
    mark: str

    @property
    def settles(self) -> bool:
        """Whether all writes logged before are on the disk for certain."""
        return bool(self.flags & FLUSH)


def read_log(path: Path) -> list[Entry]:
    """Raises ValueError for what is not such a log."""
    with path.open("rb") as log:
        magic, version, count, size = _SUPER.unpack(log.read(_SUPER.size))
        if (magic, version) != (MAGIC, 1):
            raise ValueError(f"{path} is no log of dm-log-writes: magic {magic:#x}, version {version}")
        per = size // SECTOR
        entries = []
        at = size
        for _ in range(count):
            log.seek(at)
            head = log.read(size)
            sector, sectors, flags, length = _ENTRY.unpack_from(head)
            mark = head[_ENTRY.size : _ENTRY.size + length].rstrip(b"\0").decode() if flags & MARK else ""
            entries.append(Entry(sector * per, sectors * per, flags, at + size, mark))
            at += size + (0 if flags & DISCARD else sectors * size)
    return entries


class Disk:
    """A disk that forgets what was not flushed. Positions are indices of `entries`; `advance` goes only forward."""

    def __init__(self, base: Path, log: Path, image: Path) -> None:
        self.entries = read_log(log)
        self.image = image
        self.position = 0
        # sectors written before that position
        self.certain = 0
        self._log = os.open(log, os.O_RDONLY)
        copy_sparse(base, image)
        self._fd = os.open(image, os.O_RDWR)

    def close(self) -> None:
        os.close(self._log)
        os.close(self._fd)

    def advance(self, position: int) -> None:
        """Make `image` hold everything that stands before `position`."""
        for entry in self.entries[self.position : position]:
            if entry.flags & DISCARD:
                raise ValueError("the log has a discard, which this replay does not know")
            os.pwrite(self._fd, os.pread(self._log, entry.sectors * SECTOR, entry.data), entry.sector * SECTOR)
            self.certain += entry.sectors
        self.position = position

    def unflushed(self, limit: int | None = None) -> list[Entry]:
        """What the disk may hold besides: the writes up to the next flush, at most `limit` sectors of them."""
        found: list[Entry] = []
        for entry in self.entries[self.position :]:
            if entry.sectors and not entry.flags & (FUA | FLUSH):
                found.append(entry)
            if entry.settles:
                break
        if limit is None:
            return found
        for index, entry in enumerate(found):
            if limit < entry.sectors:
                # not a border between two writes: nothing is known of when they were sent
                return [] if limit else found[:index]
            limit -= entry.sectors
        return found if not limit else []

    def cut(self, to: Path, extra: Sequence[Entry], rng: Random) -> int:
        """The disk at `position` with about half of the blocks of `extra`; returns how many blocks that was."""
        copy_sparse(self.image, to)
        kept = 0
        fd = os.open(to, os.O_RDWR)
        try:
            for entry in extra:
                data = os.pread(self._log, entry.sectors * SECTOR, entry.data)
                for at in range(0, len(data), BLOCK):
                    if rng.random() < 0.5:
                        os.pwrite(fd, data[at : at + BLOCK], entry.sector * SECTOR + at)
                        kept += 1
        finally:
            os.close(fd)
        return kept


def copy_sparse(source: Path, to: Path) -> None:
    """Holes stay holes."""
    with source.open("rb") as reader, to.open("wb") as writer:
        size = os.fstat(reader.fileno()).st_size
        writer.truncate(size)
        at = 0
        while at < size:
            try:
                start = os.lseek(reader.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            at = os.lseek(reader.fileno(), start, os.SEEK_HOLE)
            reader.seek(start)
            writer.seek(start)
            left = at - start
            while left and (piece := reader.read(min(left, 1 << 20))):
                writer.write(piece)
                left -= len(piece)
    shutil.copymode(source, to)
