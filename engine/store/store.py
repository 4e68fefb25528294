"""One replica's data: its chain of images, its marks, its fencing token and its region maps. No trio, no sockets."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import msgspec
from crc32c import crc32c

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
from engine.store.clone import Pull, PullStep, read_origin
from engine.store.coalesce import CoalesceStep, Merge
from engine.store.digest import DigestStep, MendStep
from engine.store.direct import Cache, open_direct
from engine.store.layout import (
    MAX_SNAPSHOTS,
    SNAPSHOT_IMAGE,
    Identity,
    ImageMeta,
    VolumeMeta,
    drop_reserve,
    lock_directory,
    make_reserve,
    read_chain,
    read_identity,
    read_image_meta,
    read_volume_meta,
    store_errors,
    write_identity,
    write_image_meta,
    write_volume_meta,
)
from engine.store.maps import RegionMaps, TrackSync
from engine.store.rebuild import (
    RebuildStart,
    RebuildState,
    forget_rebuild,
    plan_rebuild,
    read_extents,
    read_rebuild,
    write_extents,
    write_rebuild,
)
from engine.store.regions import REGION_SHIFT
from engine.store.resize import Growth
from engine.store.sharing import shared
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
from engine.store.summing import Summing, SumStep
from engine.store.sums import Records, Sums
from engine.store.switch import HeadSwitch, freeze
from engine.store.views import Views
from engine.wire.frame import MAX_PAYLOAD, Buffer

_T = TypeVar("_T")

IoMode = Literal["direct", "buffered", "auto"]

REST_SECONDS = 60.0


class Store:
    """An open replica directory; this process holds its lock.

    `read`, `write` and `unmap` raise OutOfRangeError and OSError. A write must be admitted by `maps` first.

    A change of the chain has three parts: `begin_*` decides, `run` of its result does the disk's work in any thread,
    `finish_*` makes the store use it. One change at a time; a head switch needs a store that nobody writes to. Both
    `begin_*` raise StoreError for what cannot be done.
    """

    def __init__(
        self,
        directory: Path,
        lock: int,
        identity: Identity,
        meta: VolumeMeta,
        io: IoMode = "buffered",
        rest: float = REST_SECONDS,
    ) -> None:
        self.directory = directory
        self.identity = identity
        self.meta = meta
        self.size = meta.size
        self._lock = lock
        self._files: list[int] = []
        self._io: IoMode = io
        # An O_DIRECT descriptor of the head when the head alone holds the data, else -1. Requests through it bypass
        # this object, so nothing may change the chain before they have completed. A new head has none before the
        # replica is opened anew.
        self.direct = -1
        # where to look before a read through `direct`; writes go to the page cache too then
        self.cache: Cache | None = None
        self._unsynced: set[str] = set()  # images of snapshots that were filled
        self._sums: dict[str, Sums] = {}
        self._records = Records()
        try:
            with store_errors(directory, "open the replica"):
                # what a killed process renamed is seen here, but must be on disk before anybody relies on it
                sync_directory(directory)
                for leftover in directory.glob(".*.tmp"):
                    leftover.unlink()
                self.chain = read_chain(directory, meta.head)
                self._open_images()
                clean_leftovers(directory, self.chain)
                self.origin = read_origin(directory)
                self._snapshots = read_snapshots(directory, self.chain[1:])
                self.rebuild = read_rebuild(directory) if meta.rebuilding else None
                if io != "buffered" and len(self._files) == 1:
                    self._open_direct(io)
                self.maps = RegionMaps(directory, meta.size)
                self._open_sums(rest)
            with contextlib.suppress(OSError):
                make_reserve(directory)
        except BaseException:
            self._close_files()
            raise
        # to be synced; every head switch makes it another one
        self.head = self._files[-1]
        self.content = Chain(self._files, meta.size, sums=self._chain_sums())
        self._views = Views(directory, self._sums_of)
        self._merge: Merge | None = None
        self._pull: Pull | None = None

    @classmethod
    def open(cls, directory: Path, io: IoMode = "buffered", rest: float = REST_SECONDS) -> Store:
        """Raises StoreError, also when another process has the directory open; FormatError for a newer format.

        `io`: "direct" makes everything go past the page cache, "auto" reads that would have to wait for the disk.
        A region of the head gets checksums when it has been left alone for `rest` seconds.
        """
        lock = lock_directory(directory)
        try:
            identity, meta = read_identity(directory), read_volume_meta(directory)
        except BaseException:
            os.close(lock)
            raise
        return cls(directory, lock, identity, meta, io, rest)

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

    def _open_sums(self, rest: float) -> None:
        for image in self._snapshots:
            self._sums_of(image)
        head = self._sums_of(self.meta.head)
        # an intent bit may be back whose clearing was not on disk; and what a killed process took back must be
        head.forget(self.maps.regions.dirty_regions())
        head.sync()
        self.summing = Summing(self.maps.regions, head, rest)
        self.maps.watcher = self.summing

    def _sums_of(self, image: str) -> Sums:
        sums = self._sums.get(image)
        if sums is None:
            sums = self._sums[image] = Sums(self.directory, image, self._records)
        return sums

    def _chain_sums(self) -> list[Sums]:
        return [self._sums_of(image) for image in reversed(self.chain)]

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
        """Raises OSError."""
        if io == "auto":
            try:
                self.cache = Cache(self._files[-1], MAX_PAYLOAD)
            except OSError:
                return
        self.direct = open_direct(self.directory / self.meta.head, insist=io == "direct")
        if self.direct < 0:
            self.cache = None

    @property
    def allocated(self) -> int:
        """Bytes that the images occupy on disk."""
        return sum(os.fstat(fd).st_blocks * 512 for fd in self._files)

    @property
    def head_allocated(self) -> int:
        """Bytes that the head occupies on disk."""
        return os.fstat(self.head).st_blocks * 512

    def read(self, offset: int, length: int) -> bytes:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise OutOfRangeError(offset, length, self.size)
        return self.content.read(offset, length)

    def read_checked(self, offset: int, length: int) -> tuple[bytes, int]:
        """The bytes, whose range the caller has checked, and their CRC-32C.

        Raises CorruptBlockError for what does not match the checksums, OSError.
        """
        return self.content.read_checked(offset, length)

    def checked(self, offset: int, data: bytes) -> int:
        """CRC-32C of `data`, which was read from the head otherwise, while it holds all. Raises CorruptBlockError."""
        if (offset | len(data)) & (BLOCK - 1):
            return self.content.read_checked(offset, len(data))[1]
        crc: int = crc32c(data)
        head = self.content.sums[0]
        bad = head.check(offset, data, crc)
        if bad >= 0:
            raise head.corrupt(bad)
        return crc

    def write(self, offset: int, data: Buffer) -> None:
        if offset < 0 or offset + len(data) > self.size:
            raise OutOfRangeError(offset, len(data), self.size)
        self.content.write(offset, data)

    def unmap(self, offset: int, length: int) -> None:
        """Zero the range, giving its space back where no snapshot lies below."""
        if offset < 0 or length <= 0 or offset + length > self.size:
            raise OutOfRangeError(offset, length, self.size)
        self.content.unmap(offset, length)

    def sync(self) -> None:
        """fdatasync of the head, from any thread. Raises OSError; it must not be retried."""
        os.fdatasync(self.head)

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
        if meta == self.meta:
            return
        if meta.rebuilding and not self.meta.rebuilding:
            # what is left of an earlier rebuild says nothing of this one
            forget_rebuild(self.directory)
        self._metadata(lambda: write_volume_meta(self.directory, meta))
        self.meta = meta
        if not meta.rebuilding and self.rebuild is not None:
            self.rebuild = None
            self.maps.filling(False)
            forget_rebuild(self.directory)

    def begin_resize(self, size: int) -> Growth:
        """Grow to `size` bytes. Raises StoreError when it is larger already."""
        return Growth(self.directory, self.meta, size, self._metadata)

    def finish_resize(self, change: Growth) -> None:
        """`change.run` succeeded."""
        self.meta = change.meta
        self.size = self.content.size = change.meta.size
        self.maps.grow(self.size)

    def resize(self, size: int) -> None:
        """`begin_resize`, `run` and `finish_resize` in one. Raises StoreError, OSError."""
        change = self.begin_resize(size)
        change.run()
        self.finish_resize(change)

    # snapshots

    def list_snapshots(self) -> list[SnapshotInfo]:
        """The live ones first, the oldest first; then those that a revert left aside, parents first.

        From any thread, while the chain does not change. Raises OSError.
        """
        ours = shared(self.directory, self._snapshots)

        def pinned(image: str) -> bool:
            child = next((other.name for other in self._snapshots.values() if other.parent == image), "")
            return image in ours or child in ours or image in self._inherited

        return describe(self.directory, self._snapshots, self.chain, pinned)

    @property
    def _inherited(self) -> tuple[str, ...]:
        """The images that a clone begins with, until it is independent."""
        return (self.origin.image, *self.origin.below) if self.origin is not None else ()

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
        if self.direct >= 0:
            change.replaced.append(self.direct)
        self.direct, self.cache = -1, None  # both are of the old head
        sums = self._sums.pop(self.meta.head)
        self.meta = change.meta
        if change.frozen is not None:
            self._snapshots[change.frozen.name] = change.frozen
            self.chain = (change.meta.head, change.frozen.name, *self.chain[1:])
            self._files += change.files
            self.content.push(change.files[-1])
            sums.image = change.frozen.name
            self._sums[sums.image] = sums
            self.content.sums = self._chain_sums()
        else:
            self._drop_merge()
            if self._pull is not None:
                self._pull.switched = False
            sums.close()
            change.replaced += self._files
            self._files = change.files
            self.chain = (change.meta.head, *change.layers)
            self.content = Chain(self._files, self.size, sums=self._chain_sums())
        self.head = self._files[-1]
        self.summing.switched(self._sums_of(self.meta.head))

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
            # from what is on disk: while a pulled base has not taken its place there, it still has what lies below it
            found = read_image_meta(self.directory, meta.name)
            self._metadata(lambda: write_image_meta(self.directory, msgspec.structs.replace(found, removed=True)))
            self._snapshots[meta.name] = msgspec.structs.replace(meta, removed=True)

    def begin_coalesce(self, name: str, budget: int) -> CoalesceStep:
        """The next step of getting rid of a removed snapshot, which copies about `budget` bytes.

        Raises SnapshotInUseError while the head or several images build on it, StoreError, OSError.
        """
        meta = self._snapshot(name)
        if not meta.removed:
            raise SnapshotInUseError(self.directory, f"snapshot {name!r} is not marked as removed")
        if meta.name in self._inherited:
            raise SnapshotInUseError(self.directory, f"snapshot {name!r} is shared until the clone is independent")
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
            for image in filter(None, (meta.name, child)):
                self._sums_of(image).drop()
        return CoalesceStep(self._merge, self._views, budget, self._metadata)

    def finish_coalesce(self, step: CoalesceStep) -> bool:
        """`step.run` succeeded; True when the snapshot is gone."""
        merge = step.merge
        # counted from the oldest, which is 1; of what is aside the head's index knows nothing
        level = len(self.chain) - self.chain.index(merge.removed) if merge.removed in self.chain else 0
        if not step.done:
            merge.cursor = step.end
            if level:
                self.content.moved(level, step.end)
            return False
        self._drop_merge()
        gone = self._snapshots.pop(merge.removed)
        self._sums.pop(merge.removed).close()
        if merge.child:
            # the merged file, of which nothing is known yet
            self._sums_of(merge.child).close()
            self.summing.again(merge.child)
            child = self._snapshots[merge.child]
            self._snapshots[merge.child] = msgspec.structs.replace(child, parent=gone.parent)
        if level:
            self.chain = tuple(image for image in self.chain if image != merge.removed)
            self.content.merged(level)
            os.close(self._files.pop(level))
        self.content.sums = self._chain_sums()
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

    def begin_pull(self, budget: int, *, finish: bool = True) -> PullStep | None:
        """The next step of making a clone independent, which copies about `budget` bytes; None when it is.

        Without `finish` nothing but copying is done.
        """
        if self.origin is None:
            return None
        if self._pull is None:
            self._pull = Pull(self.directory, self.origin)
        return PullStep(self._pull, self._views, budget, self._metadata, finish=finish)

    def finish_pull(self, step: PullStep) -> bool:
        """`step.run` succeeded; True when the clone is independent. Raises OSError."""
        pull = step.pull
        if step.done:
            pull.close()
            self._pull = self.origin = None
            return True
        self.origin = pull.origin
        if pull.complete and step.finish and not pull.switched:
            self._switch_base(pull)
        return False

    def _switch_base(self, pull: Pull) -> None:
        """From here on nothing that is shared is read, so that it can be let go of."""
        base, above = pull.origin.image, self.chain.index(pull.origin.image)
        file = os.dup(pull.file)
        self._drop_merge()
        depth = len(self.chain) - above
        replaced, self._files[:depth] = self._files[:depth], [file]
        self.chain = self.chain[: above + 1]
        for image in pull.origin.below:
            self._snapshots.pop(image, None)
        self._snapshots[base] = msgspec.structs.replace(self._snapshots[base], parent="")
        for image in (base, *pull.origin.below):
            if image in self._sums:
                self._sums.pop(image).close()
        self.content = Chain(self._files, self.size, sums=self._chain_sums())
        for fd in replaced:
            os.close(fd)
        pull.switched = True

    def pull(self) -> None:
        """Make a clone independent, whatever it takes. Raises StoreError, OSError."""
        while (step := self.begin_pull(64 << 20)) is not None:
            step.run()
            self.finish_pull(step)

    def _drop_pull(self) -> None:
        if self._pull is not None:
            self._pull.close()
            self._pull = None

    def _drop_merge(self) -> None:
        if self._merge is not None:
            self._merge.close()
            self._merge = None
            self.content.forget_moved()

    # checksums

    def begin_sums(self, budget: int) -> SumStep | None:
        """The next step of making checksums, for at most `budget` regions; None when there is nothing to do now.

        `run` in any thread, then `finish_sums`; no change of the chain meanwhile. Raises OSError.
        """
        if self.meta.rebuilding or self.origin is not None:
            # images are written below the head, or are about to be exchanged
            return None
        return self.summing.begin(budget, self._to_sum)

    def _to_sum(self) -> Iterator[tuple[Sums, int]]:
        yield self._sums_of(self.meta.head), self.head
        merging = () if self._merge is None else (self._merge.removed, self._merge.child)
        for image, fd in zip(self.chain[1:], self._files[-2::-1], strict=True):
            if image not in merging and not self._snapshots[image].removed:
                yield self._sums_of(image), fd

    def finish_sums(self, step: SumStep, *, failed: bool = False) -> None:
        """`step.run` succeeded, or `failed`. Raises OSError."""
        if failed:
            self.summing.abandon(step)
        else:
            self.summing.finish(step)

    def make_sums(self) -> None:
        """All that are due. Raises OSError."""
        while (step := self.begin_sums(8)) is not None:
            step.run()
            self.finish_sums(step)

    def begin_digest(self, snapshot: str, offset: int, length: int, *, everything: bool) -> DigestStep:
        """What the disk has of the volume, or of a snapshot, where its own image holds something.

        With `everything` also where it does not. Raises OutOfRangeError, StoreError.
        """
        if offset < 0 or length <= 0 or offset + length > self.size:
            raise OutOfRangeError(offset, length, self.size)
        if offset % BLOCK or ((offset + length) % BLOCK and offset + length != self.size):
            raise StoreError(self.directory, f"a digest is of whole blocks, not of {offset}+{length}")
        if offset >> REGION_SHIFT != (offset + length - 1) >> REGION_SHIFT:
            raise StoreError(self.directory, f"a digest is of one region, not of {offset}+{length}")
        chain = self.chain
        if snapshot:
            self._usable(snapshot)
            chain = read_chain(self.directory, snapshot_image(snapshot))
        images = [self._sums_of(image) for image in reversed(chain)]
        return DigestStep(self.directory, images, self.size, offset, length, everything)

    def begin_mend(self, snapshot: str, offset: int, data: bytes, *, force: bool) -> MendStep:
        """Put blocks of the head (`snapshot` empty) or of a snapshot's own image back as they were.

        They must be what the checksums remember, except for a snapshot's with `force`. The head's may be written by
        nobody else meanwhile. Raises OutOfRangeError, StoreError (CorruptBlockError), OSError.
        """
        if offset < 0 or not data or offset + len(data) > self.size:
            raise OutOfRangeError(offset, len(data), self.size)
        if (offset | len(data)) % BLOCK:
            raise StoreError(self.directory, f"only whole blocks are put back, not {offset}+{len(data)}")
        image = self.meta.head
        if snapshot:
            self._usable(snapshot)
            image = snapshot_image(snapshot)
            if self._merge is not None and self._merge.child == image:
                raise SnapshotInUseError(self.directory, f"snapshot {snapshot!r} is being merged")
            self.summing.again(image)
        return MendStep(self.directory, self._sums_of(image), offset, data, force=force and bool(snapshot))

    def finish_mend(self, step: MendStep) -> None:
        """`step.run` succeeded."""
        self.content.changed(step.start, step.end - step.start)
        self._views.forget(step.start, step.end)

    @property
    def summed(self) -> int:
        """Regions that have checksums, of all images."""
        return sum(sums.regions for sums in self._sums.values())

    def _snapshot(self, name: str) -> ImageMeta:
        try:
            return self._snapshots[snapshot_image(name)]
        except KeyError:
            raise SnapshotNotFoundError(self.directory, name) from None

    def _usable(self, name: str) -> None:
        if self._snapshot(name).removed:
            raise SnapshotInUseError(self.directory, f"snapshot {name!r} is marked as removed")

    # filling from another replica

    def read_layer(self, name: str, offset: int, length: int) -> tuple[list[tuple[int, int]], bytes, int]:
        """What the image of a snapshot, or with an empty name the head, itself holds in a range of whole blocks.

        Extents relative to `offset`, their data, and the length of the range, which is longer than asked for when
        nothing is there. From any thread. Raises StoreError (CorruptBlockError), OSError.
        """
        fd = self._layer(name, os.O_RDONLY)
        sums = self._sums_of(snapshot_image(name) if name else self.meta.head)
        try:
            found, data, covered = read_extents(fd, offset, length)
        finally:
            os.close(fd)
        at = 0
        for start, size in found:
            part = data[at : at + size]
            at += size
            bad = sums.check(offset + start, part, crc32c(part))
            if bad >= 0:
                raise sums.corrupt(bad)
        return found, data, covered

    def _layer(self, name: str, mode: int) -> int:
        if not name:
            return os.dup(self.head)
        self._snapshot(name)
        return os.open(self.directory / snapshot_image(name), mode | os.O_CLOEXEC)

    def write_head(self, offset: int, length: int, found: Sequence[tuple[int, int]], data: Buffer) -> None:
        """Make a range of whole blocks of the head exactly so: what is no extent is a hole, and shows what lies below.

        From any thread, while nothing else is done in that range; `changed` is to be called afterwards. The maps
        admitted it. Raises OutOfRangeError, OSError.
        """
        if offset < 0 or length <= 0 or offset + length > self.size:
            raise OutOfRangeError(offset, length, self.size)
        write_extents(self.head, offset, length, found, data)

    def write_layer(self, name: str, offset: int, length: int, found: Sequence[tuple[int, int]], data: Buffer) -> None:
        """The same for the image of a snapshot of a replica that is rebuilt. Raises StoreError, OSError."""
        if self.rebuild is None:
            raise StoreError(self.directory, "it is not being rebuilt, so no snapshot may be written")
        size = self._layer_size(name)
        if offset < 0 or length <= 0 or offset + length > size + -size % BLOCK:
            raise StoreError(self.directory, f"{offset}+{length} is outside snapshot {name!r} of {size} bytes")
        if shared(self.directory, (snapshot_image(name),)):
            # what is another volume's too is kept by a rebuild as it is, or made anew
            raise SnapshotInUseError(self.directory, f"snapshot {name!r} shares its data and is not written to")
        fd = self._layer(name, os.O_RDWR)
        try:
            write_extents(fd, offset, length, found, data)
        finally:
            # afterwards: a sync that runs meanwhile may miss it
            self._unsynced.add(name)
            os.close(fd)

    def _layer_size(self, name: str) -> int:
        assert self.rebuild is not None
        for layer in self.rebuild.layers:
            if layer.name == name:
                return layer.size
        raise SnapshotNotFoundError(self.directory, name)

    def changed(self, offset: int, length: int) -> None:
        """After `write_head` or `write_layer`, where the store is used."""
        if len(self._files) > 1:
            self.content.changed(offset, length)

    def begin_rebuild(self, wanted: Sequence[SnapshotInfo]) -> RebuildStart:
        """Become a replica with these snapshots, to be filled; `wanted` lists parents first. Raises StoreError.

        The mark `rebuilding` is set. What is there already stays: see `plan_rebuild`.
        """
        if not self.meta.rebuilding:
            raise StoreError(self.directory, "it is not marked as rebuilding")
        if wanted:
            self._check_unit()
        if len(wanted) > MAX_SNAPSHOTS:
            raise StoreError(self.directory, f"a replica cannot have {len(wanted)} snapshots, at most {MAX_SNAPSHOTS}")
        for info in wanted:
            # those of a directory that Longhorn made have other names and times than we would give
            if not SNAPSHOT_IMAGE.fullmatch(snapshot_image(info.name)):
                raise StoreError(self.directory, f"{info.name!r} cannot be the name of a snapshot")
        kept = plan_rebuild(wanted, self._snapshots, self.meta, self.rebuild)
        return RebuildStart(self.directory, self.meta, wanted, kept, now(), self._metadata)

    def finish_rebuild(self, change: RebuildStart) -> None:
        """`change.run` succeeded; `change.release` comes after this. Raises OSError."""
        self._drop_merge()
        self._drop_pull()
        self._views.close()
        change.replaced += self._files
        if self.direct >= 0:
            change.replaced.append(self.direct)
        self.direct, self.cache = -1, None
        self.meta, self.rebuild = change.meta, change.state
        self.chain, self._snapshots, self._files = change.chain, change.snapshots, change.files
        self.head = self._files[-1]
        for sums in self._sums.values():
            sums.close()
        self._sums.clear()
        self.content = Chain(self._files, self.size, sums=self._chain_sums())
        self.summing.switched(self._sums_of(self.meta.head))
        self._unsynced.clear()
        self.maps.filling(True)
        if self._io != "buffered" and len(self._files) == 1:
            self._open_direct(self._io)

    def sync_filled(self) -> None:
        """Sync the head and what `write_layer` wrote. From any thread. Raises OSError; it must not be retried."""
        unsynced, self._unsynced = self._unsynced, set()
        for name in sorted(unsynced):
            fd = self._layer(name, os.O_RDWR)
            try:
                os.fdatasync(fd)
            finally:
                os.close(fd)
        self.sync()

    def save_rebuild(self, state: RebuildState) -> None:
        """Make durable that so much is filled, which was synced. From any thread, one at a time. Raises OSError."""
        self._metadata(lambda: write_rebuild(self.directory, state))
        self.rebuild = state

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
        self._drop_pull()
        self._close_files()

    def _close_files(self) -> None:
        for sums in self._sums.values():
            sums.close()
        self._sums.clear()
        for fd in (*self._files, self._lock):
            os.close(fd)
        self._files.clear()
        if self.direct >= 0:
            os.close(self.direct)
            self.direct = -1
