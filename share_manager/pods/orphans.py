"""What lets a volume be brought back after its objects were deleted: a copy of them in each replica's directory.

The objects are what counts. The agent of a node writes a copy when they change, a moment later, so it may be behind;
what it is good for is decided in `share_manager.pods.adopt`.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import msgspec
import structlog

from engine.durable import replace_file
from engine.errors import EngineError
from engine.store import inspect_replica, read_identity
from share_manager.kube.resources import OrphanedReplica, Volume, VolumeRecord, VolumeRecordSpec, VolumeSpec

log = structlog.get_logger()

COPY = "objects.json"
FORMAT = 1
MOST_ORPHANS = 128


class ObjectsCopy(msgspec.Struct, frozen=True, kw_only=True):
    """Written in the JSON of the API."""

    format: int = FORMAT
    volume: str
    spec: VolumeSpec
    record: VolumeRecordSpec


def copy_of(volume: Volume, record: VolumeRecord) -> ObjectsCopy:
    return ObjectsCopy(volume=volume.name, spec=volume.spec, record=record.spec)


def keep(directory: Path, copy: ObjectsCopy) -> None:
    """Raises OSError."""
    replace_file(directory / COPY, msgspec.json.encode(copy), mode=0o600)


def find_orphans(data_dir: Path, claimed: Collection[tuple[str, str]]) -> tuple[OrphanedReplica, ...]:
    """Replica directories below `data_dir` with a copy, but those whose (uuid of the volume, name) are `claimed`.

    What cannot be read is left out, and logged.
    """
    found: list[OrphanedReplica] = []
    for path in sorted(data_dir.glob(f"replicas/*/*/{COPY}")):
        try:
            identity = read_identity(path.parent)
            if (identity.uuid, identity.replica) in claimed:
                continue
            info = inspect_replica(path.parent)
            copy = msgspec.json.decode(path.read_bytes(), type=ObjectsCopy)
        except (OSError, EngineError, msgspec.DecodeError) as error:
            log.warning("a replica that nobody claims cannot be read", directory=str(path.parent), reason=str(error))
            continue
        found.append(
            OrphanedReplica(
                volume=copy.volume,
                uuid=info.uuid,
                replica=info.replica,
                directory=str(path.parent.relative_to(data_dir)),
                size=info.size,
                epoch=info.epoch,
                rebuilding=info.rebuilding,
                copy=msgspec.json.encode(copy).decode(),
            )
        )
    return tuple(found[:MOST_ORPHANS])
