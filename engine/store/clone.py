"""A clone: a replica whose base is a snapshot of another volume's replica on the same file system.

It begins as second names (hard links) of the images that the snapshot consists of, below a head of its own. That takes
no time and no room, and makes the clone an ordinary chain. Nobody may change such an image any more, for it is
somebody else's too: that is told by its number of names, which no crash can make wrong, and which no side has to take
back when the other is deleted. Snapshots are written to only when they are folded (coalesce.py), and a fold asks
`shared` first, with the files locked against `link_replica`.

Pulling copies all of it, block by block, into one file of the clone's own, which then takes the place of the base; the
images below that go. Nothing in between can be seen, and what is done is not lost by a crash.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from engine.durable import replace_file, sync_directory
from engine.errors import FormatError, SnapshotInUseError, SnapshotNotFoundError, StoreError
from engine.store.chain import Chain, extents, pwrite_all
from engine.store.index import CHUNK
from engine.store.layout import (
    SNAPSHOT_IMAGE,
    ImageMeta,
    build_replica,
    fill,
    read_chain,
    read_identity,
    read_image_meta,
    read_volume_meta,
    remove_image,
    remove_sums,
    store_errors,
    write_image_meta,
)
from engine.store.snapshots import snapshot_image
from engine.store.views import Views

FORMAT = 1
ORIGIN = "origin.json"
PULLED = "origin.img"
# between two syncs of what was copied
SYNC_EVERY = 16 << 20
# 4 MiB pieces that a step looks at, however little it finds there
MAX_CHUNKS = 1024
_BUFFER = 1 << 20
_PATIENCE = 20.0
_PAUSE = 0.005

_FICLONERANGE = 0x4020940D  # linux/fs.h
_CLONE_RANGE = struct.Struct("=qQQQ")
_NOT_HERE = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EBADF, errno.ETXTBSY)


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """`origin.json`: where a clone that is not independent yet comes from, and how far it is.

    `image` is its base, `below` are the images under it. All before offset `cursor` is in `origin.img`, on disk.
    `passed` counts what the images hold there, in bytes; `copied` is what of it had to be copied.
    """

    format: int = FORMAT
    volume: str
    uuid: str
    snapshot: str
    image: str
    below: tuple[str, ...] = ()
    cursor: int = 0
    passed: int = 0
    copied: int = 0

    @property
    def source(self) -> str:
        return f"{self.volume}@{self.snapshot}"


def read_origin(directory: Path) -> Origin | None:
    """None for a replica that is no clone, or has become independent. Raises StoreError."""
    try:
        raw = (directory / ORIGIN).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(directory, f"cannot read {ORIGIN}: {error.strerror}") from error
    try:
        origin = msgspec.json.decode(raw, type=Origin)
    except msgspec.DecodeError as error:
        raise StoreError(directory, f"{ORIGIN} is damaged: {error}") from error
    if origin.format > FORMAT:
        raise StoreError(directory, f"{ORIGIN} has format {origin.format}, this release knows up to {FORMAT}")
    return origin


def write_origin(directory: Path, origin: Origin) -> None:
    """Raises OSError."""
    replace_file(directory / ORIGIN, msgspec.json.encode(origin) + b"\n")


@contextlib.contextmanager
def _held(source: Path, snapshot: str) -> Iterator[tuple[ImageMeta, ...]]:
    """What snapshot `snapshot` consists of, the newest first, none of which changes within the block.

    Raises StoreError, OSError.
    """
    deadline = time.monotonic() + _PATIENCE
    while True:
        broken: FormatError | None = None
        with contextlib.ExitStack() as stack:
            fds = []
            try:
                metas = _chain_of(source, snapshot)
                for meta in metas:
                    fds.append(os.open(source / meta.name, os.O_RDONLY | os.O_CLOEXEC))
                    stack.callback(os.close, fds[-1])
                    fcntl.flock(fds[-1], fcntl.LOCK_SH | fcntl.LOCK_NB)
                still = _chain_of(source, snapshot) == metas and all(
                    os.path.samestat(os.fstat(fd), os.stat(source / meta.name))
                    for fd, meta in zip(fds, metas, strict=True)
                )
            except (BlockingIOError, FileNotFoundError):
                still = False  # one is being folded, or has just been
            except FormatError as error:
                # a chain that was read while one of it went; or one that is damaged, and stays so
                still, broken = False, error
            if still:
                yield metas
                return
        if time.monotonic() > deadline:
            if broken is not None:
                raise broken
            raise SnapshotInUseError(source, f"snapshot {snapshot!r} is being merged all the time: try again")
        time.sleep(_PAUSE)


def _chain_of(source: Path, snapshot: str) -> tuple[ImageMeta, ...]:
    """Raises StoreError, OSError."""
    image = snapshot_image(snapshot)
    if not SNAPSHOT_IMAGE.fullmatch(image) or not (source / f"{image}.meta").exists():
        raise SnapshotNotFoundError(source, snapshot)
    metas = tuple(read_image_meta(source, name) for name in read_chain(source, image))
    if metas[0].removed:
        raise SnapshotNotFoundError(source, snapshot)
    head = read_volume_meta(source).head
    with contextlib.suppress(FileNotFoundError):
        # it is only just being made: its file is still written to
        if os.path.samefile(source / head, source / image):
            raise SnapshotNotFoundError(source, snapshot)
    return metas


def snapshot_size(source: Path, snapshot: str) -> int:
    """Bytes that the volume had. Raises StoreError."""
    with store_errors(source, f"look at snapshot {snapshot!r}"):
        return os.stat(source / _chain_of(source, snapshot)[0].name).st_size


def link_replica(source: Path, snapshot: str, directory: Path, *, volume: str, uuid: str, replica: str) -> None:
    """Make a replica that holds what `snapshot` of the replica at `source` does, wholly or not at all.

    Safe beside a running server of the source. Raises StoreError, also when the two are not on one file system.
    """
    identity = read_identity(source)
    with store_errors(directory, f"clone {source}"), _held(source, snapshot) as metas:
        # that the snapshot is no longer the head must be on disk before anybody relies on it
        sync_directory(source)
        base = metas[0]
        size = os.stat(source / base.name).st_size

        def make(building: Path) -> None:
            for meta in metas:
                try:
                    os.link(source / meta.name, building / meta.name)
                except OSError as error:
                    if error.errno == errno.EXDEV:
                        raise StoreError(
                            directory, f"it is not on the file system of {source}: a clone shares its data"
                        ) from None
                    raise
                # what lies below is the source's own history; nobody should read it or go back to it here
                copy = msgspec.structs.replace(meta, user_created=False, removed=meta is not base, labels=None)
                write_image_meta(building, copy)
            origin = Origin(
                volume=identity.volume,
                uuid=identity.uuid,
                snapshot=snapshot,
                image=base.name,
                below=tuple(meta.name for meta in metas[1:]),
            )
            write_origin(building, origin)
            fill(building, volume=volume, uuid=uuid, replica=replica, size=size, parent=base.name)

        build_replica(directory, make)


class Pull:
    """The copying of a clone's base, over all its steps. `switched`: the store reads `file` and nothing shared."""

    def __init__(self, directory: Path, origin: Origin) -> None:
        self.directory = directory
        self.origin = self.saved = origin
        self.switched = False
        self.file = -1
        self.total = 0
        self.size = 0
        self._files: list[int] = []
        self._unsynced = 0
        self._reflink = True

    def prepare(self) -> None:
        """Open what is read and written; once. Raises StoreError, OSError."""
        if self.file >= 0:
            return
        directory, origin = self.directory, self.origin
        try:
            for image in reversed(read_chain(directory, origin.image)):
                self._files.append(os.open(directory / image, os.O_RDONLY | os.O_CLOEXEC))
            self.size = os.fstat(self._files[-1]).st_size
            self._chain = Chain(self._files, self.size, max_mixed=16)
            self.total = max(sum(os.fstat(fd).st_blocks * 512 for fd in self._files), origin.passed)
            path = directory / PULLED
            if self.complete and not path.exists():
                path = directory / origin.image  # it has taken its place already
            fd = os.open(path, os.O_RDWR | (0 if origin.cursor else os.O_CREAT) | os.O_CLOEXEC, 0o600)
            try:
                if not origin.cursor:
                    os.ftruncate(fd, self.size)
                    os.fsync(fd)
                    sync_directory(directory)
            except OSError:
                os.close(fd)
                raise
            self.file = fd
        except (OSError, StoreError):
            self.close()
            raise

    @property
    def complete(self) -> bool:
        """All is in `file`, on disk. `prepare` comes first."""
        return self.origin.cursor >= self.size

    def close(self) -> None:
        for fd in (*self._files, self.file):
            if fd >= 0:
                os.close(fd)
        self._files, self.file = [], -1

    def copy(self, budget: int, metadata: Callable[[Callable[[], None]], None]) -> int:
        """Copy about `budget` bytes from the cursor on, and sync now and then; how many. Raises OSError."""
        try:
            cursor, passed, copied = self._advance(budget)
            done = msgspec.structs.replace(
                self.origin, cursor=cursor, passed=self.origin.passed + passed, copied=self.origin.copied + copied
            )
            self._unsynced += copied
            if self._unsynced >= SYNC_EVERY or cursor >= self.size:
                os.fsync(self.file)
                metadata(lambda: write_origin(self.directory, done))
                self._unsynced = 0
                self.saved = done
        except OSError:
            # what a failed sync has dropped is copied again
            self.origin = self.saved
            self._unsynced = 0
            raise
        self.origin = done
        return copied

    def _advance(self, budget: int) -> tuple[int, int, int]:
        at, passed, copied = self.origin.cursor, 0, 0
        for _ in range(MAX_CHUNKS):
            at = self._next(at)
            if at >= self.size or copied >= budget:
                break
            stop = min(self.size, at - at % CHUNK + CHUNK)
            for fd, start, end in self._chain.pieces(at, stop):
                copied += self._transfer(fd, start, end)
            passed += sum(end - start for fd in self._files for start, end in extents(fd, at, stop))
            at = stop
        return min(at, self.size), passed, copied

    def _next(self, at: int) -> int:
        """The first chunk from `at` on in which there is anything."""
        found = self.size
        for fd in self._files:
            with contextlib.suppress(OSError):  # ENXIO: nothing comes in this one
                found = min(found, os.lseek(fd, at, os.SEEK_DATA))
        return max(at, found - found % CHUNK) if found < self.size else self.size

    def _transfer(self, fd: int, start: int, end: int) -> int:
        """Bytes that went through memory; 0 where the file system shares the blocks instead."""
        end = min(end, self.size)
        if self._reflink:
            try:
                fcntl.ioctl(self.file, _FICLONERANGE, _CLONE_RANGE.pack(fd, start, end - start, start))
                return 0
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                self._reflink = False
        at = start
        while at < end:
            data = os.pread(fd, min(_BUFFER, end - at), at)
            if not data:  # made before the volume grew
                break
            pwrite_all(self.file, data, at)
            at += len(data)
        return at - start


class PullStep:
    """A part of a pull: `run` in any thread, then `Store.finish_pull`. Writing to the head may go on meanwhile."""

    def __init__(
        self, pull: Pull, views: Views, budget: int, metadata: Callable[[Callable[[], None]], None], *, finish: bool
    ) -> None:
        self.pull = pull
        self.finish = finish
        self.copied = 0
        self.done = False
        self._views = views
        self._budget = budget
        self._metadata = metadata

    def run(self) -> None:
        """Raises StoreError, OSError. Try again then; when the pull was `switched`, only after ENOSPC and EDQUOT."""
        pull = self.pull
        pull.prepare()
        if pull.switched and self.finish:
            with self._views.without(pull.origin.image):
                self._metadata(self._take_place)
            self.done = True
        elif not pull.complete:
            self.copied = pull.copy(self._budget, self._metadata)

    def _take_place(self) -> None:
        """Each of these can be repeated, and after each the chain reads the same."""
        directory, origin = self.pull.directory, self.pull.origin
        if (directory / PULLED).exists():
            remove_sums(directory, origin.image)
            sync_directory(directory)
            os.replace(directory / PULLED, directory / origin.image)
            sync_directory(directory)
        meta = read_image_meta(directory, origin.image)
        if meta.parent:
            write_image_meta(directory, msgspec.structs.replace(meta, parent=""))
        for image in origin.below:
            remove_image(directory, image)
        (directory / ORIGIN).unlink(missing_ok=True)
        sync_directory(directory)
