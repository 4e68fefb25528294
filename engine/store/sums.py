"""Checksums of an image's blocks, in `<image>.sums` beside it (docs/on-disk-format.md).

A *record* has, for one region (1 MiB) of the image, the CRC-32C of its first 4 KiB block, of its first two, and so on:
256 running sums. The sum of any run of whole blocks follows from two of them with four look-ups, so a read of any
length is checked with the one sum that its frame needs anyway. Holes count as zeros.

A record counts while its bit is set. The bit of a region is set only when its record is on disk, and only for content
that nobody changes; whoever is about to change a region clears it first, durably. So after any crash a bit that is set
belongs to what is in the image. A damaged or missing file of sums means only that there are none.
"""

from __future__ import annotations

import os
import struct
import sys
from array import array
from collections.abc import Iterable
from pathlib import Path
from weakref import WeakSet

from crc32c import crc32c

from engine.durable import sync_directory
from engine.errors import CorruptBlockError
from engine.store.regions import REGION_SHIFT, REGION_SIZE
from engine.wire.frame import Buffer

SUFFIX = ".sums"
MAGIC = b"SMBLKSUM"
VERSION = 1
BLOCK_SHIFT = 12
BLOCK = 1 << BLOCK_SHIFT
BLOCKS = REGION_SIZE // BLOCK
# magic | version u32 | block shift u32 | region shift u32 | reserved u32 | crc32c of the 24 bytes before it
_HEADER = struct.Struct("<8sIIII")
_CRC = struct.Struct("<I")
DATA_OFFSET = 4096

# 1024 regions: a block with their bits, then their records
GROUP_SHIFT = 10
GROUP = 1 << GROUP_SHIFT
BITS_ROOM = 4096
RECORD = BLOCKS * 4 + 4  # the running sums, and the CRC-32C of the region's number (u64) and them
_NUMBER = struct.Struct("<Q")
GROUP_SIZE = BITS_ROOM + GROUP * RECORD

# records in memory, about 1.1 KiB each, of all images of a replica, for 8 GiB; beyond it the cache starts anew
MAX_RECORDS = 8192

_MASK = REGION_SIZE - 1
_SWAP = sys.byteorder != "little"


def sums_file(image: str) -> str:
    return image + SUFFIX


def header() -> bytes:
    head = _HEADER.pack(MAGIC, VERSION, BLOCK_SHIFT, REGION_SHIFT, 0)
    return (head + _CRC.pack(crc32c(head))).ljust(DATA_OFFSET, b"\0")


def _bits_at(group: int) -> int:
    return DATA_OFFSET + group * GROUP_SIZE


def _record_at(region: int) -> int:
    return _bits_at(region >> GROUP_SHIFT) + BITS_ROOM + (region & (GROUP - 1)) * RECORD


def running_sums(data: bytes) -> array[int]:
    """Sums of the first 0, 1, 2 to 256 blocks of a region; what `data` lacks at its end is zeros."""
    data = data.ljust(REGION_SIZE, b"\0")
    sums = array("I", [0])
    crc = 0
    for at in range(0, REGION_SIZE, BLOCK):
        crc = crc32c(data[at : at + BLOCK], crc)
        sums.append(crc)
    return sums


def encode_record(region: int, sums: array[int]) -> bytes:
    body = sums[1:]
    if _SWAP:
        body.byteswap()
    raw = body.tobytes()
    return raw + _CRC.pack(crc32c(_NUMBER.pack(region) + raw))


def decode_record(region: int, raw: bytes) -> array[int] | None:
    """None for what is no record of this region."""
    if len(raw) != RECORD or crc32c(_NUMBER.pack(region) + raw[:-4]) != _CRC.unpack_from(raw, RECORD - 4)[0]:
        return None
    sums = array("I", raw[:-4])
    if _SWAP:
        sums.byteswap()
    sums.insert(0, 0)
    return sums


# by the number of blocks behind: what becomes of a sum when these follow, for each byte of the sum (256 values of the
# lowest, of the next, ...). crc(A + B) = shift(crc(A)) ^ crc(B), and shift is linear.
_shifts: dict[int, list[int]] = {}


def _shift_table(blocks: int) -> list[int]:
    zeros = bytes(blocks * BLOCK)
    tail = crc32c(zeros)
    table: list[int] = []
    for byte in range(4):
        part = [0] * 256
        for bit in range(8):
            image = crc32c(zeros, 1 << (byte * 8 + bit)) ^ tail
            low = 1 << bit
            for value in range(low):
                part[low | value] = part[value] ^ image
        table += part
    _shifts[blocks] = table
    return table


def sum_of_run(sums: array[int], first: int, last: int) -> int:
    """CRC-32C of the blocks `first` to `last` - 1 of a region."""
    before = sums[first]
    if not before:
        return sums[last]
    table = _shifts.get(last - first) or _shift_table(last - first)
    return (
        sums[last]
        ^ table[before & 255]
        ^ table[256 + (before >> 8 & 255)]
        ^ table[512 + (before >> 16 & 255)]
        ^ table[768 + (before >> 24)]
    )


class Records:
    """Bounds the records that the images of a replica have in memory together."""

    def __init__(self) -> None:
        self._count = 0
        self._images: WeakSet[Sums] = WeakSet()

    def join(self, image: Sums) -> None:
        self._images.add(image)

    def one_more(self) -> None:
        """One of the images is about to keep a record."""
        if self._count >= MAX_RECORDS:
            self._count = 0
            for image in list(self._images):
                image.forget_records()
        self._count += 1


class Sums:
    """The checksums of one image. `check` may be called from any thread, all else from one.

    `begin` and `finish` enclose the making of records; `forget` is what a write has to be preceded by.
    """

    def __init__(self, directory: Path, image: str, records: Records | None = None) -> None:
        """Raises OSError. A file that is none, or of a newer release, is deleted: it may be made again."""
        self.image = image
        self._directory = directory
        self._fd = -1
        self._bits = bytearray()
        self._records: dict[int, array[int]] = {}
        self._bound = records or Records()
        self._bound.join(self)
        self._making: set[int] = set()
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            if os.pread(self._fd, DATA_OFFSET, 0) == header():
                self._read_bits()
                return
            self.path.unlink()
            sync_directory(directory)
        except BaseException:
            self.close()
            raise
        self.close()

    def _read_bits(self) -> None:
        size = os.fstat(self._fd).st_size
        group = 0
        while _bits_at(group) < size:
            found = os.pread(self._fd, GROUP // 8, _bits_at(group))
            if any(found):
                self._bits = self._bits.ljust(group * GROUP // 8, b"\0") + found.ljust(GROUP // 8, b"\0")
            group += 1

    @property
    def path(self) -> Path:
        return self._directory / sums_file(self.image)

    @property
    def regions(self) -> int:
        """How many regions have sums."""
        return int.from_bytes(self._bits).bit_count()

    def has(self, region: int) -> bool:
        at, bits = region >> 3, self._bits  # once: another thread may be asking
        return at < len(bits) and bool(bits[at] >> (region & 7) & 1)

    # reading

    def record(self, region: int) -> array[int] | None:
        """The running sums of a region, or None when it has none."""
        found = self._records.get(region)
        if found is None and self.has(region):
            try:
                found = decode_record(region, os.pread(self._fd, RECORD, _record_at(region)))
            except OSError:
                return None
            if found is None:
                return None
            self._bound.one_more()
            self._records[region] = found
            # another thread may have forgotten it meanwhile, the bit first
            if not self.has(region):
                self._records.pop(region, None)
                return None
        return found

    def forget_records(self) -> None:
        """Those in memory; they are read again when they are needed."""
        self._records.clear()

    def check(self, offset: int, data: Buffer, crc: int) -> int:
        """Where the first block of `data` lies that is not what it was, or -1; `crc` is the CRC-32C of `data`.

        `offset` and the length of `data` are multiples of 4 KiB.
        """
        region = offset >> REGION_SHIFT
        sums = self._records.get(region)
        first = (offset & _MASK) >> BLOCK_SHIFT
        last = first + (len(data) >> BLOCK_SHIFT)
        if last > BLOCKS:
            return self._check_each(offset, data)
        if sums is None:
            at, bits = region >> 3, self._bits
            if at >= len(bits) or not bits[at] >> (region & 7) & 1:
                return -1
            sums = self.record(region)
            if sums is None:
                return -1
        # `sum_of_run`, without another call
        before = sums[first]
        if before:
            table = _shifts.get(last - first) or _shift_table(last - first)
            before = (
                table[before & 255]
                ^ table[256 + (before >> 8 & 255)]
                ^ table[512 + (before >> 16 & 255)]
                ^ table[768 + (before >> 24)]
            )
        if sums[last] ^ before == crc:
            return -1
        for block in range(first, last):
            at = (block - first) << BLOCK_SHIFT
            if crc32c(data[at : at + BLOCK]) != sum_of_run(sums, block, block + 1):
                return offset + at
        return -1

    def corrupt(self, offset: int) -> CorruptBlockError:
        """What to raise for an offset from `check`."""
        return CorruptBlockError(self._directory, self.image, offset)

    def _check_each(self, offset: int, data: Buffer) -> int:
        at = 0
        while at < len(data):
            stop = min(len(data), at + REGION_SIZE - ((offset + at) & _MASK))
            part = bytes(data[at:stop])
            bad = self.check(offset + at, part, crc32c(part))
            if bad >= 0:
                return bad
            at = stop
        return -1

    # making and taking back

    def begin(self, regions: Iterable[int]) -> RecordWrite:
        """Make records of these; whatever is forgotten before `finish` stays without."""
        wanted = list(regions)
        self._making.update(wanted)
        return RecordWrite(self.path, self._fd, wanted)

    def finish(self, write: RecordWrite) -> None:
        """`write.run` succeeded: its records count from now on. Raises OSError."""
        if self._fd < 0:
            self._fd = write.fd
        ready = [region for region in write.made if region in self._making]
        self.abandon(write)
        for region in ready:
            at = region >> 3
            if at >= len(self._bits):
                self._bits = self._bits.ljust((at // (GROUP // 8) + 1) * (GROUP // 8), b"\0")
            self._bits[at] |= 1 << (region & 7)
        # not synced: a bit that is lost costs the making of its record
        self._write_bits(ready)

    def abandon(self, write: RecordWrite) -> None:
        """`write.run` failed."""
        self._making.difference_update(write.regions)

    def forget(self, regions: Iterable[int]) -> int:
        """These are about to change. A descriptor that must be fdatasynced before they do, or -1. Raises OSError."""
        had = []
        for region in regions:
            self._making.discard(region)
            if self.has(region):
                self._bits[region >> 3] &= ~(1 << (region & 7))
                self._records.pop(region, None)
                had.append(region)
        self._write_bits(had)
        return self._fd if had else -1

    def _write_bits(self, regions: list[int]) -> None:
        for at in sorted({region >> 3 for region in regions}):
            group, within = divmod(at, GROUP // 8)
            os.pwrite(self._fd, self._bits[at : at + 1], _bits_at(group) + within)

    def sync(self) -> None:
        """Raises OSError."""
        if self._fd >= 0:
            os.fdatasync(self._fd)

    def drop(self) -> None:
        """Nothing counts any more. The file stays: whoever changes the image deletes it first."""
        self._bits = bytearray()
        self._records.clear()
        self._making.clear()

    def close(self) -> None:
        self.drop()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class RecordWrite:
    """Writes records of an image: `run` in any thread, then `Sums.finish`, or `Sums.abandon` when it failed."""

    def __init__(self, path: Path, fd: int, regions: list[int]) -> None:
        self.fd = fd
        self.regions = regions
        self.made: list[int] = []
        self._path = path

    def run(self, image: int) -> None:
        """Read the regions of the image (a descriptor) and write their records, durably. Raises OSError.

        A region that cannot be read is left out.
        """
        if self.fd < 0:
            self.fd = self._create()
        for region in self.regions:
            try:
                data = read_all(image, REGION_SIZE, region << REGION_SHIFT)
            except OSError:
                continue
            raw = encode_record(region, running_sums(data))
            if os.pwrite(self.fd, raw, _record_at(region)) == len(raw):
                self.made.append(region)
        os.fdatasync(self.fd)

    def _create(self) -> int:
        # whole under its name, or not there; empty, it says nothing
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.pwrite(fd, header(), 0)
            os.fsync(fd)
            os.replace(temporary, self._path)
            sync_directory(self._path.parent)
        except BaseException:
            os.close(fd)
            raise
        return fd


def read_all(fd: int, length: int, offset: int) -> bytes:
    """Shorter only at the end of the file. Raises OSError."""
    data = os.pread(fd, length, offset)
    while 0 < len(data) < length:
        more = os.pread(fd, length - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data
