"""The volume record: who is in sync, under which epoch. Changed only by compare-and-swap.

A `VolumeRecord` is the one place that says which replicas hold every acknowledged write. The engine that holds
the epoch changes `in_sync`; whoever attaches bumps `epoch`. Both go through `RecordStore.swap`, which refuses a
writer that has not seen the newest version. `FileRecordStore` is the embedded implementation (one JSON file,
replaced with fsync and rename under a lock); Kubernetes gets its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import msgspec

from engine.durable import replace_file
from engine.errors import RecordConflictError, RecordError, RecordMissingError

RECORD_FORMAT = 1


class ReplicaRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One replica of a volume.

    `address` is `unix:/path` or `tcp:host:port`; `directory` is where its node keeps it.
    """

    name: str
    address: str
    directory: str


class VolumeRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What must survive every crash about a volume.

    `version` counts swaps. `epoch` counts attachments (0: never attached). `size` is in bytes.
    `in_sync` names the members that hold every acknowledged write; it is never empty.
    """

    format: int = RECORD_FORMAT
    volume: str
    uuid: str
    size: int
    version: int = 1
    epoch: int = 0
    replicas: tuple[ReplicaRecord, ...]
    in_sync: tuple[str, ...]

    def next(self, **changes: object) -> VolumeRecord:
        """This record with `changes`, one version on."""
        return msgspec.structs.replace(self, version=self.version + 1, **changes)


class RecordStore(Protocol):
    def read(self) -> VolumeRecord:
        """Newest record. Raises RecordError."""

    def swap(self, expected_version: int, new: VolumeRecord) -> None:
        """Replace version `expected_version` by `new`, durably. Raises RecordConflictError, RecordError."""


class FileRecordStore:
    """The record as one JSON file, for one machine."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        # a file of its own: the record itself is replaced by rename, which would leave a lock on a dead inode
        fd = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def create(self, record: VolumeRecord) -> None:
        """Write the first record. Raises RecordError when there is one already."""
        with self._locked():
            if self.path.exists():
                raise RecordError(f"there is a volume record at {self.path} already")
            self._write(record)

    def read(self) -> VolumeRecord:
        try:
            raw = self.path.read_bytes()
        except FileNotFoundError:
            raise RecordMissingError(self.path) from None
        except OSError as error:
            raise RecordError(f"cannot read the volume record {self.path}: {error.strerror}") from error
        return decode_record(raw, str(self.path))

    def swap(self, expected_version: int, new: VolumeRecord) -> None:
        with self._locked():
            found = self.read()
            if found.version != expected_version:
                raise RecordConflictError(expected_version, found.version)
            self._write(new)

    def _write(self, record: VolumeRecord) -> None:
        if not record.in_sync:
            raise RecordError("the in-sync set of a volume must never become empty")
        try:
            replace_file(self.path, encode_record(record), mode=0o600)
        except OSError as error:
            raise RecordError(f"cannot write the volume record {self.path}: {error.strerror}") from error


def encode_record(record: VolumeRecord) -> bytes:
    return msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n"


def decode_record(raw: bytes, where: str) -> VolumeRecord:
    try:
        record = msgspec.json.decode(raw, type=VolumeRecord)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise RecordError(f"the volume record {where} is damaged: {error}") from error
    if record.format > RECORD_FORMAT:
        raise RecordError(
            f"the volume record {where} has format {record.format}, this release knows {RECORD_FORMAT}: "
            "use the newer release"
        )
    return record


def bump_epoch(store: RecordStore, attempts: int = 8) -> VolumeRecord:
    """Claim the next epoch for a new attachment and return the record that carries it.

    Raises RecordError, and RecordConflictError after `attempts` lost races.
    """
    for attempt in range(attempts):
        record = store.read()
        claimed = record.next(epoch=record.epoch + 1)
        try:
            store.swap(record.version, claimed)
        except RecordConflictError:
            if attempt == attempts - 1:
                raise
            continue
        return claimed
    raise AssertionError("unreachable")
