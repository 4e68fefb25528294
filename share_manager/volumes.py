"""The volumes of a data directory: made, found, grown, deleted. Nothing here runs a process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from engine.durable import replace_file, sync_directory
from engine.errors import EngineError, FrontendError, StoreError
from engine.frontend.fuse_device import FuseDevice
from engine.record import FileRecordStore, ReplicaRecord, VolumeRecord
from engine.store import IDENTITY, adopt_replica, create_replica, inspect_replica, read_identity, resize_replica
from share_manager.errors import (
    DiskError,
    SizeMismatchError,
    UsageError,
    VolumeBusyError,
    VolumeExistsError,
    VolumeMismatchError,
    VolumeNotFoundError,
)
from share_manager.paths import VolumePaths
from share_manager.share.procfs import is_dying
from share_manager.units import check_replicas, format_size

_LOCK_PATIENCE = 0.5
_DYING_PATIENCE = 10.0
_BUILDING = ".creating-"
_DELETING = ".deleting-"


def make_data_dir(data_dir: Path) -> Path:
    """The data directory as an absolute path, made if missing. Raises DiskError."""
    try:
        (data_dir / "volumes").mkdir(parents=True, exist_ok=True, mode=0o700)
        return data_dir.resolve()
    except OSError as error:
        raise DiskError(data_dir, error) from error


def list_volumes(data_dir: Path) -> list[str]:
    try:
        entries = sorted(os.listdir(data_dir / "volumes"))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DiskError(data_dir, error) from error
    return [name for name in entries if not name.startswith(".") and (data_dir / "volumes" / name).is_dir()]


def find_volume(data_dir: Path, volume: str) -> VolumePaths:
    """Raises VolumeNotFoundError."""
    paths = VolumePaths(data_dir.resolve(), volume)
    if not paths.directory.is_dir():
        raise VolumeNotFoundError(volume, data_dir)
    return paths


def read_record(paths: VolumePaths) -> VolumeRecord:
    """Raises RecordError."""
    return FileRecordStore(paths.record).read()


@contextlib.contextmanager
def volume_lock(paths: VolumePaths, wanted: str) -> Iterator[None]:
    """Hold the volume for ourselves: one serve, attach or change at a time. The kernel lets go of it when we die.

    The lock is a file beside the volume's directory, so that it is held while that is made, renamed or removed.
    Raises VolumeBusyError, which ends with `wanted`; DiskError.
    """
    directory = paths.data_dir / "volumes"
    path = directory / f".lock-{paths.volume}"
    patience = time.monotonic() + _LOCK_PATIENCE
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DiskError(directory, error) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read_holder(fd)
            os.close(fd)
            if holder is not None and is_dying(holder) and time.monotonic() < patience + _DYING_PATIENCE:
                # it waits for the volume that it served: with the requests failed, it ends and lets go of the lock
                with contextlib.suppress(FrontendError):
                    FuseDevice(paths.block_file, -1).abort()
                time.sleep(0.05)
                continue
            # a holder writes down its pid; `status` looks whether there is one by taking a shared lock for an instant
            if (holder is None or not Path(f"/proc/{holder}").exists()) and time.monotonic() < patience:
                time.sleep(0.01)
                continue
            raise VolumeBusyError(paths.volume, holder, wanted) from None
        # a holder that deleted its volume removes the file: a lock on a removed file guards nothing
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(fd).st_ino == os.stat(path).st_ino:
                break
        os.close(fd)
    try:
        with contextlib.suppress(OSError):
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):
            os.ftruncate(fd, 0)
            if not paths.directory.exists():
                path.unlink()
        os.close(fd)


def _read_holder(fd: int) -> int | None:
    holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
    return int(holder) if holder.isdigit() else None


def lock_holder(paths: VolumePaths) -> int | None:
    """Pid of whoever holds the volume now, None when it is free."""
    try:
        fd = os.open(paths.data_dir / "volumes" / f".lock-{paths.volume}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read_holder(fd) or 0
    else:
        return None
    finally:
        os.close(fd)


def create_volume(paths: VolumePaths, *, size: int, replicas: int) -> VolumeRecord:
    """Make a volume, wholly or not at all. The caller holds its lock.

    Raises DiskError, StoreError, InvalidValueError.
    """
    check_replicas(replicas)
    record = first_record(paths, str(uuid.uuid4()), size, [f"r{number}" for number in range(1, replicas + 1)])

    def fill(directory: Path) -> None:
        for name in record.in_sync:
            create_replica(directory / name, volume=paths.volume, uuid=record.uuid, replica=name, size=size)

    build_volume(paths, record, fill)
    return record


def import_volume(paths: VolumePaths, directory: Path) -> VolumeRecord:
    """Make a volume of a replica directory of Longhorn's v1 engine, which moves below it as its only replica `r1`.

    Cut off, it can be repeated. The caller holds the lock. Raises DiskError, StoreError, VolumeExistsError.
    """
    inside = paths.replica("r1")
    try:
        if paths.directory.exists():
            record = read_record(paths)
            if inside.exists() or read_identity(directory).uuid != record.uuid:
                raise VolumeExistsError(paths.volume)
        else:
            identity = _adopt(directory, paths.volume)
            record = first_record(paths, identity, inspect_replica(directory).size, ["r1"])
            build_volume(paths, record, lambda _: None)
        # the last step: whoever is cut off before it finds a volume without its replica, and does it then
        directory.rename(inside)
        sync_directory(inside.parent)
        sync_directory(directory.parent)
    except OSError as error:
        raise DiskError(directory, error) from error
    return record


def _adopt(directory: Path, volume: str) -> str:
    """The volume's uuid, in a directory that is adopted now or was by an attempt that was cut off."""
    if (directory / IDENTITY).exists():
        found = read_identity(directory)
        if (found.volume, found.replica, found.epoch) == (volume, "r1", 0):
            return found.uuid
    identity = str(uuid.uuid4())
    adopt_replica(directory, volume=volume, uuid=identity, replica="r1")
    return identity


def first_record(paths: VolumePaths, identity: str, size: int, names: list[str]) -> VolumeRecord:
    """Of a volume that is about to be made, all of its replicas in sync."""
    return VolumeRecord(
        volume=paths.volume,
        uuid=identity,
        size=size,
        replicas=tuple(
            ReplicaRecord(name=name, address=f"unix:{paths.replica_socket(name)}", directory=str(paths.replica(name)))
            for name in names
        ),
        in_sync=tuple(names),
    )


def build_volume(
    paths: VolumePaths,
    record: VolumeRecord,
    fill: Callable[[Path], None],
    files: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
    """Build the volume's directory beside and rename it; `fill` makes the replicas, `files` are beside the record.

    Raises DiskError, StoreError.
    """
    parent = paths.directory.parent
    building = parent / f"{_BUILDING}{paths.volume}"
    try:
        _remove_unfinished(paths)
        building.mkdir(mode=0o700)
        (building / "replicas").mkdir(mode=0o700)
        (building / "log").mkdir(mode=0o700)
        fill(building / "replicas")
        for name, content in files.items():
            replace_file(building / name, content, mode=0o600)
        replace_file(building / "secret", secrets.token_hex(32).encode() + b"\n", mode=0o600)
        FileRecordStore(building / "record.json").create(record)
        sync_directory(building)
        building.rename(paths.directory)
        sync_directory(parent)
    except OSError as error:
        shutil.rmtree(building, ignore_errors=True)
        raise DiskError(parent, error) from error
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _remove_unfinished(paths: VolumePaths) -> None:
    """What a crash left of making or deleting this volume."""
    for prefix in (_BUILDING, _DELETING):
        shutil.rmtree(paths.directory.parent / f"{prefix}{paths.volume}", ignore_errors=True)


def sweep_unfinished(data_dir: Path) -> None:
    """What killed commands left of any volume: a clone that was never finished keeps its source's data from going."""
    with contextlib.suppress(OSError):
        for entry in sorted(os.listdir(data_dir / "volumes")):
            for prefix in (_BUILDING, _DELETING):
                volume = entry.removeprefix(prefix)
                if volume != entry and lock_holder(VolumePaths(data_dir, volume)) is None:
                    with contextlib.suppress(VolumeBusyError), volume_lock(VolumePaths(data_dir, volume), "first"):
                        shutil.rmtree(data_dir / "volumes" / entry, ignore_errors=True)


def open_volume(paths: VolumePaths, *, size: int | None, replicas: int | None) -> VolumeRecord:
    """The record of a volume that exists and is what was asked for.

    Raises RecordError, SizeMismatchError, VolumeMismatchError.
    """
    _remove_unfinished(paths)
    sweep_unfinished(paths.data_dir)
    record = read_record(paths)
    if size is not None and size != record.size:
        raise SizeMismatchError(record.volume, format_size(record.size), format_size(size))
    if replicas is not None and replicas != len(record.replicas):
        raise VolumeMismatchError(
            record.volume, f"has {len(record.replicas)} replicas, not {replicas}: leave --replicas out"
        )
    return readdress(paths, record)


def replica_directory(paths: VolumePaths, replica: ReplicaRecord) -> Path:
    """Where a replica is: below the volume's directory, which may have been moved, or elsewhere, where it stays."""
    recorded = Path(replica.directory)
    if recorded.parts[-4:] == paths.replica(replica.name).parts[-4:]:
        return paths.replica(replica.name)
    return recorded


def readdress(paths: VolumePaths, record: VolumeRecord) -> VolumeRecord:
    """The record with today's sockets and directories: the data directory may have been moved or mounted elsewhere."""
    here = tuple(
        ReplicaRecord(
            name=replica.name,
            address=f"unix:{paths.replica_socket(replica.name)}",
            directory=str(replica_directory(paths, replica)),
        )
        for replica in record.replicas
    )
    if here == record.replicas:
        return record
    moved = record.next(replicas=here)
    FileRecordStore(paths.record).swap(record.version, moved)
    return moved


def refuse_to_shrink(record: VolumeRecord, size: int) -> None:
    """Raises UsageError."""
    if size < record.size:
        raise UsageError(
            f"volume {record.volume} has {format_size(record.size)}: a volume can only grow, not shrink to "
            f"{format_size(size)}"
        )


def resize_volume(paths: VolumePaths, size: int) -> VolumeRecord:
    """Grow a volume that nobody uses: replicas first, then the record, so that a crash between leaves a volume that
    works at its old size and takes the same command again. The caller holds its lock.

    Raises UsageError, DiskError, RecordError, StoreError.
    """
    record = read_record(paths)
    refuse_to_shrink(record, size)
    record = readdress(paths, record)
    try:
        for replica in record.replicas:
            if replica.name not in record.in_sync:
                continue  # grown when it comes back, if it ever does
            if inspect_replica(Path(replica.directory)).size < size:
                resize_replica(Path(replica.directory), size)
    except OSError as error:
        raise DiskError(paths.directory, error) from error
    if size == record.size:
        return record
    grown = record.next(size=size)
    FileRecordStore(paths.record).swap(record.version, grown)
    return grown


def delete_volume(paths: VolumePaths) -> None:
    """Gone at once under its name, then removed, with replicas that are elsewhere. The caller holds its lock.

    Raises DiskError.
    """
    doomed = paths.directory.parent / f"{_DELETING}{paths.volume}"
    try:
        with contextlib.suppress(EngineError):
            record = read_record(paths)
            for replica in record.replicas:
                directory = replica_directory(paths, replica)
                if not directory.is_relative_to(paths.directory):
                    delete_replica(directory, record.uuid)
        shutil.rmtree(doomed, ignore_errors=True)
        paths.directory.rename(doomed)
        sync_directory(doomed.parent)
        shutil.rmtree(doomed)
    except OSError as error:
        raise DiskError(paths.directory, error) from error


def delete_replica(directory: Path, uuid: str) -> bool:
    """Delete a replica's directory if it is one of this volume; False when it is not there. Raises OSError, StoreError.

    Its identity goes last, so that what an interruption leaves is still known.
    """
    if not directory.is_dir() or not os.listdir(directory):
        return False
    found = read_identity(directory)
    if found.uuid != uuid:
        raise StoreError(directory, "it belongs to another volume")
    for name in sorted(os.listdir(directory), key=lambda name: name == IDENTITY):
        (directory / name).unlink()
    directory.rmdir()
    return True


def allocated_bytes(directory: Path) -> int:
    """Disk space that the files below `directory` take, holes left out."""
    total = 0
    for parent, _, files in os.walk(directory):
        for name in files:
            with contextlib.suppress(OSError):
                total += os.stat(Path(parent) / name, follow_symlinks=False).st_blocks * 512
    return total
