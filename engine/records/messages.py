"""What nodes ask of the record server and what it answers, as MessagePack maps. Unknown keys are ignored."""

from __future__ import annotations

from typing import Literal, TypeVar

import msgspec

from engine.decoding import UNDECODABLE
from engine.errors import ProtocolError
from engine.record import VolumeRecord

VERSION_MIN = 1
VERSION_MAX = 1
MAX_WATCH = 30.0

Phase = Literal["", "taking", "serving", "draining", "released"]


class Lease(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Who serves a volume, so that others notice when it does no more. It makes nothing safe: epochs do that.

    `holder` is a node, `instance` a start of its process. `renewals` counts on while it lives. `wanted` is the node
    that a person or a controller asks to take over. `failover` and `cause` say which change of node is under way or
    was the last one; `drained` is how many seconds the holder before took to leave.
    """

    holder: str = ""
    instance: str = ""
    epoch: int = 0
    renewals: int = 0
    phase: Phase = ""
    wanted: str = ""
    failover: str = ""
    cause: str = ""
    drained: float = 0.0

    def renewed(self) -> Lease:
        return msgspec.structs.replace(self, renewals=self.renewals + 1)


class Presence(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A share manager that runs for a volume. `state`: standby, or what its share's status says; `summary` is that
    status as JSON; `connections` are its clients'; `peer` is where it answers other processes for the volume. `age`:
    seconds since it told, on the server's clock."""

    node: str
    instance: str
    state: str
    summary: str = ""
    connections: tuple[str, ...] = ()
    peer: str = ""
    age: float = 0.0


class Hello(msgspec.Struct, frozen=True, kw_only=True):
    """First message of either side: the versions it speaks (one, in the answer) and its challenge."""

    version_min: int
    version_max: int
    nonce: bytes


class Request(msgspec.Struct, frozen=True, kw_only=True, tag_field="op", omit_defaults=True):
    """Common root."""


class ReadRecord(Request, frozen=True, kw_only=True, tag="record_read"):
    volume: str


class SwapRecord(Request, frozen=True, kw_only=True, tag="record_swap"):
    """`attempt` names this change: once more, because the answer was lost, it is not a conflict with itself."""

    expected: int
    record: VolumeRecord
    attempt: str


class CreateRecord(Request, frozen=True, kw_only=True, tag="record_create"):
    record: VolumeRecord


class DeleteRecord(Request, frozen=True, kw_only=True, tag="record_delete"):
    volume: str
    expected: int


class ListRecords(Request, frozen=True, kw_only=True, tag="record_list"):
    """All of them."""


class ReadLease(Request, frozen=True, kw_only=True, tag="lease_read"):
    """Answered when its version is another than `unless`, at the latest after `patience` seconds."""

    volume: str
    unless: str = ""
    patience: float = 0.0


class SwapLease(Request, frozen=True, kw_only=True, tag="lease_swap"):
    volume: str
    expected: str
    lease: Lease
    attempt: str


class Announce(Request, frozen=True, kw_only=True, tag="announce"):
    volume: str
    presence: Presence


class ListPresences(Request, frozen=True, kw_only=True, tag="presence_list"):
    volume: str


class SetMark(Request, frozen=True, kw_only=True, tag="mark_set"):
    """A word about the volume that every node must know, such as that its filesystem is half made; None forgets it."""

    volume: str
    name: str
    text: str | None


class ReadMark(Request, frozen=True, kw_only=True, tag="mark_read"):
    volume: str
    name: str


AnyRequest = (
    ReadRecord
    | SwapRecord
    | CreateRecord
    | DeleteRecord
    | ListRecords
    | ReadLease
    | SwapLease
    | Announce
    | ListPresences
    | SetMark
    | ReadMark
)


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`status`: ok; conflict (`found` is the record's version); missing; refused and failed, with a `reason`."""

    status: Literal["ok", "conflict", "missing", "refused", "failed"] = "ok"
    found: int = 0
    reason: str = ""
    records: tuple[VolumeRecord, ...] = ()
    lease: Lease | None = None
    version: str = ""
    presences: tuple[Presence, ...] = ()
    mark: str | None = None


_ENCODER = msgspec.msgpack.Encoder(order="deterministic")
_T = TypeVar("_T")


def encode(message: msgspec.Struct) -> bytes:
    return _ENCODER.encode(message)


def decode(body: bytes, kind: type[_T]) -> _T:
    """Raises ProtocolError."""
    try:
        return msgspec.msgpack.decode(body, type=kind)
    except UNDECODABLE as error:
        raise ProtocolError(f"malformed message: {error}") from error


def decode_request(body: bytes) -> AnyRequest:
    """Raises ProtocolError."""
    try:
        request: AnyRequest = msgspec.msgpack.decode(body, type=AnyRequest)
    except UNDECODABLE as error:
        raise ProtocolError(f"malformed request: {error}") from error
    return request
