"""Who serves a volume of several nodes, as one process sees it: decided here, without I/O, clocks or luck.

Each process for the volume watches one lease and changes it by compare-and-swap. The lease makes nothing safe: the
epoch that whoever takes over claims does, because the replicas refuse all lower ones. It is how others notice.

role        lease         what it does
STANDBY     not ours      watches; takes it when it is free, released to us, or not renewed for too long
TAKING      ours          claims an epoch, attaches, mounts, exports; renews meanwhile, as in all that follow
SERVING     ours          leaves when another node is wanted, or when others stand by and it is unwell for too long
LEAVING     ours or lost  leaves in order: ganesha, filesystem, device, engine
RELEASING   ours          nothing of the share is left here: says so, to whoever is to take over
ENDED       not ours      is to end

A lease is judged by how long it did not change *while the record server answered*, on the observer's own clock. So a
server that was away makes nobody late, and the clocks of two machines are never compared. A holder that says itself
that it serves, because only the way to the record server is cut, keeps the volume. For one that was killed its engine
releases the lease, when nothing is left that could answer a client (share/lifeline.py).
"""

from __future__ import annotations

import enum
from collections.abc import Callable

import msgspec

from engine.records import ORPHANED, Lease


class Role(enum.Enum):
    STANDBY = "standby"
    TAKING = "taking"
    SERVING = "serving"
    LEAVING = "leaving"
    RELEASING = "releasing"
    ENDED = "ended"


HOLDING = frozenset({Role.TAKING, Role.SERVING, Role.LEAVING, Role.RELEASING})


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds. A lease that did not change for `duration` is nobody's. After `gap` without an answer of the record
    server it is watched anew. Whoever released it for another takes it back after `take_back`; who is there for
    neither takes it after twice that. A holder that cannot serve for `unwell` leaves."""

    renew: float = 0.5
    duration: float = 2.5
    gap: float = 1.5
    take_back: float = 4.0
    unwell: float = 10.0
    retry: float = 1.0
    retry_most: float = 15.0


class Failover(msgspec.Struct, frozen=True, kw_only=True):
    """A change of node. `duration`: seconds from the last sign of the holder before until this one served; None until
    then. `silent`: that holder was not heard of. `id` is in every event of it, on all nodes."""

    id: str
    cause: str
    before: str
    after: str
    duration: float | None = None
    at: float = 0.0
    silent: bool = False


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """What to do next with the lease: make it `swap`, or else watch it for `watch` seconds."""

    swap: Lease | None = None
    watch: float = 0.0


class Handover:
    """`role` is what the process is to be. Whoever drives it calls `step`, does that, and says how it went (`seen`,
    `missed`); begins the share when `role` becomes TAKING and says so when that is `ready` or has `ended`; and ends the
    share when `role` becomes LEAVING."""

    def __init__(self, node: str, instance: str, *, stay: bool, timing: Timing, new_id: Callable[[], str]) -> None:
        """`stay`: goes on as a standby when another node serves; else it ends. Set `others` when somebody stands by."""
        self.role = Role.STANDBY
        self.node = node
        self.instance = instance
        self.stay = stay
        self.lease = Lease()
        self.version = ""
        self.epoch = 0
        self.failover: Failover | None = None
        self.elsewhere = False
        self.deposed = False
        self.others = False
        self._timing = timing
        self._new_id = new_id
        self._changed_at: float | None = None
        self._answered_at: float | None = None
        self._heard_at = -1e9
        self._renewed_by_others = False
        self._renewed_at = -1e9
        self._sign_of_life = 0.0
        self._drained = 0.0
        self._leaving_since = 0.0
        self._unwell_since: float | None = None
        self._not_before = -1e9
        self._failures = 0
        self._claiming: Failover | None = None

    # what is observed

    def seen(self, lease: Lease, version: str, now: float, *, swapped: bool = False) -> None:
        """How the lease is; `swapped` when it is as it was asked for."""
        answered, self._answered_at = self._answered_at, now
        if version != self.version or self._changed_at is None:
            if self._changed_at is not None and lease.renewals != self.lease.renewals and not swapped:
                self._renewed_by_others = not self._mine(lease)
            self._changed_at = now
        elif answered is not None and now - answered > self._timing.gap:
            self._changed_at = now
        self.lease, self.version = lease, version
        if swapped:
            self._renewed_at = now
            self._taken_or_released(now)
        if self.role in HOLDING and not self._mine(lease):
            self._lost()

    def heard(self, instance: str, now: float) -> None:
        """The holder says itself that it serves: only the record server does not know."""
        if instance == self.lease.instance:
            self._heard_at = now

    def missed(self, now: float) -> None:
        """The record server does not answer: nothing changes, whoever serves goes on."""

    def ready(self, epoch: int, now: float, wall: float = 0.0) -> None:
        """It serves, perhaps once more after a repair."""
        self.epoch = epoch
        self._unwell_since = None
        self._failures = 0
        if self.role is Role.TAKING:
            self.role = Role.SERVING
            self._renewed_at = -1e9
            assert self.failover is not None
            lasted = self._drained + now - self._sign_of_life
            self.failover = msgspec.structs.replace(self.failover, duration=round(lasted, 3), at=wall)

    def well(self) -> None:
        self._unwell_since = None

    def unwell(self, now: float) -> None:
        """It does not serve at present."""
        if self._unwell_since is None:
            self._unwell_since = now

    def ended(self, now: float, *, failed: bool, fenced: bool = False) -> None:
        """Nothing of the share runs here any more. `fenced`: another attachment has the volume."""
        if self.deposed or (fenced and self.role is Role.SERVING):
            self.deposed, self.role = True, Role.ENDED
            return
        if failed:
            self._failures += 1
            pause = min(self._timing.retry * 2 ** (self._failures - 1), self._timing.retry_most)
            self._not_before = now + pause
        if self.role in HOLDING:
            self._drained = max(0.0, now - self._leaving_since) if self.role is Role.LEAVING else 0.0
            self.role = Role.RELEASING if self._mine(self.lease) else self._after()
            self._renewed_at = -1e9

    def stopped(self) -> None:
        """Nothing of the share runs here any more, and nothing is to: what is left is to say so."""
        self.stay = False
        self._drained = 0.0
        self.role = Role.RELEASING if self.role in HOLDING and self._mine(self.lease) else Role.ENDED

    # what follows

    def step(self, now: float) -> Step:
        if self.role is Role.STANDBY:
            return self._stand_by(now)
        if self.role is Role.ENDED or not self._mine(self.lease):
            return Step(watch=self._timing.renew)
        if self.role is Role.SERVING and self._should_leave(now):
            self._leave(now)
        wanted = self._wish()
        settled = msgspec.structs.replace(self.lease, renewals=wanted.renewals) == wanted
        if not settled or now - self._renewed_at >= self._timing.renew:
            return Step(swap=wanted)
        return Step(watch=max(0.0, self._renewed_at + self._timing.renew - now))

    def _wish(self) -> Lease:
        """How a holder wants the lease to be."""
        wanted = "" if self.lease.wanted == self.node else self.lease.wanted
        lease = msgspec.structs.replace(self.lease.renewed(), epoch=max(self.epoch, self.lease.epoch), wanted=wanted)
        match self.role:
            case Role.SERVING:
                return msgspec.structs.replace(lease, phase="serving")
            case Role.LEAVING:
                return msgspec.structs.replace(lease, phase="draining")
            case Role.RELEASING:
                return msgspec.structs.replace(lease, phase="released", drained=round(self._drained, 3))
        return lease

    def _stand_by(self, now: float) -> Step:
        if self._changed_at is None:
            return Step(watch=0.0)
        if not self.stay and self._serves_elsewhere():
            self.elsewhere = True
            self.role = Role.ENDED
            return Step(watch=0.0)
        cause = self._cause(now)
        if cause is None or now < self._not_before:
            # to be there when its time is up
            silent = min(now - self._changed_at, now - self._heard_at)
            left = self._timing.duration - silent
            return Step(watch=min(self._timing.renew, left) if left > 0 else self._timing.renew)
        self._sign_of_life = now if cause == "start" else max(self._changed_at, self._heard_at)
        moved = self.lease.phase == "released" and self.lease.wanted
        self._claiming = Failover(
            id=self.lease.failover if moved and self.lease.failover else self._new_id(),
            cause=cause,
            before=self.lease.holder,
            after=self.node,
            silent=self._was_silent(now) and self.lease.holder != self.node,
        )
        return Step(
            swap=Lease(
                holder=self.node,
                instance=self.instance,
                epoch=self.lease.epoch,
                renewals=self.lease.renewals + 1,
                phase="taking",
                failover=self._claiming.id,
                cause=cause,
                drained=self.lease.drained if self.lease.phase == "released" else 0.0,
            )
        )

    def _cause(self, now: float) -> str | None:
        """Why a standby has to take over now, None when it has not."""
        lease, timing = self.lease, self._timing
        assert self._changed_at is not None
        unchanged = now - self._changed_at
        if not lease.holder or lease.phase == "released":
            if lease.wanted == self.node:
                return "move"
            if not lease.wanted and lease.cause == ORPHANED:
                return f"the share manager of {lease.holder} died"
            if not lease.wanted:
                return "released" if lease.holder else "start"
            patience = timing.take_back if lease.holder == self.node else 2 * timing.take_back
            return f"{lease.wanted} did not take over" if unchanged >= patience else None
        if lease.holder == self.node:
            # one process for a volume on a node: that one is gone
            return "restart"
        return f"{lease.holder} was silent" if self._was_silent(now) else None

    def _was_silent(self, now: float) -> bool:
        """Whether the lease is somebody's who has not been heard of for too long."""
        assert self._changed_at is not None
        silent = min(now - self._changed_at, now - self._heard_at)
        return self.lease.holder != "" and self.lease.phase != "released" and silent >= self._timing.duration

    def _serves_elsewhere(self) -> bool:
        lease = self.lease
        return (
            lease.holder not in ("", self.node)
            and lease.phase == "serving"
            and (self._renewed_by_others or self.failover is not None)
        )

    def _should_leave(self, now: float) -> bool:
        if self.lease.wanted not in ("", self.node):
            return True
        unwell = self._unwell_since is not None and now - self._unwell_since >= self._timing.unwell
        return unwell and self.others

    def _leave(self, now: float) -> None:
        self.role = Role.LEAVING
        self._leaving_since = now

    def _taken_or_released(self, now: float) -> None:
        if self.role is Role.STANDBY and self._claiming is not None and self._mine(self.lease):
            self.role = Role.TAKING
            self.failover, self._claiming = self._claiming, None
            self._drained = self.lease.drained
            self._unwell_since = None
        elif self.role is Role.RELEASING and self.lease.phase == "released":
            self.role = self._after()

    def _lost(self) -> None:
        """Somebody else has the lease, and with it the volume's next epoch."""
        if self.role is Role.RELEASING:
            self.role = self._after()
        elif self.role in (Role.TAKING, Role.SERVING):
            self.deposed = self.role is Role.SERVING
            self.role = Role.LEAVING

    def _after(self) -> Role:
        return Role.STANDBY if self.stay or self._to_be_taken() else Role.ENDED

    def _to_be_taken(self) -> bool:
        """Released for another node that has not come yet: until it has, this one may have to take it back."""
        return self.lease.phase == "released" and self.lease.wanted not in ("", self.node)

    def _mine(self, lease: Lease) -> bool:
        return (lease.holder, lease.instance) == (self.node, self.instance) and (
            lease.phase != "released" or self.role is Role.RELEASING
        )
