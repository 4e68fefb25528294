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


class OutOfRangeError(EngineError):
    """A request beyond the end of the volume, or not inside one frame."""

    def __init__(self, offset: int, length: int, size: int) -> None:
        super().__init__(offset, length, size)
        self.offset = offset
        self.length = length
        self.size = size

    def __str__(self) -> str:
        return f"request {self.offset}+{self.length} is outside the volume of {self.size} bytes"


class FrontendError(EngineError):
    """The block file cannot be mounted or served."""
