"""What to do when a part of a share fails: decided here, from what is observed, without I/O.

observed                                             decision
the engine ended fenced                              stop for good: another attachment has the volume
the engine ended by itself, its file can be resumed  another engine on the same file: clients notice a pause
the engine ended, or does not answer for long        take the share down in fencing order and attach again
the filesystem went read-only or recorded an error   the same: what is in the page cache cannot be trusted
ganesha ended, or several NULL calls were missed     a new ganesha in place, with a new epoch number
the right to serve is lost for long                  the same, when the right is back
a replica ended                                      start it again; the engine resynchronises it by itself
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import msgspec

from engine.launch import EngineExit

RESUME_AT_MOST = 5
RESUME_WINDOW = 60.0


class Decision(enum.Enum):
    NOTHING = "nothing"
    RESTART_GANESHA = "restart ganesha"
    REATTACH = "attach again"
    STOP_FENCED = "stop, fenced"


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """`null_misses` NULL calls in a row, `null_interval` seconds apart, each waited for `null_timeout` seconds, make a
    hung ganesha; `engine_silence` seconds without an answer of the engine's supervisor socket a hung engine. A server
    without the right to serve is silent at once, and ends after `right_patience` seconds."""

    null_interval: float = 2.0
    null_timeout: float = 3.0
    null_misses: int = 3
    engine_silence: float = 30.0
    right_patience: float = 5.0
    stable_after: float = 15.0
    give_up_after: int = 10


class Observed(msgspec.Struct, frozen=True, kw_only=True):
    """One look at a share. `engine_exit`, `ganesha_exit`: status, None while it runs."""

    engine_exit: int | None = None
    engine_silent_for: float = 0.0
    filesystem_fault: str | None = None
    ganesha_exit: int | None = None
    missed_calls: int = 0
    right_lost_for: float = 0.0


def may_resume(exit_status: int, resumable: bool, resumed: Sequence[float], now: float) -> bool:
    """Whether another engine may take over in place; `resumed` are the times (monotonic seconds) at which one did.

    Not after the loss of all in-sync replicas: what they had acknowledged and not flushed is gone with them, and the
    page cache above must not go on as if it were not.
    """
    if not resumable or exit_status in (EngineExit.CLEAN, EngineExit.FENCED, EngineExit.NO_REPLICA):
        return False
    return sum(1 for at in resumed if now - at < RESUME_WINDOW) < RESUME_AT_MOST


def decide(observed: Observed, policy: Policy) -> tuple[Decision, str]:
    """What to do now, and why, in words. The most fundamental failure decides: a new ganesha on a dead engine would
    only hang."""
    if observed.engine_exit == EngineExit.FENCED:
        return Decision.STOP_FENCED, "the engine was fenced"
    if observed.engine_exit is not None:
        how = f"status {observed.engine_exit}" if observed.engine_exit >= 0 else f"signal {-observed.engine_exit}"
        return Decision.REATTACH, f"the engine ended with {how}"
    if observed.engine_silent_for > policy.engine_silence:
        return Decision.REATTACH, f"the engine has not answered for {observed.engine_silent_for:.0f} s"
    if observed.filesystem_fault is not None:
        return Decision.REATTACH, observed.filesystem_fault
    if observed.ganesha_exit is not None:
        how = f"status {observed.ganesha_exit}" if observed.ganesha_exit >= 0 else f"signal {-observed.ganesha_exit}"
        return Decision.RESTART_GANESHA, f"ganesha ended with {how}"
    if observed.missed_calls >= policy.null_misses:
        return Decision.RESTART_GANESHA, f"ganesha left {observed.missed_calls} calls unanswered"
    if observed.right_lost_for > policy.right_patience:
        return Decision.RESTART_GANESHA, "the right to serve is lost: the replicas have not confirmed it for too long"
    return Decision.NOTHING, ""


class Backoff:
    """Pauses before repairs: none before the first, then growing, and none again after a time without a failure.

    `quick_failures` counts the failures in a row that came less than `stable_after` seconds after the last repair.
    """

    def __init__(self, *, first: float = 0.25, factor: float = 2.0, most: float = 30.0, stable_after: float = 15.0):
        self._first = first
        self._factor = factor
        self._most = most
        self._stable_after = stable_after
        self._last: float | None = None
        self.quick_failures = 0

    def failed(self, now: float) -> float:
        """A failure at `now` (monotonic seconds): how long to wait before the repair."""
        if self._last is not None and now - self._last < self._stable_after:
            self.quick_failures += 1
        else:
            self.quick_failures = 0
        self._last = now
        if self.quick_failures == 0:
            return 0.0
        exponent = min(self.quick_failures - 1, 60)
        pause: float = min(self._first * self._factor**exponent, self._most)
        # the pause is not part of the time that the repair held
        self._last = now + pause
        return pause


def next_ganesha_epoch(previous: int, now: float) -> int:
    """The next number for `-E`: later than every earlier one, even when the clock went back, and not the second of the
    start, which ganesha itself would take. 32 bits; never 0, which ganesha reads as "none"."""
    following = max(previous + 1, int(now))
    return following if 0 < following < 1 << 32 else (following & 0xFFFFFFFF) or 1
