"""The replica directory: file names and metadata, byte-compatible with Longhorn's v1 engine (docs/on-disk-format.md).

Longhorn's files keep their keys and their meaning, and keys that this release does not know survive a rewrite. What
only this project knows is in files of its own, so that either side can open what the other wrote.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from engine.decoding import UNDECODABLE, Counter
from engine.durable import replace_file, sync_directory
from engine.errors import FormatError, StoreError
from engine.store.maps import INTENT_MAP, create_map
from engine.store.sums import SUFFIX

FORMAT = 1
BLOCK = 4096
SECTOR_SIZE = 512
MAX_SNAPSHOTS = 254
REVISION_SIZE = 4096

VOLUME_META = "volume.meta"
IDENTITY = "share-manager.json"
REVISION = "revision.counter"
RESERVE = "share-manager.reserve"
REBUILD = "rebuild.json"
RESERVE_SIZE = 256 << 10
FIRST_HEAD = "volume-head-000.img"
_PATIENCE = 4

HEAD_IMAGE = re.compile(r"volume-head-(\d{3,})\.img")
SNAPSHOT_IMAGE = re.compile(r"volume-snap-([^/\0]+)\.img")
# ".checksum" is Longhorn's own; our sums go first, so that none are left for an image that gets the same name
_IMAGE_FILES = (SUFFIX, "", ".checksum", ".meta")


class VolumeMeta(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    """`volume.meta`. `size` in bytes; `head` and `parent` are image file names, `parent` is that of the head."""

    size: int
    head: str
    dirty: bool = False
    rebuilding: bool = False
    error: str = ""
    parent: str = ""
    sector_size: int = SECTOR_SIZE
    backing_file_path: str = ""


class ImageMeta(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    """`<image>.meta`. `created` is RFC 3339 in UTC."""

    name: str
    parent: str = ""
    removed: bool = False
    user_created: bool = False
    created: str = ""
    labels: dict[str, str] | None = None


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """`share-manager.json`: whose replica this is, and the highest (epoch, incarnation) it has seen."""

    format: int = FORMAT
    volume: str
    uuid: str
    replica: str
    epoch: Counter = 0
    incarnation: Counter = 0


class ReplicaInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a directory says of itself. `chain` names the images, newest (the head) first; sizes in bytes."""

    volume: str
    uuid: str
    replica: str
    size: int
    allocated: int
    epoch: int
    incarnation: int
    chain: tuple[str, ...]
    dirty: bool
    rebuilding: bool


_T = TypeVar("_T", bound=msgspec.Struct)


@contextlib.contextmanager
def store_errors(directory: Path, doing: str) -> Iterator[None]:
    """Turn OSError into StoreError."""
    try:
        yield
    except OSError as error:
        raise StoreError(directory, f"cannot {doing}: {error.strerror or error}") from error


def _read(directory: Path, name: str) -> bytes:
    try:
        return (directory / name).read_bytes()
    except FileNotFoundError:
        if not directory.is_dir():
            raise StoreError(directory, "there is no such directory") from None
        raise FormatError(directory, f"{name} is missing") from None
    except OSError as error:
        raise StoreError(directory, f"cannot read {name}: {error.strerror}") from error


def _decode(directory: Path, name: str, raw: bytes, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(raw, type=kind)
    except UNDECODABLE as error:
        raise FormatError(directory, f"{name} is damaged: {error}") from error


def _write_json(path: Path, value: msgspec.Struct) -> None:
    known: dict[str, Any] = msgspec.to_builtins(value)
    try:
        found = msgspec.json.decode(path.read_bytes())
    except (FileNotFoundError, *UNDECODABLE):
        found = {}
    kept = {key: value for key, value in found.items() if key not in known} if isinstance(found, dict) else {}
    # one compact line, as Go's json.Encoder writes it
    replace_file(path, msgspec.json.encode(known | kept) + b"\n")


def read_identity(directory: Path) -> Identity:
    """Raises FormatError for a newer format, StoreError."""
    raw = _read(directory, IDENTITY)

    class _Format(msgspec.Struct):
        format: int

    found = _decode(directory, IDENTITY, raw, _Format).format
    if found > FORMAT:
        raise FormatError(
            directory, f"written in format {found}, this release knows up to {FORMAT}: use the newer release"
        )
    return _decode(directory, IDENTITY, raw, Identity)


def write_identity(directory: Path, identity: Identity) -> None:
    """Raises OSError."""
    _write_json(directory / IDENTITY, identity)


def read_volume_meta(directory: Path) -> VolumeMeta:
    """Raises StoreError."""
    meta = _decode(directory, VOLUME_META, _read(directory, VOLUME_META), VolumeMeta)
    if not HEAD_IMAGE.fullmatch(meta.head):
        raise FormatError(directory, f"{VOLUME_META} names {meta.head!r} as head")
    if meta.size <= 0 or meta.size % BLOCK:
        raise FormatError(directory, f"{VOLUME_META} has size {meta.size}, not a positive multiple of {BLOCK}")
    if meta.backing_file_path:
        raise FormatError(directory, "the volume has a backing image, which this release cannot read")
    return meta


def write_volume_meta(directory: Path, meta: VolumeMeta) -> None:
    """Raises OSError."""
    _write_json(directory / VOLUME_META, meta)


def read_image_meta(directory: Path, image: str) -> ImageMeta:
    """Raises StoreError."""
    return _decode(directory, f"{image}.meta", _read(directory, f"{image}.meta"), ImageMeta)


def write_image_meta(directory: Path, meta: ImageMeta) -> None:
    """Raises OSError."""
    _write_json(directory / f"{meta.name}.meta", meta)


def remove_image(directory: Path, image: str) -> None:
    """Durable only with the next fsync of the directory. Raises OSError."""
    # the metadata last: an image that nothing describes would be room lost for good
    for suffix in _IMAGE_FILES:
        (directory / (image + suffix)).unlink(missing_ok=True)


def remove_sums(directory: Path, image: str) -> None:
    """Before the image becomes another file. Durable only with the next fsync of the directory. Raises OSError."""
    for suffix in _IMAGE_FILES:
        if suffix not in ("", ".meta"):
            (directory / (image + suffix)).unlink(missing_ok=True)


def read_chain(directory: Path, head: str) -> tuple[str, ...]:
    """Image names from the head down to the oldest snapshot. Raises StoreError."""
    chain = [head]
    while parent := read_image_meta(directory, chain[-1]).parent:
        if not SNAPSHOT_IMAGE.fullmatch(parent):
            raise FormatError(directory, f"{chain[-1]}.meta names {parent!r} as parent")
        if parent in chain:
            raise FormatError(directory, f"the snapshot chain runs in a circle at {parent}")
        chain.append(parent)
        if len(chain) - 1 > MAX_SNAPSHOTS:
            raise FormatError(directory, f"more than {MAX_SNAPSHOTS} snapshots in the chain")
    return tuple(chain)


def lock_directory(directory: Path) -> int:
    """A descriptor that holds the directory until it is closed. Raises StoreError."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise StoreError(directory, "there is no such directory") from None
    except OSError as error:
        raise StoreError(directory, f"cannot open it: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if error.errno == errno.EWOULDBLOCK:
            raise StoreError(directory, "another process is using it") from None
        raise StoreError(directory, f"cannot lock it: {error.strerror}") from error
    return fd


def check_size(directory: Path, size: int) -> None:
    if size <= 0 or size % BLOCK:
        raise StoreError(directory, f"size {size} is not a positive multiple of {BLOCK} bytes")


def create_replica(
    directory: Path, *, volume: str, uuid: str, replica: str, size: int, rebuilding: bool = False
) -> None:
    """Make an empty replica of `size` bytes, wholly or not at all.

    With `rebuilding` its volume has data already, with which an engine is to fill it. Raises StoreError.
    """
    check_size(directory, size)

    def make(building: Path) -> None:
        fill(building, volume=volume, uuid=uuid, replica=replica, size=size, rebuilding=rebuilding)

    build_replica(directory, make)


def build_replica(directory: Path, make: Callable[[Path], None]) -> None:
    """Have `make` fill a directory that then takes the place of `directory`, wholly or not at all.

    Raises StoreError, also for the OSError of `make`.
    """
    directory = directory.absolute()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise StoreError(directory, "cannot create a replica here: it exists already and is not empty")
    building = directory.with_name(f".{directory.name}.creating")
    with store_errors(directory, "create the replica"):
        directory.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(building, ignore_errors=True)
        try:
            building.mkdir(mode=0o700)
            make(building)
            os.rename(building, directory)
            sync_directory(directory.parent)
        except (OSError, StoreError):
            shutil.rmtree(building, ignore_errors=True)
            raise


def fill(
    directory: Path, *, volume: str, uuid: str, replica: str, size: int, parent: str = "", rebuilding: bool = False
) -> None:
    """All files of a replica whose head is empty; `parent` is the image below it, which is there. Raises OSError."""
    extend_image(directory / FIRST_HEAD, size, os.O_CREAT | os.O_EXCL)
    created = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    _write_json(directory / f"{FIRST_HEAD}.meta", ImageMeta(name=FIRST_HEAD, parent=parent, created=created))
    replace_file(directory / REVISION, b"0".ljust(REVISION_SIZE, b"\0"))
    fd = create_map(directory / INTENT_MAP, size)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    make_reserve(directory)
    if rebuilding:
        # promises nothing, so that no map of changes is ever taken for all that is missing
        replace_file(directory / REBUILD, b'{"format":1}\n', mode=0o600)
    write_volume_meta(directory, VolumeMeta(size=size, head=FIRST_HEAD, parent=parent, rebuilding=rebuilding))
    write_identity(directory, Identity(volume=volume, uuid=uuid, replica=replica))


def adopt_replica(directory: Path, *, volume: str, uuid: str, replica: str) -> None:
    """Make a directory of Longhorn's v1 engine ours by adding our files; what is there stays as it is.

    Interrupted, it can be repeated. Raises StoreError, also for a replica that Longhorn had not finished to rebuild.
    """
    lock = lock_directory(directory)
    try:
        if (directory / IDENTITY).exists():
            raise StoreError(directory, "it is a replica of share-manager already")
        meta = read_volume_meta(directory)
        if meta.rebuilding:
            raise StoreError(directory, "Longhorn has not finished to rebuild it: take another replica")
        for image in read_chain(directory, meta.head):
            if not (directory / image).is_file():
                raise FormatError(directory, f"{image} is missing")
        with store_errors(directory, "adopt the replica"):
            for sums in directory.glob(f"*.img{SUFFIX}"):
                sums.unlink()  # of an earlier life with us: Longhorn has written since
            if not (directory / REVISION).exists():
                replace_file(directory / REVISION, b"0".ljust(REVISION_SIZE, b"\0"))
            fd = create_map(directory / INTENT_MAP, meta.size)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
            make_reserve(directory)
            # last, because it is what makes the directory ours
            write_identity(directory, Identity(volume=volume, uuid=uuid, replica=replica))
    finally:
        os.close(lock)


def make_reserve(directory: Path) -> None:
    """Keep room for metadata on a disk that becomes full, less than usual when there is no more. Raises OSError."""
    path = directory / RESERVE
    held = 0
    with contextlib.suppress(FileNotFoundError):
        found = path.stat()
        held = min(found.st_size, found.st_blocks * 512)
    size = RESERVE_SIZE
    while held < size:
        try:
            # no zeros: a copy that saves them as a hole would keep no room
            replace_file(path, b"reserve\n" * (size // 8), mode=0o600)
            return
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or size < 2 * BLOCK:
                raise
            size //= 2


def drop_reserve(directory: Path) -> bool:
    """Give that room free, durably, so that the file system can hand it out again. Raises OSError."""
    try:
        (directory / RESERVE).unlink()
    except FileNotFoundError:
        return False
    sync_directory(directory)
    return True


def extend_image(path: Path, size: int, flags: int = 0) -> None:
    """Make it at least `size` bytes long, durably. Raises OSError."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o600)
    try:
        if os.fstat(fd).st_size < size:
            os.ftruncate(fd, size)
        os.fsync(fd)
    finally:
        os.close(fd)


def inspect_replica(directory: Path) -> ReplicaInfo:
    """Read the metadata, without a lock: safe beside a running server. Raises StoreError."""
    for _ in range(_PATIENCE):
        # the chain may change between one file and the next
        with contextlib.suppress(StoreError):
            return _inspect(directory)
    return _inspect(directory)


def _inspect(directory: Path) -> ReplicaInfo:
    identity = read_identity(directory)
    meta = read_volume_meta(directory)
    chain = read_chain(directory, meta.head)
    with store_errors(directory, "read an image"):
        allocated = sum((directory / image).stat().st_blocks * 512 for image in chain)
    return ReplicaInfo(
        volume=identity.volume,
        uuid=identity.uuid,
        replica=identity.replica,
        size=meta.size,
        allocated=allocated,
        epoch=identity.epoch,
        incarnation=identity.incarnation,
        chain=chain,
        dirty=meta.dirty,
        rebuilding=meta.rebuilding,
    )
