"""Clones: a new volume that begins as a snapshot of another one, and shares its data until it has copied it."""

from __future__ import annotations

import itertools
import uuid
from pathlib import Path

import msgspec

from engine.errors import EngineError
from engine.record import VolumeRecord
from engine.store import Origin, link_replica, read_origin, snapshot_size
from share_manager.errors import VolumeExistsError
from share_manager.paths import VolumePaths
from share_manager.share.filesystem import filesystem_uuid
from share_manager.units import check_replicas
from share_manager.volumes import build_volume, first_record, read_record


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """What a replica shares: with whom, and how many bytes of how many are its own by now."""

    origin: str
    done: int
    total: int


def clone_volume(source: VolumePaths, snapshot: str, paths: VolumePaths, replicas: int | None) -> VolumeRecord:
    """Make volume `paths` of `snapshot`, which is on every in-sync replica of `source`, at once and without a copy.

    `replicas` None: as many as the source has. The caller holds the new volume's lock; the source may be in use.
    Raises VolumeExistsError, DiskError, RecordError, StoreError, InvalidValueError.
    """
    if paths.directory.exists():
        raise VolumeExistsError(paths.volume)
    found = read_record(source)
    directories = [
        # the data directory may have been moved since the record was written
        Path(replica.directory) if Path(replica.directory).is_dir() else source.replica(replica.name)
        for replica in found.replicas
        if replica.name in found.in_sync
    ]
    count = len(found.replicas) if replicas is None else replicas
    check_replicas(count)
    size = snapshot_size(directories[0], snapshot)
    record = first_record(paths, str(uuid.uuid4()), size, [f"r{number}" for number in range(1, count + 1)])

    def fill(directory: Path) -> None:
        for name, origin in zip(record.in_sync, itertools.cycle(directories), strict=False):
            link_replica(origin, snapshot, directory / name, volume=paths.volume, uuid=record.uuid, replica=name)

    uuids = [str(filesystem_uuid(found.uuid))]
    if source.inherited_uuids.exists():
        # a clone of a clone that was never served
        uuids += source.inherited_uuids.read_text().split()
    files = {
        paths.inherited_uuids.name: "".join(f"{one}\n" for one in uuids).encode(),
        paths.drop_recovery.name: b"",
    }
    if source.encryption.exists():
        # the snapshot has the header as well
        files[paths.encryption.name] = source.encryption.read_bytes()
    build_volume(paths, record, fill, files)
    return record


def link_of(directory: Path) -> Link | None:
    """None for a replica that shares nothing, or tells nothing."""
    try:
        origin = read_origin(directory)
        return _measure(directory, origin) if origin is not None else None
    except (EngineError, OSError):
        return None


def _measure(directory: Path, origin: Origin) -> Link:
    images = (origin.image, *origin.below)
    total = sum((directory / image).stat().st_blocks * 512 for image in images)
    return Link(origin=origin.source, done=min(origin.passed, total), total=total)
