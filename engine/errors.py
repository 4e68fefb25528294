"""Every error that leaves the engine package is an `EngineError`; each keeps its data and writes its own message."""

from __future__ import annotations

from pathlib import Path


class EngineError(Exception):
    """Root of the tree."""


class ProtocolError(EngineError):
    """A peer sent something that is not the protocol. The connection is closed; nothing else is harmed."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"protocol error: {self.reason}"


class AuthenticationError(ProtocolError):
    """The peer could not prove that it knows the volume's secret."""

    def __str__(self) -> str:
        return f"authentication failed: {self.reason}"


class VersionError(EngineError):
    """Two releases that share no protocol version."""

    def __init__(self, ours: tuple[int, int], theirs: tuple[int, int]) -> None:
        super().__init__(ours, theirs)
        self.ours = ours
        self.theirs = theirs

    def __str__(self) -> str:
        return (
            f"no common protocol version: this side speaks {self.ours[0]}..{self.ours[1]}, "
            f"the peer {self.theirs[0]}..{self.theirs[1]}; upgrade the older one"
        )


class FencedError(EngineError):
    """A higher (epoch, incarnation) exists, so this attachment has lost the volume for good."""

    def __init__(self, ours: tuple[int, int], highest: tuple[int, int], where: str) -> None:
        super().__init__(ours, highest, where)
        self.ours = ours
        self.highest = highest
        self.where = where

    def __str__(self) -> str:
        return (
            f"fenced: {self.where} has seen epoch {self.highest[0]}.{self.highest[1]}, "
            f"this attachment is {self.ours[0]}.{self.ours[1]}"
        )


class NoReplicaError(EngineError):
    """None of the recorded in-sync replicas could be opened."""

    def __init__(self, volume: str, reasons: dict[str, str]) -> None:
        super().__init__(volume, reasons)
        self.volume = volume
        self.reasons = reasons

    def __str__(self) -> str:
        detail = "; ".join(f"{name}: {why}" for name, why in sorted(self.reasons.items()))
        return (
            f"volume {self.volume!r} cannot be attached: none of its in-sync replicas answers ({detail}). "
            "Bring one of them back; replicas that are not in sync are stale and are not used"
        )


class RecordError(EngineError):
    """The volume's record cannot be read or written."""


class RecordMissingError(RecordError):
    def __init__(self, where: Path) -> None:
        super().__init__(where)
        self.where = where

    def __str__(self) -> str:
        return f"there is no volume record at {self.where}"


class RecordConflictError(RecordError):
    """Somebody else changed the record since it was read: read it again and decide again."""

    def __init__(self, expected: int, found: int) -> None:
        super().__init__(expected, found)
        self.expected = expected
        self.found = found

    def __str__(self) -> str:
        return f"the volume record is at version {self.found}, not {self.expected}"


class StoreError(EngineError):
    """A replica directory cannot be used as it is."""

    def __init__(self, directory: Path, reason: str) -> None:
        super().__init__(directory, reason)
        self.directory = directory
        self.reason = reason

    def __str__(self) -> str:
        return f"replica directory {self.directory}: {self.reason}"


class FormatError(StoreError):
    """Written by a newer release, or not a replica directory."""


class SnapshotExistsError(StoreError):
    """The name is taken, perhaps by a snapshot that is marked as removed and not gone yet."""

    def __init__(self, directory: Path, name: str) -> None:
        super().__init__(directory, f"snapshot {name!r} exists already")
        self.name = name


class SnapshotNotFoundError(StoreError):
    def __init__(self, directory: Path, name: str) -> None:
        super().__init__(directory, f"there is no snapshot {name!r}")
        self.name = name


class SnapshotInUseError(StoreError):
    """The snapshot cannot be merged away at present, because of what builds on it."""


class BusyError(EngineError):
    """One change of the snapshots or the replicas at a time."""

    def __init__(self, volume: str, what: str) -> None:
        super().__init__(volume, what)
        self.volume = volume
        self.what = what

    def __str__(self) -> str:
        return f"volume {self.volume!r} is busy: {self.what} is under way; try again when that is done"


class CorruptBlockError(StoreError):
    """A block is not what its checksum says; `offset` is where in the volume, `image` the file that holds it."""

    def __init__(self, directory: Path, image: str, offset: int) -> None:
        super().__init__(directory, f"the block at {offset} of {image} does not match its checksum")
        self.image = image
        self.offset = offset


class NotEqualError(EngineError):
    """The replicas cannot take a snapshot at one point while one of them is not what the others are."""

    def __init__(self, volume: str, reason: str) -> None:
        super().__init__(volume, reason)
        self.volume = volume
        self.reason = reason

    def __str__(self) -> str:
        return f"volume {self.volume!r} cannot change its snapshots now: {self.reason}; try again when that is done"


class ReplicasRefuseError(EngineError):
    """No replica did it; nothing has changed."""

    def __init__(self, volume: str, reason: str) -> None:
        super().__init__(volume, reason)
        self.volume = volume
        self.reason = reason

    def __str__(self) -> str:
        return f"the snapshots of volume {self.volume!r} are as they were: {self.reason or 'no replica answers'}"


class NeedsRebuildError(EngineError):
    """A copy of what changed would not make this replica equal to the others."""

    def __init__(self, replica: str, reason: str) -> None:
        super().__init__(replica, reason)
        self.replica = replica
        self.reason = reason

    def __str__(self) -> str:
        return f"replica {self.replica} has to be rebuilt: {self.reason}"


class UnfinishedRevertError(EngineError):
    def __init__(self, volume: str, name: str, reason: str) -> None:
        super().__init__(volume, name, reason)
        self.volume = volume
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"volume {self.volume!r} was being reverted to snapshot {self.name!r} and cannot be used before "
            f"that is done, but its replicas refuse: {self.reason}"
        )


class NoSuchSnapshotError(EngineError):
    def __init__(self, volume: str, name: str) -> None:
        super().__init__(volume, name)
        self.volume = volume
        self.name = name

    def __str__(self) -> str:
        return (
            f"volume {self.volume!r} has no snapshot {self.name!r}: "
            f"`share-manager snapshot list {self.volume}` shows what there is"
        )


class SnapshotTakenError(EngineError):
    def __init__(self, volume: str, name: str, removed: bool) -> None:
        super().__init__(volume, name, removed)
        self.volume = volume
        self.name = name
        self.removed = removed

    def __str__(self) -> str:
        why = ", deleted but not merged away yet" if self.removed else ""
        return f"volume {self.volume!r} has a snapshot {self.name!r} already{why}: choose another name"


class SnapshotReadError(EngineError):
    """Somebody reads it through the engine."""

    def __init__(self, volume: str, name: str) -> None:
        super().__init__(volume, name)
        self.volume = volume
        self.name = name

    def __str__(self) -> str:
        return (
            f"snapshot {self.name!r} of volume {self.volume!r} is being read: end the `share-manager snapshot mount`, "
            "`browse` or `cp` first"
        )


class TooManySnapshotsError(EngineError):
    def __init__(self, volume: str, limit: int, removed: int) -> None:
        super().__init__(volume, limit, removed)
        self.volume = volume
        self.limit = limit
        self.removed = removed

    def __str__(self) -> str:
        gone = f", {self.removed} of them deleted and not merged away yet" if self.removed else ""
        return (
            f"volume {self.volume!r} has {self.limit} snapshots{gone}, and cannot have more: delete some with "
            f"`share-manager snapshot delete`, and see that they are merged away with `share-manager snapshot purge`"
        )


class InUseError(EngineError):
    """Not while somebody may have the volume mounted."""

    def __init__(self, volume: str, what: str) -> None:
        super().__init__(volume, what)
        self.volume = volume
        self.what = what

    def __str__(self) -> str:
        return (
            f"volume {self.volume!r} is in use: "
            f"stop it with `share-manager stop {self.volume}` before it is {self.what}"
        )


class ReplicaNameError(EngineError):
    """There is such a replica already, or none, or there cannot be one."""

    def __init__(self, volume: str, name: str, problem: str) -> None:
        super().__init__(volume, name, problem)
        self.volume = volume
        self.name = name
        self.problem = problem

    def __str__(self) -> str:
        return f"volume {self.volume!r}: {self.problem}"


class LastReplicaError(EngineError):
    """A volume keeps at least one replica that is in sync."""

    def __init__(self, volume: str, name: str) -> None:
        super().__init__(volume, name)
        self.volume = volume
        self.name = name

    def __str__(self) -> str:
        return (
            f"replica {self.name} is the only one of volume {self.volume!r} that is in sync and cannot be removed: "
            "add another one and wait until it is in sync"
        )


class OutOfRangeError(EngineError):
    """A request beyond the end of the volume, or not inside one frame."""

    def __init__(self, offset: int, length: int, size: int) -> None:
        super().__init__(offset, length, size)
        self.offset = offset
        self.length = length
        self.size = size

    def __str__(self) -> str:
        return f"request {self.offset}+{self.length} is outside the volume of {self.size} bytes"


class ResizeError(EngineError):
    """The volume keeps its size."""

    def __init__(self, volume: str, reason: str) -> None:
        super().__init__(volume, reason)
        self.volume = volume
        self.reason = reason

    def __str__(self) -> str:
        return f"volume {self.volume!r} keeps its size: {self.reason}"


class FrontendError(EngineError):
    """The block file cannot be mounted or served."""
