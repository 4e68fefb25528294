"""Bodies of the control frames, as msgpack maps. Unknown keys are ignored, so adjacent releases interoperate."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from engine.errors import ProtocolError

VERSION_MIN = 1
VERSION_MAX = 1


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Common root; all fields of a message that a later release adds must have defaults."""


class Hello(Message, frozen=True, kw_only=True):
    """Client to replica, first frame: versions it speaks and its challenge (32 random bytes)."""

    version_min: int
    version_max: int
    nonce: bytes


class HelloReply(Message, frozen=True, kw_only=True):
    """The version chosen and the replica's challenge. Says nothing else to a peer that has proven nothing."""

    version: int
    nonce: bytes


class Auth(Message, frozen=True, kw_only=True):
    """Client's proof: HMAC-SHA-256 over role, version and both challenges."""

    proof: bytes


class AuthReply(Message, frozen=True, kw_only=True):
    """The replica's proof, and who it is. `instance` is random for every start of the process."""

    proof: bytes
    replica: str
    instance: str


class Open(Message, frozen=True, kw_only=True):
    """Claim the replica for (epoch, incarnation). `volume_uuid` must be that of the directory."""

    volume_uuid: str
    epoch: int
    incarnation: int


class Token(Message, frozen=True, kw_only=True):
    """Payload of a STALE_EPOCH answer: the highest token that the replica has seen."""

    epoch: int
    incarnation: int


class OpenReply(Message, frozen=True, kw_only=True):
    """State of the replica at open.

    `size` in bytes, `region_size` in bytes per bit of the maps, `dirty_regions` how many intent bits are set,
    `tracked` whose change maps it keeps, `rebuilding` whether its content is known to be incomplete.
    """

    size: int
    region_size: int
    dirty_regions: int
    tracked: tuple[str, ...]
    rebuilding: bool


class Track(Message, frozen=True, kw_only=True):
    """The complete list of departed replicas whose change maps this replica must keep."""

    names: tuple[str, ...]


class Bitmap(Message, frozen=True, kw_only=True):
    """Ask for a map: `name` of a tracked replica, or empty for the intent map. Paged by offset/length of the frame."""

    name: str = ""


class State(Message, frozen=True, kw_only=True):
    """Set the replica's own marks; None leaves one as it is."""

    rebuilding: bool | None = None


class Snapshot(Message, frozen=True, kw_only=True):
    """Freeze the head as snapshot `name`. `created` is RFC 3339, UTC, and the same for all replicas."""

    name: str
    created: str
    user_created: bool = True
    labels: dict[str, str] = msgspec.field(default_factory=dict)


class SnapshotEntry(Message, frozen=True, kw_only=True):
    """One snapshot of a SNAPSHOTS answer; sizes in bytes. See `engine.store.SnapshotInfo`."""

    name: str
    parent: str
    created: str
    user_created: bool
    removed: bool
    live: bool
    children: int
    size: int
    allocated: int
    labels: dict[str, str] = msgspec.field(default_factory=dict)


class SnapshotsReply(Message, frozen=True, kw_only=True):
    """The live ones first, the oldest first; then those that a revert left aside, parents first."""

    snapshots: tuple[SnapshotEntry, ...]


class Revert(Message, frozen=True, kw_only=True):
    """Throw the head away for a new one on top of snapshot `name`; `created` is the new head's."""

    name: str
    created: str


class RemoveSnapshot(Message, frozen=True, kw_only=True):
    """Mark snapshot `name` as removed."""

    name: str


class Coalesce(Message, frozen=True, kw_only=True):
    """One step of getting rid of the removed snapshot `name`, which copies about `budget` bytes."""

    name: str
    budget: int


class CoalesceReply(Message, frozen=True, kw_only=True):
    """`done` when the snapshot is gone. `copied` bytes in this step; `left` is about what is still to be copied."""

    done: bool
    copied: int
    left: int


class ReadSnapshot(Message, frozen=True, kw_only=True):
    """Read from snapshot `name`, at the offset and length of the frame."""

    name: str


class StatusReply(Message, frozen=True, kw_only=True):
    """What a replica says of itself. Sizes in bytes; `allocated` is what the chain occupies on disk."""

    replica: str
    instance: str
    volume: str
    volume_uuid: str
    size: int
    allocated: int
    epoch: int
    incarnation: int
    rebuilding: bool
    dirty_regions: int
    tracked: tuple[str, ...]
    reads: int
    writes: int
    flushes: int
    unmaps: int
    read_bytes: int
    written_bytes: int


_ENCODER = msgspec.msgpack.Encoder(order="deterministic")
_M = TypeVar("_M", bound=Message)


def encode(message: Message) -> bytes:
    return _ENCODER.encode(message)


def decode(payload: bytes, kind: type[_M]) -> _M:
    """Raises ProtocolError."""
    try:
        return msgspec.msgpack.decode(payload, type=kind)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ProtocolError(f"malformed {kind.__name__}: {error}") from error


def decode_token(payload: bytes) -> tuple[int, int]:
    """Raises ProtocolError."""
    token = decode(payload, Token)
    return token.epoch, token.incarnation
