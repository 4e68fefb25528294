"""What the record server knows of the volumes, and what of it survives a power cut.

    DIR/NAME.json          the record, with the name of its last change
    DIR/NAME.lease.json    the lease, without renewals: those, and who is present, are gone with the process
    DIR/NAME.marks.json    words about the volume

All are replaced with fsync and rename. A lease's version names the start of the server and a number, so none comes
twice.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from engine.decoding import UNDECODABLE
from engine.durable import replace_file, sync_directory
from engine.errors import RecordError
from engine.record import VolumeRecord, decode_record, encode_record
from engine.records.messages import (
    Announce,
    Answer,
    AnyRequest,
    CreateRecord,
    DeleteRecord,
    Lease,
    ListPresences,
    ListRecords,
    Presence,
    ReadLease,
    ReadMark,
    ReadRecord,
    SetMark,
    SwapLease,
    SwapRecord,
)

FORGET_PRESENCE = 120.0
_RECORD, _LEASE, _MARKS = ".json", ".lease.json", ".marks.json"
# a name becomes a file's
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_T = TypeVar("_T")


class _Kept(msgspec.Struct, frozen=True, kw_only=True):
    record: VolumeRecord
    attempt: str = ""


class _Volume:
    def __init__(self, record: VolumeRecord, attempt: str = "") -> None:
        self.record = record
        self.attempt = attempt
        self.lease = Lease()
        self.lease_attempt = ""
        self.changes = 0
        self.marks: dict[str, str] = {}
        self.present: dict[str, tuple[Presence, float]] = {}


class Ledger:
    """`changed` is called with the volume's name after each change of its lease."""

    def __init__(self, directory: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises RecordError for what cannot be read, OSError."""
        self.changed: Callable[[str], None] = lambda volume: None
        self._directory = directory
        self._clock = clock
        self._boot = os.urandom(6).hex()
        self._volumes: dict[str, _Volume] = {}
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        for path in sorted(directory.glob(f"*{_RECORD}")):
            name = path.name.removesuffix(_RECORD)
            if _NAME.fullmatch(name):
                self._volumes[name] = self._load(name)

    def _load(self, name: str) -> _Volume:
        kept = self._decode(name, _RECORD, _Kept)
        volume = _Volume(_checked(kept.record), kept.attempt)
        with contextlib.suppress(FileNotFoundError):
            volume.lease = self._decode(name, _LEASE, Lease)
        with contextlib.suppress(FileNotFoundError):
            volume.marks = self._decode(name, _MARKS, dict[str, str])
        return volume

    def _decode(self, name: str, suffix: str, kind: type[_T]) -> _T:
        path = self._path(name, suffix)
        try:
            return msgspec.json.decode(path.read_bytes(), type=kind)
        except UNDECODABLE as error:
            raise RecordError(f"{path} is damaged: {error}") from error

    def _path(self, name: str, suffix: str) -> Path:
        return self._directory / f"{name}{suffix}"

    def _keep(self, name: str, suffix: str, content: msgspec.Struct | dict[str, str]) -> None:
        replace_file(self._path(name, suffix), msgspec.json.encode(content), mode=0o600)

    def lease_version(self, volume: str) -> str:
        found = self._volumes.get(volume)
        return f"{self._boot}:{found.changes}" if found else ""

    def answer(self, request: AnyRequest) -> Answer:
        """Carry out a request; one to wait for a change is answered with how things are now. Blocks on the disk."""
        try:
            return self._answer(request)
        except RecordError as error:
            return Answer(status="refused", reason=str(error))
        except OSError as error:
            # on disk is the old or the new; an attempt that is repeated writes the new one again
            return Answer(status="failed", reason=f"the record server's disk: {error.strerror}")

    def _answer(self, request: AnyRequest) -> Answer:
        match request:
            case ListRecords():
                return Answer(records=tuple(volume.record for volume in self._volumes.values()))
            case CreateRecord():
                return self._create(request)
            case SwapRecord():
                name = request.record.volume
            case _:
                name = request.volume
        volume = self._volumes.get(name)
        if volume is None:
            return Answer(status="missing")
        match request:
            case ReadRecord():
                return Answer(records=(volume.record,))
            case SwapRecord():
                return self._swap(volume, request)
            case DeleteRecord():
                return self._delete(volume, request)
            case ReadLease():
                return self._lease(volume, "ok")
            case SwapLease():
                return self._swap_lease(volume, request)
            case Announce():
                volume.present[request.presence.node] = request.presence, self._clock()
                return Answer()
            case ListPresences():
                return Answer(presences=tuple(self._present(volume)))
            case SetMark():
                marks = {**volume.marks, request.name: request.text or ""}
                if request.text is None:
                    del marks[request.name]
                self._keep(name, _MARKS, marks)
                volume.marks = marks
                return Answer()
            case ReadMark():
                return Answer(mark=volume.marks.get(request.name))

    def _create(self, request: CreateRecord) -> Answer:
        name = request.record.volume
        if not _NAME.fullmatch(name):
            raise RecordError(f"{name!r} is not the name of a volume")
        if name in self._volumes and self._volumes[name].record == request.record:
            return Answer()  # asked once more, for the answer was lost
        if name in self._volumes:
            raise RecordError(f"there is a record of volume {name} already")
        record = _checked(request.record)
        self._keep(name, _RECORD, _Kept(record=record))
        self._volumes[name] = _Volume(record)
        return Answer()

    def _swap(self, volume: _Volume, request: SwapRecord) -> Answer:
        before, record = volume.record, _checked(request.record)
        if request.attempt == volume.attempt and record == before:
            return Answer()
        if before.version != request.expected:
            return Answer(status="conflict", found=before.version)
        if record.version != before.version + 1 or record.uuid != before.uuid or record.epoch < before.epoch:
            raise RecordError(f"a record of volume {before.volume} cannot follow version {before.version} so")
        self._keep(before.volume, _RECORD, _Kept(record=record, attempt=request.attempt))
        volume.record, volume.attempt = record, request.attempt
        return Answer()

    def _delete(self, volume: _Volume, request: DeleteRecord) -> Answer:
        if volume.record.version != request.expected:
            return Answer(status="conflict", found=volume.record.version)
        for suffix in (_MARKS, _LEASE, _RECORD):
            self._path(request.volume, suffix).unlink(missing_ok=True)
        sync_directory(self._directory)
        del self._volumes[request.volume]
        return Answer()

    def _lease(self, volume: _Volume, status: Literal["ok", "conflict"]) -> Answer:
        return Answer(status=status, lease=volume.lease, version=f"{self._boot}:{volume.changes}")

    def _swap_lease(self, volume: _Volume, request: SwapLease) -> Answer:
        if request.attempt == volume.lease_attempt and request.lease == volume.lease:
            return self._lease(volume, "ok")
        if request.expected != f"{self._boot}:{volume.changes}":
            return self._lease(volume, "conflict")
        if request.lease != msgspec.structs.replace(volume.lease, renewals=request.lease.renewals):
            self._keep(request.volume, _LEASE, msgspec.structs.replace(request.lease, renewals=0))
        volume.lease, volume.lease_attempt = request.lease, request.attempt
        volume.changes += 1
        self.changed(request.volume)
        return self._lease(volume, "ok")

    def _present(self, volume: _Volume) -> list[Presence]:
        now = self._clock()
        return [
            msgspec.structs.replace(presence, age=now - at)
            for presence, at in volume.present.values()
            if now - at < FORGET_PRESENCE
        ]


def _checked(record: VolumeRecord) -> VolumeRecord:
    """By the rules of a record: none that contradicts itself, or is of a newer format. Raises RecordError."""
    return decode_record(encode_record(record), f"of {record.volume}")
