"""What an engine can be asked to do, beside its data path: one Struct for each request, one for its result.

They travel over the control socket (`engine.client.EngineClient.run`, engine/control.py), tagged by `op`. Handlers are
listed in engine/controller/handlers.py.
"""

from __future__ import annotations

import msgspec

from engine.wire.messages import SnapshotEntry


class Operation(msgspec.Struct, frozen=True, kw_only=True, tag_field="op"):
    """Common root of the requests."""


class Resize(Operation, frozen=True, tag="resize"):
    """Grow the volume to `size` bytes. Raises ResizeError, BusyError."""

    size: int


class Resized(msgspec.Struct, frozen=True, kw_only=True):
    """`size` in bytes now, `before` what it was."""

    size: int
    before: int


class OperationProgress(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How far an operation is: `done` of `total` bytes, `rate` bytes a second, `left` seconds (None: not known)."""

    done: int = 0
    total: int = 0
    rate: float = 0.0
    left: float | None = None
    message: str = ""


class OperationFailure(msgspec.Struct, frozen=True, kw_only=True):
    """`kind` is the class of the error, `message` says what is wrong and what to do."""

    kind: str
    message: str


class OperationLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of an answer: progress, any number of times, then a result or an error."""

    progress: OperationProgress | None = None
    result: msgspec.Raw = msgspec.Raw()
    error: OperationFailure | None = None


class SnapshotCreate(Operation, frozen=True, tag="snapshot_create"):
    """Keep the volume as it is now under `name`, on all replicas alike.

    It waits up to `patience` seconds for replicas that are almost up to date. With `check` nothing is made: it is only
    said, after that waiting, what would stand in the way.
    """

    name: str
    labels: dict[str, str] = {}
    patience: float = 10.0
    check: bool = False


class SnapshotCreated(msgspec.Struct, frozen=True, kw_only=True):
    """`created` is RFC 3339, UTC; `held` is for how many seconds the clients' requests had to wait."""

    name: str
    created: str = ""
    held: float = 0.0


class SnapshotList(Operation, frozen=True, tag="snapshot_list"):
    """All snapshots, with those that are marked as removed and not merged away yet."""


class PurgeStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Merging of removed snapshots. Bytes, of the replica that has most to do."""

    active: bool = False
    done: int = 0
    total: int = 0


class SnapshotsListed(msgspec.Struct, frozen=True, kw_only=True):
    """As `replica` says, the first that is in sync. The live ones first, the oldest first; sizes in bytes.

    `head_allocated` is what was written since the newest live one.
    """

    volume: str
    size: int
    replica: str
    snapshots: tuple[SnapshotEntry, ...]
    head_allocated: int
    purge: PurgeStatus


class SnapshotDelete(Operation, frozen=True, tag="snapshot_delete"):
    """Mark as removed. What it holds is merged away in the background."""

    name: str


class SnapshotDeleted(msgspec.Struct, frozen=True, kw_only=True):
    name: str


class SnapshotRevert(Operation, frozen=True, tag="snapshot_revert"):
    """Make the volume what it was at snapshot `name`, and lose what was written since. Not while a file is served."""

    name: str


class SnapshotReverted(msgspec.Struct, frozen=True, kw_only=True):
    name: str


class SnapshotPurge(Operation, frozen=True, tag="snapshot_purge"):
    """Merge away all that is removed, and wait for it.

    A removed snapshot that the head builds on needs one on top of it first; a system snapshot is taken then.
    """


class SnapshotPurged(msgspec.Struct, frozen=True, kw_only=True):
    """`merged` names what is gone; `copied` is in bytes, on the replica that copied most."""

    merged: tuple[str, ...]
    copied: int


class ReplicaAdd(Operation, frozen=True, tag="replica_add"):
    """Add a replica, whose server listens on `address` for an empty directory that is marked as rebuilding."""

    name: str
    address: str
    directory: str


class ReplicaRemove(Operation, frozen=True, tag="replica_remove"):
    """Remove a replica, in sync or not, but never the last in-sync one."""

    name: str


class ReplicaWait(Operation, frozen=True, tag="replica_wait"):
    """Wait until a replica is in sync; the progress says how far it is, and why it is not when that is so."""

    name: str


class ReplicaResult(msgspec.Struct, frozen=True, kw_only=True):
    """The replicas after the operation, and those of them that are in sync."""

    replicas: tuple[str, ...]
    in_sync: tuple[str, ...]


class ResyncLimit(Operation, frozen=True, tag="resync_limit"):
    """Bound what replicas are brought up to date with to `rate` bytes a second; 0: what clients leave."""

    rate: float


class ResyncLimited(msgspec.Struct, frozen=True, kw_only=True):
    rate: float


class CloneFinish(Operation, frozen=True, tag="clone_finish"):
    """Wait until a clone shares nothing with its source any more. `rate` in bytes a second bounds the copying
    meanwhile; 0: nothing does; None: as ever."""

    rate: int | None = None


class CloneFinished(msgspec.Struct, frozen=True, kw_only=True):
    """`origin` is what it shared data with until now; empty when it was independent already."""

    origin: str


class SnapshotOpen(Operation, frozen=True, tag="snapshot_open"):
    """Read a snapshot. After the answer the connection carries frames (engine/controller/browse.py).

    While it is open the snapshot cannot be deleted.
    """

    name: str


class SnapshotOpened(msgspec.Struct, frozen=True, kw_only=True):
    """`size` is that of the volume then, `allocated` about what of it has data; bytes."""

    name: str
    created: str
    size: int
    allocated: int


class Scrub(Operation, frozen=True, kw_only=True, tag="scrub"):
    """Read everything from all in-sync disks and compare it; `repair` what can be decided.

    `rate` in bytes of volume a second, 0 for as fast as it goes.
    """

    rate: int = 64 << 20
    repair: bool = True


class ScrubFinding(msgspec.Struct, frozen=True, kw_only=True):
    """`length` bytes at `offset` of `snapshot` (empty: of the volume's head) on `replica`.

    `kind`: checksum (it is not what its checksum says), differs (from the other replicas), unreadable. `outcome`:
    repaired, found (nothing was to be repaired), undecidable (nobody can tell which replica is right), failed.
    """

    replica: str
    snapshot: str
    offset: int
    length: int
    kind: str
    outcome: str


class Scrubbed(msgspec.Struct, frozen=True, kw_only=True):
    """`verified` bytes of all `replicas` were read. `found` counts findings, of which `findings` has the first 1000."""

    replicas: tuple[str, ...]
    snapshots: int
    verified: int
    found: int
    repaired: int
    undecidable: int
    findings: tuple[ScrubFinding, ...]
    seconds: float
