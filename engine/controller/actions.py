"""What the core asks its driver to do, beside frames and answers, and the states that it tells of."""

from __future__ import annotations

from enum import Enum
from typing import Any

import msgspec


class ReplicaState(Enum):
    """`LEAVING`: failed, not recorded yet. `JOINING`: complete, not recorded yet."""

    OUT = "out"
    RESYNCING = "resyncing"
    JOINING = "joining"
    IN_SYNC = "in_sync"
    LEAVING = "leaving"


class Action(msgspec.Struct, frozen=True):
    """Something for the driver to do."""


class WriteRecord(Action, frozen=True):
    """Make `in_sync` the recorded set by compare-and-swap under our epoch, then call `recorded(in_sync)`."""

    in_sync: tuple[str, ...]


class Disconnect(Action, frozen=True):
    """Close the connection: nothing the replica still says counts."""

    replica: str
    reason: str


class ReplicaLeft(Action, frozen=True):
    """The record no longer names it."""

    replica: str
    reason: str


class ReplicaJoined(Action, frozen=True):
    replica: str


class Equalised(Action, frozen=True):
    """All members read the same again after a crash."""

    regions: int


class Damaged(Action, frozen=True):
    """`replica` holds something else in this range than was written, or (`media`) cannot read it.

    `snapshot` names whose image it is, empty for the head's.
    """

    replica: str
    offset: int
    length: int
    snapshot: str
    media: bool


class Repaired(Action, frozen=True):
    """A range of the head was written anew, or could not be. `token` is that of `repair`."""

    replicas: tuple[str, ...]
    offset: int
    length: int
    ok: bool
    token: Any = None


class Unreadable(Action, frozen=True):
    """No in-sync replica can read this range."""

    offset: int
    length: int


class Guarded(Action, frozen=True):
    """`guard` is in force."""

    token: Any


class Rest(Action, frozen=True):
    """Clients are busy and a copy in the background is done: call `rested` when the next one may begin."""


class Fenced(Action, frozen=True):
    """A higher epoch exists: stop at once, for good."""

    replica: str
    detail: bytes


class Faulted(Action, frozen=True):
    """No in-sync replica is left: stop and leave what is unanswered unanswered."""

    reason: str


class Damage(msgspec.Struct, frozen=True):
    """See `Damaged`; `bit` is the replica's."""

    bit: int
    offset: int
    length: int
    snapshot: str
    media: bool
