"""The replicas of a volume, added, removed, moved and replaced while it is attached, for a client or for this work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import trio

from engine.client import EngineClient
from engine.errors import EngineError
from engine.operations import (
    OperationProgress,
    ReplicaAdd,
    ReplicaRemove,
    ReplicaResult,
    ReplicaWait,
    ResyncLimit,
    ResyncLimited,
)
from engine.record import ReplicaRecord, VolumeRecord
from engine.store import create_replica, read_identity
from share_manager.errors import DiskError, ReplicaStateError, UsageError
from share_manager.maintenance import Attached
from share_manager.paths import VolumePaths
from share_manager.volumes import delete_replica, read_record, replica_directory

OnProgress = Callable[[OperationProgress], None]

_LEAVES_WITHIN = 30.0


def new_name(record: VolumeRecord) -> str:
    """One above the highest rN, so that no name comes back."""
    numbers = [int(replica.name[1:]) for replica in record.replicas if replica.name[1:].isdigit()]
    return f"r{max(numbers, default=0) + 1}"


def find_replica(record: VolumeRecord, name: str) -> ReplicaRecord:
    """Raises UsageError."""
    for replica in record.replicas:
        if replica.name == name:
            return replica
    names = ", ".join(replica.name for replica in record.replicas)
    raise UsageError(f"volume {record.volume} has no replica {name}; there are {names}")


def make_directory(paths: VolumePaths, record: VolumeRecord, name: str, directory: Path | None) -> Path:
    """An empty replica, for an engine to fill. Raises StoreError, DiskError, UsageError."""
    if directory is not None and not directory.is_absolute():
        raise UsageError(f"{directory} is not an absolute path, and the replica must be found from everywhere")
    place = paths.replica(name) if directory is None else directory
    if any(replica_directory(paths, replica) == place for replica in record.replicas if replica.name != name):
        raise UsageError(f"{place} is the directory of another replica")
    try:
        if place == paths.replica(name):
            # below our own directory nothing else can be there than what an interrupted attempt left
            delete_replica(place, record.uuid)
        create_replica(place, volume=record.volume, uuid=record.uuid, replica=name, size=record.size, rebuilding=True)
    except OSError as error:
        raise DiskError(place, error) from error
    return place


async def limit(client: EngineClient, rate: int | None) -> None:
    """Bytes a second for all that is copied between replicas; None leaves it as it is."""
    if rate is not None:
        await client.run(ResyncLimit(rate=rate), ResyncLimited)


async def add(paths: VolumePaths, volume: Attached, name: str, directory: Path | None) -> Path:
    """Its directory; the engine begins to fill it. Raises EngineError, ShareManagerError: then nothing is left."""
    record = read_record(paths)
    if any(replica.name == name for replica in record.replicas):
        raise UsageError(f"volume {record.volume} has a replica {name} already")
    place = make_directory(paths, record, name, directory)
    try:
        await volume.servers.start(name, place)
        await volume.client.run(
            ReplicaAdd(name=name, address=f"unix:{paths.replica_socket(name)}", directory=str(place)), ReplicaResult
        )
    except BaseException:
        with trio.CancelScope(shield=True):
            if not any(replica.name == name for replica in read_record(paths).replicas):
                await volume.servers.stop(name)
                delete_replica(place, record.uuid)
        raise
    return place


async def wait(client: EngineClient, name: str, on_progress: OnProgress) -> None:
    """Until it is in sync. Raises EngineError."""
    await client.run(ReplicaWait(name=name), ReplicaResult, on_progress)


async def remove(paths: VolumePaths, volume: Attached, name: str, *, delete: bool) -> Path:
    """Its directory, which stays unless it is to be deleted. Raises EngineError, ShareManagerError."""
    record = read_record(paths)
    place = replica_directory(paths, find_replica(record, name))
    await volume.client.run(ReplicaRemove(name=name), ReplicaResult)
    with trio.CancelScope(shield=True):
        await volume.servers.stop(name)
    if delete:
        try:
            await trio.to_thread.run_sync(delete_replica, place, record.uuid)
        except OSError as error:
            raise DiskError(place, error) from error
    return place


async def recreate(paths: VolumePaths, volume: Attached, name: str) -> Path:
    """Replace a replica that is lost or damaged by an empty one of the same name, in the same place.

    Raises ReplicaStateError for one that is in sync, EngineError, ShareManagerError.
    """
    record = read_record(paths)
    place = replica_directory(paths, find_replica(record, name))
    _refuse_in_sync(record, name)
    await volume.servers.stop(name)
    try:
        # it may have become complete at the last moment: then the record names it until the engine notices
        with trio.move_on_after(_LEAVES_WITHIN):
            while await _state(volume.client, name) != "out":  # noqa: ASYNC110 - another process tells it
                await trio.sleep(0.05)
        record = read_record(paths)
        _refuse_in_sync(record, name)
        await trio.to_thread.run_sync(_drop, place, record, name)
        make_directory(paths, record, name, None if place == paths.replica(name) else place)
    finally:
        with trio.CancelScope(shield=True):
            await volume.servers.start(name, place)
    return place


async def _state(client: EngineClient, name: str) -> str:
    return next((replica.state for replica in (await client.status()).replicas if replica.name == name), "out")


def _refuse_in_sync(record: VolumeRecord, name: str) -> None:
    if name in record.in_sync:
        raise ReplicaStateError(
            record.volume, name, "is in sync, so there is nothing to recreate: remove it, or move it elsewhere"
        )


def _drop(place: Path, record: VolumeRecord, name: str) -> None:
    """What is left of a replica. Raises ReplicaStateError for a directory that holds something else, DiskError."""
    try:
        if not place.is_dir() or not any(place.iterdir()):
            return
        try:
            identity = read_identity(place)
        except EngineError:
            raise ReplicaStateError(
                record.volume, name, f"has a directory that cannot be read as a replica: look at {place} and empty it"
            ) from None
        if (identity.uuid, identity.replica) != (record.uuid, name):
            raise ReplicaStateError(record.volume, name, f"has a directory that holds another replica: {place}")
        delete_replica(place, record.uuid)
    except OSError as error:
        raise DiskError(place, error) from error
