"""The region maps on disk: `intent.map`, and one `changes-<replica>.map` for each departed replica.

Invariant: every bit of the intent map is also in every tracked map, because a new map starts as a copy of it and
every mark goes to all. A tracked map never loses a bit; it is deleted as a whole when its replica is back.

Only `MapSync.run` may be called from another thread.
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from crc32c import crc32c

from engine.durable import sync_directory
from engine.errors import FormatError, StoreError
from engine.store.regions import REGION_SHIFT, REGION_SIZE, Regions

INTENT_MAP = "intent.map"
MAX_TRACKED = 64

MAGIC = b"SMREGION"
VERSION = 1
# magic | version u32 | region shift u32 | bits u64 | crc32c of the 24 bytes before it; padded to a block
_HEADER = struct.Struct("<8sIIQ")
_CRC = struct.Struct("<I")
DATA_OFFSET = 4096

_NAME = re.compile(r"[A-Za-z0-9._-]{1,63}")
_CHANGES = re.compile(r"changes-([A-Za-z0-9._-]{1,63})\.map")


def valid_name(name: str) -> bool:
    """Whether `name` may name a replica; such a name is also safe inside a file name."""
    return _NAME.fullmatch(name) is not None


def region_count(size: int) -> int:
    return (size + REGION_SIZE - 1) >> REGION_SHIFT


def _bitmap_size(count: int) -> int:
    return (count + 7) >> 3


def _header(count: int) -> bytes:
    head = _HEADER.pack(MAGIC, VERSION, REGION_SHIFT, count)
    return (head + _CRC.pack(crc32c(head))).ljust(DATA_OFFSET, b"\0")


def _pwrite_all(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def changes_map(name: str) -> str:
    """File name of the map of a departed replica."""
    return f"changes-{name}.map"


def create_map(path: Path, size: int, bits: bytes | bytearray = b"") -> int:
    """Write a new map, over what an interrupted attempt left; return its descriptor. Raises OSError."""
    count = region_count(size)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        # real zeros: a hole would cost a journal commit at the fdatasync of the first bit in it
        _pwrite_all(fd, _header(count) + bytes(bits).ljust(_bitmap_size(count), b"\0"), 0)
    except OSError:
        os.close(fd)
        path.unlink(missing_ok=True)
        raise
    return fd


def extend_map(path: Path, size: int) -> None:
    """Grow the map to a volume of `size` bytes; harmless when done already, and beside an open `RegionMaps`.

    Raises OSError, StoreError.
    """
    fd, _, count = _open_map(path)
    try:
        wanted = region_count(size)
        if wanted > count:
            # the bits that are there belong to whoever has the map open
            begin, end = _bitmap_size(count), _bitmap_size(wanted)
            _pwrite_all(fd, bytes(end - begin), DATA_OFFSET + begin)
            os.fsync(fd)
            _pwrite_all(fd, _header(wanted), 0)
            os.fsync(fd)
    finally:
        os.close(fd)


def create_full_map(directory: Path, name: str, size: int) -> None:
    """A map of departed replica `name` in which everything has changed, in place of any there is.

    Durable with the next fsync of the directory. Raises OSError.
    """
    count = region_count(size)
    temporary = directory / f".{changes_map(name)}.tmp"
    fd = create_map(temporary, size, ((1 << count) - 1).to_bytes(_bitmap_size(count), "little"))
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    os.replace(temporary, directory / changes_map(name))


def read_map(path: Path) -> int:
    """The bits of a map that nobody has open, region 0 lowest. Raises OSError, StoreError."""
    fd, bits, _ = _open_map(path)
    os.close(fd)
    return int.from_bytes(bits, "little")


def list_changes(directory: Path) -> dict[str, str]:
    """Departed replica -> file name of its map."""
    found = (_CHANGES.fullmatch(entry.name) for entry in directory.iterdir())
    return {match[1]: match[0] for match in found if match}


def _open_map(path: Path) -> tuple[int, bytearray, int]:
    """Descriptor, bits, and their number. Raises OSError, StoreError."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise FormatError(path.parent, f"{path.name} is missing") from None
    try:
        raw = os.pread(fd, os.fstat(fd).st_size, 0)
        if len(raw) < DATA_OFFSET or raw[:8] != MAGIC:
            raise FormatError(path.parent, f"{path.name} is damaged: not a region map")
        _, version, shift, count = _HEADER.unpack_from(raw)
        if crc32c(raw[: _HEADER.size]) != _CRC.unpack_from(raw, _HEADER.size)[0]:
            raise FormatError(path.parent, f"{path.name} is damaged: header checksum mismatch")
        if version > VERSION or shift != REGION_SHIFT:
            raise FormatError(
                path.parent,
                f"{path.name} is written in version {version} with regions of 2^{shift} bytes, "
                f"this release knows {VERSION} with 2^{REGION_SHIFT}: use the newer release",
            )
        bits = bytearray(raw[DATA_OFFSET : DATA_OFFSET + _bitmap_size(count)])
        if len(bits) < _bitmap_size(count):
            raise FormatError(path.parent, f"{path.name} is damaged: it ends within the bitmap")
    except BaseException:
        os.close(fd)
        raise
    return fd, bits, count


def _fill_holes(fd: int) -> None:
    """A copy that saved zeros as holes would need room for a bit, on a disk that may have none. Raises OSError."""
    found = os.fstat(fd)
    if found.st_blocks * 512 < found.st_size:
        _pwrite_all(fd, os.pread(fd, found.st_size, 0), 0)


def set_bits(bits: bytes | bytearray) -> list[int]:
    """Indices of the bits that are set; bit i is bit `i & 7` (lowest first) of byte `i >> 3`."""
    return [(at << 3) + bit for at, byte in enumerate(bits) if byte for bit in range(8) if byte >> bit & 1]


class _MapFile:
    def __init__(self, fd: int, bits: bytearray) -> None:
        self.fd = fd
        self.bits = bits

    def add(self, regions: Iterable[int]) -> None:
        touched: set[int] = set()
        for region in regions:
            self.bits[region >> 3] |= 1 << (region & 7)
            touched.add(region >> 3)
        self._write(touched)

    def clear(self, regions: Iterable[int]) -> None:
        touched: set[int] = set()
        for region in regions:
            self.bits[region >> 3] &= ~(1 << (region & 7))
            touched.add(region >> 3)
        self._write(touched)

    def _write(self, touched: set[int]) -> None:
        runs: list[list[int]] = []
        for at in sorted(touched):
            if runs and at - runs[-1][1] < 512:
                runs[-1][1] = at
            else:
                runs.append([at, at])
        for first, last in runs:
            _pwrite_all(self.fd, self.bits[first : last + 1], DATA_OFFSET + first)


class MapSync:
    """One fdatasync of the maps: `run` in any thread, then give it back to `RegionMaps.finish`."""

    def __init__(self, fds: list[int], regions: list[int]) -> None:
        self.fds = fds
        self.regions = regions

    def run(self) -> None:
        """Raises OSError; it must not be retried, since the kernel forgets the error and the data."""
        for fd in self.fds:
            os.fdatasync(fd)


class TrackSync:
    """Makes a change of the tracked set durable: `run` in any thread, then `RegionMaps.finish_track`."""

    def __init__(self, directory: Path, added: dict[str, int], dropped: list[str]) -> None:
        self.directory = directory
        self.added = added
        self.dropped = dropped

    def run(self) -> None:
        """Raises OSError."""
        for name, fd in self.added.items():
            os.fsync(fd)
            os.replace(self.directory / f".{changes_map(name)}.tmp", self.directory / changes_map(name))
        for name in self.dropped:
            (self.directory / changes_map(name)).unlink(missing_ok=True)
        sync_directory(self.directory)


class Watcher(Protocol):
    """Who must know which regions may be written."""

    def entered(self, regions: Iterable[int]) -> int:
        """They will be written after the sync that begins now, which must include this descriptor (-1: none).

        Raises OSError."""
        ...

    def left(self, regions: Iterable[int]) -> None:
        """They are not written before they are entered again, and what they hold is on disk."""
        ...


class RegionMaps:
    def __init__(self, directory: Path, size: int) -> None:
        """Open the maps of a replica of `size` bytes. Raises StoreError, OSError."""
        self.directory = directory
        self.count = region_count(size)
        self._size = size
        self._closing: list[int] = []
        self._syncs = 0
        self._fresh: list[int] = []
        self._tracked: dict[str, _MapFile] = {}
        self.watcher: Watcher | None = None
        self._intent = self._open(INTENT_MAP)
        try:
            for name, file in sorted(list_changes(directory).items()):
                self._tracked[name] = self._open(file)
            # a bit that a killed process left in the page cache is there to be read, but not on disk yet
            for map_file in (self._intent, *self._tracked.values()):
                os.fdatasync(map_file.fd)
            self.regions = Regions(self.count, set_bits(self._intent.bits))
        except BaseException:
            self.close()
            raise

    def grow(self, size: int) -> None:
        """The files were extended (`extend_map`) to a volume of `size` bytes."""
        self._size, self.count = size, region_count(size)
        for file in (self._intent, *self._tracked.values()):
            file.bits.extend(bytes(_bitmap_size(self.count) - len(file.bits)))
        self.regions.grow(self.count)

    def _open(self, name: str) -> _MapFile:
        fd, bits, count = _open_map(self.directory / name)
        # a map larger than the volume is what an interrupted resize leaves
        bits = bits[: _bitmap_size(self.count)]
        if count < self.count or (bits and bits[-1] >> ((self.count - 1) % 8 + 1)):
            os.close(fd)
            raise FormatError(self.directory, f"{name} is damaged: it does not fit the volume's {self.count} regions")
        with contextlib.suppress(OSError):
            _fill_holes(fd)
        return _MapFile(fd, bits)

    def touch(self, offset: int, length: int, seq: int) -> bool:
        """Note that write `seq` is about to touch these bytes; False when it has to wait for a sync of the maps."""
        return self.regions.touch(offset >> REGION_SHIFT, (offset + length - 1) >> REGION_SHIFT, seq)

    def missing(self, offset: int, length: int) -> list[int]:
        """Regions whose intent bit is not known to be durable."""
        return self.regions.missing(offset >> REGION_SHIFT, (offset + length - 1) >> REGION_SHIFT)

    def mark(self, regions: Iterable[int]) -> None:
        """Set the bits of these regions, in memory until the next `begin`."""
        self._fresh += self.regions.mark(regions)

    def begin(self) -> MapSync:
        """Write what was marked, and return the sync that makes it durable. Raises OSError."""
        regions, self._fresh = self._fresh, []
        files = [self._intent, *self._tracked.values()]
        fds = [file.fd for file in files]
        if regions:
            for file in files:
                file.add(regions)
            if self.watcher is not None and (also := self.watcher.entered(regions)) >= 0:
                fds.append(also)
        self._syncs += 1
        return MapSync(fds, regions)

    def finish(self, sync: MapSync) -> None:
        """`sync.run` succeeded."""
        self.regions.confirm(sync.regions)
        self._release()

    def sync(self) -> None:
        """`begin`, `run` and `finish` in one, for callers without an event loop. Raises OSError."""
        sync = self.begin()
        sync.run()
        self.finish(sync)

    def settled(self, seq: int, inherited: bool) -> None:
        """All writes with a lower seq are flushed on every in-sync replica. Raises OSError."""
        self._clear(self.regions.settled(seq, inherited))

    def expire(self) -> None:
        """Clear settled bits that have been idle since. Raises OSError."""
        self._clear(self.regions.expire())

    def clear_settled_attachment(self) -> None:
        """A clean close; the head is synced. Inherited bits that nobody settled stay. Raises OSError."""
        self._clear(self.regions.clear_settled_attachment())

    def filling(self, on: bool) -> None:
        """Whether the replica is being rebuilt, so that `filled` counts."""
        self.regions.filling = {} if on else None

    def filled(self, offset: int, length: int, seq: int) -> None:
        """Request `seq` made these bytes what an in-sync replica has; its bits are needed until that is synced."""
        end = self.count if offset + length >= self._size else (offset + length) >> REGION_SHIFT
        self.regions.filled(-(-offset >> REGION_SHIFT), end, seq)

    def take_filled(self) -> dict[int, int]:
        """What was filled since the last call: the number of the last such request, by region."""
        return self.regions.take_filled()

    def fill_synced(self, taken: dict[int, int]) -> None:
        """That is on disk now: where nothing was written later, this replica is like its source. Raises OSError."""
        self._clear(self.regions.fill_synced(taken))

    def _clear(self, regions: list[int]) -> None:
        # never synced: a bit that is back after a crash costs a comparison, nothing else
        if regions:
            self._intent.clear(regions)
            if self.watcher is not None:
                self.watcher.left(regions)

    @property
    def tracked(self) -> tuple[str, ...]:
        return tuple(sorted(self._tracked))

    @property
    def dirty_regions(self) -> int:
        return self.regions.dirty

    def begin_track(self, names: Iterable[str]) -> TrackSync:
        """Keep maps for exactly these departed replicas, from now on; durable when the result has `run`.

        Raises StoreError for a name that cannot be one, OSError.
        """
        wanted = set(names)
        for name in sorted(wanted):
            if not valid_name(name):
                raise StoreError(self.directory, f"{name!r} cannot be the name of a replica")
        if len(wanted) > MAX_TRACKED:
            raise StoreError(self.directory, f"cannot track {len(wanted)} departed replicas, at most {MAX_TRACKED}")
        bits = bytearray(self.bitmap(""))
        added: dict[str, _MapFile] = {}
        try:
            for name in sorted(wanted - self._tracked.keys()):
                added[name] = _MapFile(
                    create_map(self.directory / f".{changes_map(name)}.tmp", self._size, bits), bits[:]
                )
        except OSError:
            for file in added.values():
                os.close(file.fd)
            raise
        dropped = sorted(self._tracked.keys() - wanted)
        self._tracked |= added
        self._syncs += 1
        return TrackSync(self.directory, {name: file.fd for name, file in added.items()}, dropped)

    def finish_track(self, change: TrackSync) -> None:
        """`change.run` succeeded."""
        # not before: a map that a crash leaves behind must be whole
        self._closing += [self._tracked.pop(name).fd for name in change.dropped]
        self._release()

    def track(self, names: Iterable[str]) -> None:
        """`begin_track`, `run` and `finish_track` in one. Raises StoreError, OSError."""
        change = self.begin_track(names)
        change.run()
        self.finish_track(change)

    def bitmap(self, name: str) -> bytes:
        """The bits of a tracked replica's map, or with "" the intent map. Raises KeyError."""
        file = self._tracked[name] if name else self._intent
        bits = bytearray(file.bits)
        for region in self._fresh:
            bits[region >> 3] |= 1 << (region & 7)
        return bytes(bits)

    def _release(self) -> None:
        self._syncs -= 1
        if not self._syncs:
            self._close_dropped()

    def _close_dropped(self) -> None:
        # a running MapSync may still hold them
        for fd in self._closing:
            os.close(fd)
        self._closing.clear()

    def close(self) -> None:
        self._close_dropped()
        for file in (self._intent, *self._tracked.values()):
            os.close(file.fd)
        self._tracked.clear()
