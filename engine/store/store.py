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
from engine.errors import (
    FormatError,
    OutOfRangeError,
    SnapshotExistsError,
    SnapshotInUseError,
    SnapshotNotFoundError,
    StoreError,
)
from engine.store.chain import BLOCK, Chain
from engine.store.coalesce import CoalesceStep, Merge
from engine.store.direct import Cache, open_direct
from engine.store.layout import (
    MAX_SNAPSHOTS,
    Identity,
    ImageMeta,
    VolumeMeta,
    drop_reserve,
    lock_directory,
    make_reserve,
    read_chain,
    read_identity,
    read_volume_meta,
    store_errors,
    write_identity,
    write_image_meta,
    write_volume_meta,
)
from engine.store.maps import RegionMaps, TrackSync
from engine.store.snapshots import (
    SnapshotInfo,
    check_new,
    clean_leftovers,
    describe,
    now,
    read_snapshots,
    snapshot_image,
    snapshot_name,
)
from engine.store.switch import HeadSwitch, freeze
from engine.store.views import Views
from engine.wire.frame import MAX_PAYLOAD, Buffer

_T = TypeVar("_T")

IoMode = Literal["direct", "buffered", "auto"]


class Store:
    """An open replica directory; this process holds its lock.

    `read`, `write` and `unmap` raise OutOfRangeError and OSError. A write must be admitted by `maps` first.

    A change of the chain has three parts: `begin_*` decides, `run` of its result does the disk's work in any thread,
    `finish_*` makes the store use it. One change at a time; a head switch needs a store that nobody writes to. Both
    `begin_*` raise StoreError for what cannot be done.
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
                clean_leftovers(directory, self.chain)
                self._snapshots = read_snapshots(directory, self.chain[1:])
                if io != "buffered" and len(self._files) == 1:
                    self._open_direct(io)
                self.maps = RegionMaps(directory, meta.size)
            with contextlib.suppress(OSError):
                make_reserve(directory)
        except BaseException:
            self._close_files()
            raise
        self._head = self._files[-1]
        self._chain = Chain(self._files, meta.size)
        self._views = Views(directory)
        self._merge: Merge | None = None

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
        if len(self._files) > 1:
            self._check_unit()

    def _check_unit(self) -> None:
        unit = os.fstatvfs(self._files[-1]).f_bsize
        if unit > BLOCK:
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
        if self._direct < 0:
            self._cache = None

    @property
    def cache(self) -> Cache | None:
        """Where to look before a read through `direct`; writes go to the page cache too then, by `write`."""
        return self._cache

    @property
    def direct(self) -> int:
        """An O_DIRECT descriptor of the head when the head alone holds the data, else -1: use `read` and `write`.

        Requests through it bypass this object, so nothing may change the chain before they have completed. A new head
        has none before the replica is opened anew.
        """
        return self._direct

    @property
    def allocated(self) -> int:
        """Bytes that the images occupy on disk."""
        return sum(os.fstat(fd).st_blocks * 512 for fd in self._files)

    def read(self, offset: int, length: int) -> bytes:
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

    # snapshots

    def list_snapshots(self) -> list[SnapshotInfo]:
        """The live ones first, the oldest first; then those that a revert left aside, parents first.

        From any thread, while the chain does not change. Raises OSError.
        """
        return describe(self.directory, self._snapshots, self.chain)

    def read_snapshot(self, name: str, offset: int, length: int) -> bytes:
        """Read the volume as it was; from any thread, at any time.

        Raises OutOfRangeError, StoreError (also for one that is marked as removed), OSError.
        """
        if offset < 0 or length < 0 or offset + length > self.size:
            raise OutOfRangeError(offset, length, self.size)
        return self._views.read(snapshot_image(name), offset, length, self.size, lambda: self._usable(name))

    def begin_snapshot(
        self, name: str, *, user_created: bool = True, labels: dict[str, str] | None = None, created: str = ""
    ) -> HeadSwitch:
        """Freeze the head as snapshot `name`. Sync it before `run`: what is in a snapshot must be on disk.

        `created` is a time in UTC as RFC 3339 writes it, by default now. Raises SnapshotExistsError also for a
        snapshot that is marked as removed and not gone yet.
        """
        created = created or now()
        check_new(self.directory, name, created, labels or {})
        image = snapshot_image(name)
        if image in self._snapshots:
            raise SnapshotExistsError(self.directory, name)
        if len(self._snapshots) >= MAX_SNAPSHOTS:
            raise StoreError(
                self.directory,
                f"it has {MAX_SNAPSHOTS} snapshots, those included that are marked as removed, and cannot have more: "
                "remove some and let them be merged",
            )
        self._check_unit()
        frozen = freeze(
            self.directory, self.meta.head, image, created=created, user_created=user_created, labels=labels or {}
        )
        return self._switch(parent=image, frozen=frozen, layers=(), created=created)

    def begin_revert(self, name: str, *, created: str = "") -> HeadSwitch:
        """Throw the head away, for a new one on top of snapshot `name`. Snapshots above that stay, aside."""
        self._usable(name)
        self._check_unit()
        image = snapshot_image(name)
        layers = read_chain(self.directory, image)
        return self._switch(parent=image, frozen=None, layers=layers, created=created or now())

    def _switch(self, *, parent: str, frozen: ImageMeta | None, layers: tuple[str, ...], created: str) -> HeadSwitch:
        return HeadSwitch(
            self.directory,
            self.meta,
            parent=parent,
            frozen=frozen,
            layers=layers,
            created=created,
            metadata=self._metadata,
        )

    def finish_switch(self, change: HeadSwitch) -> None:
        """`change.run` succeeded, and nothing is under way through `direct`; `change.release` comes after this."""
        if self._direct >= 0:
            change.replaced.append(self._direct)
        self._direct, self._cache = -1, None  # both are of the old head
        self.meta = change.meta
        if change.frozen is not None:
            self._snapshots[change.frozen.name] = change.frozen
            self.chain = (change.meta.head, change.frozen.name, *self.chain[1:])
            self._files += change.files
            self._chain.push(change.files[-1])
        else:
            self._drop_merge()
            change.replaced += self._files
            self._files = change.files
            self.chain = (change.meta.head, *change.layers)
            self._chain = Chain(self._files, self.size)
        self._head = self._files[-1]

    def snapshot(
        self, name: str, *, user_created: bool = True, labels: dict[str, str] | None = None, created: str = ""
    ) -> None:
        """`begin_snapshot`, the sync of the head, `run` and `finish_switch` in one. Raises StoreError, OSError."""
        change = self.begin_snapshot(name, user_created=user_created, labels=labels, created=created)
        self.sync()
        change.run()
        self.finish_switch(change)
        change.release()

    def revert(self, name: str, *, created: str = "") -> None:
        """`begin_revert`, `run` and `finish_switch` in one. Raises StoreError, OSError."""
        change = self.begin_revert(name, created=created)
        change.run()
        self.finish_switch(change)
        change.release()

    def mark_removed(self, name: str) -> None:
        """Durably; from any thread. Its data goes with `coalesce`. Raises StoreError, OSError."""
        meta = self._snapshot(name)
        if not meta.removed:
            meta = msgspec.structs.replace(meta, removed=True)
            self._metadata(lambda: write_image_meta(self.directory, meta))
            self._snapshots[meta.name] = meta

    def begin_coalesce(self, name: str, budget: int) -> CoalesceStep:
        """The next step of getting rid of a removed snapshot, which copies about `budget` bytes.

        Raises SnapshotInUseError while the head or several images build on it, StoreError, OSError.
        """
        meta = self._snapshot(name)
        if not meta.removed:
            raise SnapshotInUseError(self.directory, f"snapshot {name!r} is not marked as removed")
        children = [image for image, other in self._snapshots.items() if other.parent == meta.name]
        if self.chain[1:2] == (meta.name,):
            raise SnapshotInUseError(self.directory, f"the head builds on snapshot {name!r}: take another one first")
        if len(children) > 1:
            names = ", ".join(sorted(map(snapshot_name, children)))
            raise SnapshotInUseError(self.directory, f"several snapshots build on {name!r}: {names}")
        child = children[0] if children else ""
        if self._merge is None or (self._merge.removed, self._merge.child) != (meta.name, child):
            self._drop_merge()
            self._merge = Merge(self.directory, meta.name, child)
        return CoalesceStep(self._merge, self._views, budget, self._metadata)

    def finish_coalesce(self, step: CoalesceStep) -> bool:
        """`step.run` succeeded; True when the snapshot is gone."""
        merge = step.merge
        # counted from the oldest, which is 1; of what is aside the head's index knows nothing
        level = len(self.chain) - self.chain.index(merge.removed) if merge.removed in self.chain else 0
        if not step.done:
            merge.cursor = step.end
            if level:
                self._chain.moved(level, step.end)
            return False
        self._drop_merge()
        gone = self._snapshots.pop(merge.removed)
        if merge.child:
            child = self._snapshots[merge.child]
            self._snapshots[merge.child] = msgspec.structs.replace(child, parent=gone.parent)
        if level:
            self.chain = tuple(image for image in self.chain if image != merge.removed)
            self._chain.merged(level)
            os.close(self._files.pop(level))
        return True

    def coalesce_step(self, name: str, budget: int) -> bool:
        """`begin_coalesce`, `run` and `finish_coalesce` in one. Raises StoreError, OSError."""
        step = self.begin_coalesce(name, budget)
        step.run()
        return self.finish_coalesce(step)

    def coalesce(self, name: str) -> None:
        """Get rid of a removed snapshot, whatever it takes. Raises StoreError, OSError."""
        while not self.coalesce_step(name, 64 << 20):
            pass

    def _drop_merge(self) -> None:
        if self._merge is not None:
            self._merge.close()
            self._merge = None
            self._chain.forget_moved()

    def _snapshot(self, name: str) -> ImageMeta:
        try:
            return self._snapshots[snapshot_image(name)]
        except KeyError:
            raise SnapshotNotFoundError(self.directory, name) from None

    def _usable(self, name: str) -> None:
        if self._snapshot(name).removed:
            raise SnapshotInUseError(self.directory, f"snapshot {name!r} is marked as removed")

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
        self._views.close()
        self._drop_merge()
        self._close_files()

    def _close_files(self) -> None:
        for fd in (*self._files, self._lock):
            os.close(fd)
        self._files.clear()
        if self._direct >= 0:
            os.close(self._direct)
            self._direct = -1
