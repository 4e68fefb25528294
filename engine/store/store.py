"""One replica's data: its chain of images, its marks, its fencing token and its region maps. No trio, no sockets."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from engine.durable import sync_directory
from engine.errors import FormatError, OutOfRangeError, StoreError
from engine.store.chain import BLOCK, Chain
from engine.store.direct import Cache, open_direct
from engine.store.layout import (
    Identity,
    VolumeMeta,
    drop_reserve,
    lock_directory,
    make_reserve,
    read_chain,
    read_identity,
    read_volume_meta,
    store_errors,
    write_identity,
    write_volume_meta,
)
from engine.store.maps import RegionMaps, TrackSync
from engine.wire.frame import MAX_PAYLOAD, Buffer

_T = TypeVar("_T")

IoMode = Literal["direct", "buffered", "auto"]


class Store:
    """An open replica directory; this process holds its lock.

    `read`, `write` and `unmap` raise OutOfRangeError and OSError. A write must be admitted by `maps` first.
    """

    def __init__(
        self, directory: Path, lock: int, identity: Identity, meta: VolumeMeta, io: IoMode = "buffered"
    ) -> None:
        self.directory = directory
        self.identity = identity
        self.meta = meta
        self.size = meta.size
        self._lock = lock
        self._files: list[int] = []
        self._direct = -1
        self._cache: Cache | None = None
        try:
            with store_errors(directory, "open the replica"):
                # what a killed process renamed is seen here, but must be on disk before anybody relies on it
                sync_directory(directory)
                for leftover in directory.glob(".*.tmp"):
                    leftover.unlink()
                self.chain = read_chain(directory, meta.head)
                self._open_images()
                if io != "buffered":
                    self._open_direct(io)
                self.maps = RegionMaps(directory, meta.size)
            with contextlib.suppress(OSError):
                make_reserve(directory)
        except BaseException:
            self._close_files()
            raise
        self._head = self._files[-1]
        self._chain = Chain(self._files, meta.size)

    @classmethod
    def open(cls, directory: Path, io: IoMode = "buffered") -> Store:
        """Raises StoreError, also when another process has the directory open; FormatError for a newer format.

        `io`: "direct" makes everything go past the page cache, "auto" reads that would have to wait for the disk.
        """
        lock = lock_directory(directory)
        try:
            identity, meta = read_identity(directory), read_volume_meta(directory)
        except BaseException:
            os.close(lock)
            raise
        return cls(directory, lock, identity, meta, io)

    def _open_images(self) -> None:
        for image in reversed(self.chain):
            mode = os.O_RDWR if image == self.meta.head else os.O_RDONLY
            try:
                self._files.append(os.open(self.directory / image, mode | os.O_CLOEXEC))
            except FileNotFoundError:
                raise FormatError(self.directory, f"{image} is missing") from None
        found = os.fstat(self._files[-1]).st_size
        if found < self.size:
            raise FormatError(
                self.directory, f"{self.meta.head} has {found} bytes, volume.meta says {self.size}: it was truncated"
            )
        unit = os.fstatvfs(self._files[-1]).f_bsize
        if len(self._files) > 1 and unit > BLOCK:
            # a write of one block would look, to SEEK_DATA, as if the head held its neighbours too
            raise StoreError(self.directory, f"snapshots need a file system with blocks of {BLOCK} bytes, not {unit}")

    @property
    def token(self) -> tuple[int, int]:
        """Highest (epoch, incarnation) ever seen."""
        return self.identity.epoch, self.identity.incarnation

    def _open_direct(self, io: IoMode) -> None:
        if io == "auto":
            try:
                self._cache = Cache(self._files[-1], MAX_PAYLOAD)
            except OSError:
                return
        self._direct = open_direct(self.directory / self.meta.head, insist=io == "direct")

    @property
    def cache(self) -> Cache | None:
        """Where to look before a read through `direct`; writes go to the page cache too then, by `write`."""
        return self._cache

    @property
    def direct(self) -> int:
        """An O_DIRECT descriptor of the head when the head alone holds the data, else -1: use `read` and `write`.

        Requests through it bypass this object, so nothing may change the chain before they have completed.
        """
        return self._direct if len(self._files) == 1 else -1

    @property
    def allocated(self) -> int:
        """Bytes that the images occupy on disk."""
        return sum(os.fstat(fd).st_blocks * 512 for fd in self._files)

    def read(self, offset: int, length: int) -> Buffer:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise OutOfRangeError(offset, length, self.size)
        return self._chain.read(offset, length)

    def write(self, offset: int, data: Buffer) -> None:
        if offset < 0 or offset + len(data) > self.size:
            raise OutOfRangeError(offset, len(data), self.size)
        self._chain.write(offset, data)

    def unmap(self, offset: int, length: int) -> None:
        """Zero the range, giving its space back where no snapshot lies below."""
        if offset < 0 or length <= 0 or offset + length > self.size:
            raise OutOfRangeError(offset, length, self.size)
        self._chain.unmap(offset, length)

    def sync(self) -> None:
        """fdatasync of the head, from any thread. Raises OSError; it must not be retried."""
        os.fdatasync(self._head)

    def set_token(self, epoch: int, incarnation: int) -> None:
        """Durably. Raises OSError; ValueError for one that is lower than the highest seen."""
        if (epoch, incarnation) < self.token:
            raise ValueError(f"token {epoch}.{incarnation} is lower than {self.token}")
        if (epoch, incarnation) != self.token:
            identity = msgspec.structs.replace(self.identity, epoch=epoch, incarnation=incarnation)
            self._metadata(lambda: write_identity(self.directory, identity))
            self.identity = identity

    def set_marks(self, *, dirty: bool | None = None, rebuilding: bool | None = None) -> None:
        """Durably; None leaves a mark as it is. Raises OSError."""
        meta = msgspec.structs.replace(
            self.meta,
            dirty=self.meta.dirty if dirty is None else dirty,
            rebuilding=self.meta.rebuilding if rebuilding is None else rebuilding,
        )
        if meta != self.meta:
            self._metadata(lambda: write_volume_meta(self.directory, meta))
            self.meta = meta

    def begin_track(self, names: Iterable[str]) -> TrackSync:
        """See `RegionMaps.begin_track`."""
        return self._metadata(lambda: self.maps.begin_track(names))

    def _metadata(self, write: Callable[[], _T]) -> _T:
        """On a full disk metadata takes the room of the reserve: a full volume must still attach, to be emptied."""
        try:
            return write()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not drop_reserve(self.directory):
                raise
        done = write()
        with contextlib.suppress(OSError):
            make_reserve(self.directory)
        return done

    def close(self) -> None:
        """Let go of the directory, as it is: syncs nothing, clears nothing."""
        self.maps.close()
        self._close_files()

    def _close_files(self) -> None:
        for fd in (*self._files, self._lock):
            os.close(fd)
        self._files.clear()
        if self._direct >= 0:
            os.close(self._direct)
            self._direct = -1
