"""Bodies of the control frames, as msgpack maps. Unknown keys are ignored, so adjacent releases interoperate."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from engine.decoding import UNDECODABLE, Counter
from engine.errors import ProtocolError

VERSION_MIN = 1
VERSION_MAX = 2
CONFIRM_SINCE = 2


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
    """Claim the replica for (epoch, incarnation). `volume_uuid` must be that of the directory.

    `gathers`: the engine knows WRITTEN.
    """

    volume_uuid: str
    epoch: Counter
    incarnation: Counter
    gathers: bool = False


class Token(Message, frozen=True, kw_only=True):
    """Payload of a STALE_EPOCH answer: the highest token that the replica has seen. Of a WATCH: the owner's."""

    epoch: Counter
    incarnation: Counter


class OpenReply(Message, frozen=True, kw_only=True):
    """State of the replica at open.

    `size` in bytes, `region_size` in bytes per bit of the maps, `dirty_regions` how many intent bits are set,
    `tracked` whose change maps it keeps, `rebuilding` whether its content is known to be incomplete, `rebuild` whether
    more is missing than maps can tell: it has to be filled. `origin`, for a clone that is not independent yet, is the
    "VOLUME@SNAPSHOT" whose data it shares. `older_age` is how many seconds ago, at least, it last confirmed an epoch
    below this one; None when those have all ended in order. `watch`: it knows WATCH.
    """

    size: int
    region_size: int
    dirty_regions: int
    tracked: tuple[str, ...]
    rebuilding: bool
    rebuild: bool = False
    origin: str = ""
    older_age: float | None = None
    watch: bool = False


class Close(Message, frozen=True, kw_only=True):
    """The attachment ends in order. With `kept` a successor of the same epoch serves on, by what was confirmed."""

    kept: bool = False


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
    pinned: bool = False


class SnapshotsReply(Message, frozen=True, kw_only=True):
    """The live ones first, the oldest first; then those that a revert left aside, parents first.

    `head_allocated`: bytes that the head occupies, so what was written since the newest live one.
    """

    snapshots: tuple[SnapshotEntry, ...]
    head_allocated: int = 0


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


class ReadLayer(Message, frozen=True, kw_only=True):
    """What the image of a snapshot itself holds in the frame's range; an empty name is the head."""

    name: str = ""


class BeginRebuild(Message, frozen=True, kw_only=True):
    """Become an empty replica with these snapshots, keeping what is known to be right."""

    snapshots: tuple[SnapshotEntry, ...]


class Filled(Message, frozen=True, kw_only=True):
    """A snapshot's image is complete below offset `cursor`; `copied` bytes of data were written for that."""

    cursor: int
    copied: int = 0


class RebuildState(Message, frozen=True, kw_only=True):
    """How far a rebuild is: the images by name of the snapshot, and the head's cursor.

    A request asks for that to be made durable; the answer to BEGIN_REBUILD says what was.
    """

    snapshots: dict[str, Filled] = {}
    head: int = 0


class Digest(Message, frozen=True, kw_only=True):
    """Ask for checksums of what the disk has, in the range of the frame: of the volume, or of a snapshot.

    With `everything` also where its own image holds nothing.
    """

    snapshot: str = ""
    everything: bool = False


class Mend(Message, frozen=True, kw_only=True):
    """Put blocks of the head, or of a snapshot's own image, back at the offset of the frame.

    They must be what the checksums remember; a snapshot's are put back with `force` whatever the checksums say.
    """

    data: bytes
    snapshot: str = ""
    force: bool = False


class Corrupt(Message, frozen=True, kw_only=True):
    """Payload of a CORRUPT answer: the block's snapshot, empty when the head holds it, and a text for logs."""

    snapshot: str
    reason: str


class Resize(Message, frozen=True, kw_only=True):
    """Grow to `size` bytes; a replica that has them already has nothing to do."""

    size: int


class Pull(Message, frozen=True, kw_only=True):
    """One step of making a clone independent, which copies about `budget` bytes; with `finish` also the last one."""

    budget: int
    finish: bool = False


class PullReply(Message, frozen=True, kw_only=True):
    """`done`: the replica shares nothing (any more). `complete`: all is copied, and `finish` would end it.

    `copied` bytes in this step; `passed` of `total` bytes are done with by now.
    """

    done: bool
    complete: bool = False
    copied: int = 0
    passed: int = 0
    total: int = 0


class StatusReply(Message, frozen=True, kw_only=True):
    """What a replica says of itself. Sizes in bytes; `allocated` is what the chain occupies on disk.

    `corrupt` counts reads that did not match the checksums, `summed_regions` what has checksums, of all images.
    """

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
    corrupt: int = 0
    summed_regions: int = 0


_ENCODER = msgspec.msgpack.Encoder(order="deterministic")
_M = TypeVar("_M", bound=Message)


def encode(message: Message) -> bytes:
    return _ENCODER.encode(message)


def decode(payload: bytes, kind: type[_M]) -> _M:
    """Raises ProtocolError."""
    try:
        return msgspec.msgpack.decode(payload, type=kind)
    except UNDECODABLE as error:
        raise ProtocolError(f"malformed {kind.__name__}: {error}") from error


def decode_token(payload: bytes) -> tuple[int, int]:
    """Raises ProtocolError."""
    token = decode(payload, Token)
    return token.epoch, token.incarnation
