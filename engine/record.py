"""The volume record: who is in sync, under which epoch. Changed only by compare-and-swap.

A `VolumeRecord` is the one place that says which replicas hold every acknowledged write. The engine that holds
the epoch changes `in_sync`; whoever attaches bumps `epoch`. Both go through `RecordStore.swap`, which refuses a
writer that has not seen the newest version. `FileRecordStore` is the embedded implementation (one JSON file,
replaced with fsync and rename under a lock), `engine.records.RemoteRecordStore` the one for several nodes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import msgspec

from engine.decoding import UNDECODABLE
from engine.durable import replace_file
from engine.errors import RecordConflictError, RecordError, RecordMissingError

RECORD_FORMAT = 1


class ReplicaRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One replica of a volume.

    `address` is `unix:/path` or `tcp:host:port`; `directory` is where its node keeps it, below that node's data
    directory unless it is absolute. `node` names that node; it is empty where there is only one.
    """

    name: str
    address: str
    directory: str
    node: str = ""


class PendingRevert(msgspec.Struct, frozen=True, kw_only=True):
    """A revert to snapshot `revert` that may have reached some replicas; `created` is the time of the new head."""

    revert: str
    created: str


class VolumeRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What must survive every crash about a volume.

    `version` counts swaps. `epoch` counts attachments (0: never attached). `size` is in bytes.
    `in_sync` names the members that hold every acknowledged write; it is never empty. `pending` is finished by the next
    attachment before anything is read. `reverted_without` names absent replicas that a revert did not reach, so that no
    map of changes tells what they lack; whoever becomes a member again is taken out.
    """

    format: int = RECORD_FORMAT
    volume: str
    uuid: str
    size: int
    version: int = 1
    epoch: int = 0
    replicas: tuple[ReplicaRecord, ...]
    in_sync: tuple[str, ...]
    pending: PendingRevert | None = None
    reverted_without: tuple[str, ...] = ()

    def with_members(self, in_sync: tuple[str, ...]) -> VolumeRecord:
        """The same with this in-sync set, of the same version."""
        without = tuple(name for name in self.reverted_without if name not in in_sync)
        return msgspec.structs.replace(self, in_sync=in_sync, reverted_without=without)

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
    except UNDECODABLE as error:
        raise RecordError(f"the volume record {where} is damaged: {error}") from error
    if record.format > RECORD_FORMAT:
        raise RecordError(
            f"the volume record {where} has format {record.format}, this release knows {RECORD_FORMAT}: "
            "use the newer release"
        )
    if reason := _contradiction(record):
        raise RecordError(f"the volume record {where} is damaged: {reason}")
    return record


def _contradiction(record: VolumeRecord) -> str:
    names = [replica.name for replica in record.replicas]
    if len(set(names)) < len(names):
        return "two replicas have the same name"
    if not record.in_sync or len(set(record.in_sync)) < len(record.in_sync):
        return "in_sync must name at least one replica, and none twice"
    if strangers := sorted(set(record.in_sync).difference(names)):
        return f"in_sync names {strangers[0]!r}, which is no replica of the volume"
    if record.size <= 0 or record.epoch < 0:
        return f"size {record.size} and epoch {record.epoch} cannot be"
    return ""


def bump_epoch(store: RecordStore, attempts: int = 8, check: Callable[[], None] = lambda: None) -> VolumeRecord:
    """Claim the next epoch for a new attachment and return the record that carries it.

    `check` raises when it is not ours to claim. It is asked between reading and writing: whoever is let in its place
    after that, and claims, makes the writing fail, or comes after it.

    Raises RecordError, and RecordConflictError after `attempts` lost races.
    """
    for attempt in range(attempts):
        record = store.read()
        check()
        claimed = record.next(epoch=record.epoch + 1)
        try:
            store.swap(record.version, claimed)
        except RecordConflictError:
            if attempt == attempts - 1:
                raise
            continue
        return claimed
    raise AssertionError("unreachable")
