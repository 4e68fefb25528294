"""Replica directories that nobody serves: what they say of themselves and of each other, and making one the source."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from engine.durable import sync_directory
from engine.errors import FormatError
from engine.store.layout import (
    ReplicaInfo,
    inspect_replica,
    lock_directory,
    read_volume_meta,
    store_errors,
    write_volume_meta,
)
from engine.store.maps import INTENT_MAP, create_full_map, list_changes, read_map
from engine.store.resize import resize_replica


class ReplicaSurvey(msgspec.Struct, frozen=True, kw_only=True):
    """`dirty_regions`: in which it may differ from the others. `changes`: how many regions it has seen change since a
    replica left, by that replica's name. `modified`: when its head was written last, in seconds since 1970."""

    info: ReplicaInfo
    dirty_regions: int
    changes: dict[str, int]
    modified: float


def survey_replica(directory: Path) -> ReplicaSurvey:
    """Changes nothing. Raises StoreError for a directory that could not be served."""
    info = inspect_replica(directory)
    with store_errors(directory, "read the replica"):
        head = (directory / info.chain[0]).stat()
        if head.st_size < info.size:
            raise FormatError(directory, f"{info.chain[0]} has {head.st_size} bytes, volume.meta says {info.size}")
        return ReplicaSurvey(
            info=info,
            dirty_regions=read_map(directory / INTENT_MAP).bit_count(),
            changes={name: read_map(directory / file).bit_count() for name, file in list_changes(directory).items()},
            modified=head.st_mtime,
        )


def take_as_source(directory: Path, *, size: int, others: Iterable[str]) -> None:
    """Make a replica ready to be the only one in sync of a volume of `size` bytes, durably.

    All that `others` hold is called changed since they left: they have a past of their own, so nothing that any map
    says of them holds any more. Harmless when it is done again, or when nothing comes of it. Raises StoreError.
    """
    if inspect_replica(directory).size < size:
        resize_replica(directory, size)
    lock = lock_directory(directory)
    try:
        with store_errors(directory, "write a region map"):
            size = read_volume_meta(directory).size
            for name in others:
                create_full_map(directory, name, size)
            sync_directory(directory)
    finally:
        os.close(lock)


def call_complete(directory: Path) -> None:
    """Take the mark of a rebuild that was not finished away, durably. Raises StoreError."""
    lock = lock_directory(directory)
    try:
        meta = read_volume_meta(directory)
        if meta.rebuilding:
            with store_errors(directory, "write volume.meta"):
                write_volume_meta(directory, msgspec.structs.replace(meta, rebuilding=False))
    finally:
        os.close(lock)
