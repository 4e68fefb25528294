"""The engine's decisions, without I/O: ordering, fan-out, acknowledgement, membership, resync.

Events go in as method calls (a request, a replica's answer, a loss, a confirmed record, a tick); what is to be done
comes out in `outbox` (frames to send), `replies` (answers to give) and `actions` (everything rarer). The driver
drains the three after every batch of events. Nothing here waits, so each method leaves the state whole.

Promises, which tests/engine/controller replay at every interruption:

1. A write is acknowledged only when every replica that the *recorded* in-sync set names has applied it.
2. A replica that failed a request is out of the recorded set before that request is acknowledged; before that, every
   survivor durably keeps a map of what changes from then on (and of what was not settled yet).
3. The in-sync set is never recorded empty; with no in-sync replica left the engine stops and answers nothing more.
4. Requests that overlap, one of them a write, are never in flight together, so all replicas apply them in one order
   and no read can see a write before it is on all of them.
5. A region that a crash may have left different is made equal on all members before a read of it is answered.
6. A returning replica answers no read, and counts for no acknowledgement in the record, before everything it missed
   was copied and flushed to its disk.
7. `settled` bounds only writes that were complete everywhere before a flush that then succeeded everywhere.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Any, Final

import msgspec

from engine.ops import FLUSH, READ, UNMAP, WRITE

# the numbers of engine.wire.frame.FrameType, which this module does not import; a test keeps them equal
PING: Final = 8
SETTLED: Final = 10
TRACK: Final = 11
STATE: Final = 13
# a copy of one region between replicas: a read, then a write, under one lock
COPY: Final = 100

OK: Final = 0
STALE_EPOCH: Final = 1
NO_SPACE: Final = 4

_GRAIN_SHIFT: Final = 18
_MUTATING: Final = frozenset({WRITE, UNMAP, COPY})
_CLIENT_RANGE: Final = frozenset({READ, WRITE, UNMAP})
_PRIVATE: Final = frozenset({PING, TRACK})
_COPIES_IDLE: Final = 4
_COPIES_BUSY: Final = 1
_PING_EVERY: Final = 2.0
_LONGEST_TICK: Final = 1.0
_ZERO: Final = bytes(1 << 20)


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


class Fenced(Action, frozen=True):
    """A higher epoch exists: stop at once, for good."""

    replica: str
    detail: bytes


class Faulted(Action, frozen=True):
    """No in-sync replica is left: stop and leave what is unanswered unanswered."""

    reason: str


class Request:
    __slots__ = (
        "blockers",
        "error",
        "followers",
        "length",
        "low",
        "offset",
        "op",
        "payload",
        "result",
        "seq",
        "started",
        "targets",
        "token",
        "wait",
        "writing",
    )

    def __init__(self, op: int, offset: int, length: int, payload: Any = b"", token: Any = None) -> None:
        self.op = op
        self.offset = offset
        self.length = length
        self.payload = payload
        self.token = token
        self.wait = 0
        self.seq = 0
        self.started = 0.0
        self.blockers = 0
        self.followers: list[Request] | None = None
        self.error = 0
        self.low = 0
        self.result = b""
        self.targets = 0
        self.writing = op in (WRITE, UNMAP)


class Resync:
    """What one returning replica still has to be given. `regions` is None until the maps are known."""

    __slots__ = ("copied", "copying", "flushing", "overtaken", "regions", "total")

    def __init__(self) -> None:
        self.regions: deque[int] | None = None
        self.overtaken: set[int] = set()
        self.copying = 0
        self.copied = 0
        self.total = 0
        self.flushing = False


# (mask of replicas, op, seq, offset, length, payload)
Send = tuple[int, int, int, int, int, Any]


class Core:
    """One attachment of one volume.

    `replicas` gives the order of the bits in every mask; `in_sync` is the recorded set; sizes and offsets are bytes,
    times seconds of a clock that `tick` advances.
    """

    def __init__(
        self,
        *,
        size: int,
        replicas: Sequence[str],
        in_sync: Iterable[str],
        region_size: int = 1 << 20,
        request_timeout: float = 8.0,
        flush_timeout: float = 30.0,
    ) -> None:
        self.size = size
        self.names = tuple(replicas)
        self.region_size = region_size
        self.request_timeout = request_timeout
        self.flush_timeout = flush_timeout
        self.recorded_set = self.mask(in_sync)
        self.in_sync = self.recorded_set
        self.leaving = 0
        self.joining = 0
        self.resyncing = 0
        self._everyone = (1 << len(self.names)) - 1
        self._reasons: dict[int, str] = {}

        self.outbox: list[Send] = []
        self.replies: list[tuple[Any, int, bytes]] = []
        self.actions: list[Action] = []

        self.stopped = False
        # set before a detach: no new background copies
        self.draining = False
        self.clock = 0.0
        self._next_ping = _PING_EVERY
        self._seq = 0
        self.inflight: dict[int, Request] = {}
        self._held: dict[int, list[Request]] = {}
        self.waiting = 0

        self._record_in_flight = 0
        self._track: Request | None = None
        self._tracked = 0
        self._reader = 0

        self.settled = 0
        self._settled_sent = 0
        self.dirty: set[int] = set()
        self._dirty_total = 0
        self._equalising: set[int] = set()
        self._inherited = False
        self._copies = 0
        self.resyncs: dict[int, Resync] = {}

    # names and masks

    def bit(self, name: str) -> int:
        return 1 << self.names.index(name)

    def mask(self, names: Iterable[str]) -> int:
        mask = 0
        for name in names:
            mask |= self.bit(name)
        return mask

    def members(self, mask: int) -> tuple[str, ...]:
        return tuple(name for i, name in enumerate(self.names) if mask >> i & 1)

    @property
    def fanout(self) -> int:
        """Replicas that every write is sent to."""
        return self.in_sync | self.joining | self.resyncing

    @property
    def departed(self) -> int:
        """Replicas whose missed changes the others must remember."""
        return self._everyone & ~(self.in_sync | self.joining)

    def state(self, name: str) -> ReplicaState:
        bit = self.bit(name)
        if self.in_sync & bit:
            return ReplicaState.IN_SYNC
        if self.leaving & bit:
            return ReplicaState.LEAVING
        if self.joining & bit:
            return ReplicaState.JOINING
        return ReplicaState.RESYNCING if self.resyncing & bit else ReplicaState.OUT

    def reason(self, name: str) -> str:
        return self._reasons.get(self.bit(name), "")

    def note(self, bit: int, reason: str) -> None:
        """Remember why an absent replica stays out, unless something is known already."""
        self._reasons.setdefault(bit, reason)

    @property
    def idle(self) -> bool:
        """Nothing that changes a replica is under way."""
        return not self.inflight and not self.waiting and not self.leaving

    # requests

    def submit(self, op: int, offset: int, length: int, payload: Any = b"", token: Any = None) -> None:
        """A client's READ, WRITE, UNMAP or FLUSH; its answer appears in `replies` as (token, errno, data).

        The caller has checked the range. Once stopped, nothing is answered any more.
        """
        if self.stopped:
            return
        if op == READ and self.dirty:
            for region in range(offset // self.region_size, (offset + length - 1) // self.region_size + 1):
                if region in self.dirty and region not in self._equalising:
                    self._equalise(region)
        request = Request(op, offset, length, payload, token)
        if op == FLUSH:
            self._dispatch(request)
        else:
            self._admit(request)

    def _admit(self, request: Request) -> None:
        """Take the range, behind every earlier request that overlaps it; reads share."""
        start, end = request.offset, request.offset + request.length
        mutating = request.op in _MUTATING
        held = self._held
        for grain in range(start >> _GRAIN_SHIFT, ((end - 1) >> _GRAIN_SHIFT) + 1):
            others = held.get(grain)
            if others is None:
                held[grain] = [request]
                continue
            for other in others:
                if other.offset < end and start < other.offset + other.length and (mutating or other.op in _MUTATING):
                    if other.followers is None:
                        other.followers = [request]
                    elif other.followers[-1] is request:
                        continue
                    else:
                        other.followers.append(request)
                    request.blockers += 1
            others.append(request)
        if request.blockers:
            self.waiting += 1
        else:
            self._dispatch(request)

    def _release(self, request: Request) -> None:
        held = self._held
        end = request.offset + request.length
        for grain in range(request.offset >> _GRAIN_SHIFT, ((end - 1) >> _GRAIN_SHIFT) + 1):
            others = held[grain]
            if len(others) == 1:
                del held[grain]
            else:
                others.remove(request)
        if request.followers is not None:
            for follower in request.followers:
                follower.blockers -= 1
                if not follower.blockers:
                    self.waiting -= 1
                    self._dispatch(follower)

    def _dispatch(self, request: Request) -> None:
        self._seq = seq = self._seq + 1
        request.seq = seq
        request.started = self.clock
        self.inflight[seq] = request
        op = request.op
        if op == READ:
            self._send_read(request)
        elif op == COPY:
            self._send_copy_read(request)
        else:
            if op == FLUSH:
                request.low = self._oldest_write(seq)
            fanout = self.in_sync | self.joining | self.resyncing
            request.wait = fanout | self.leaving
            self.outbox.append((fanout, op, seq, request.offset, request.length, request.payload))

    def _oldest_write(self, before: int) -> int:
        # dispatch order is the order of the dict, so the first one found is the oldest
        for seq, request in self.inflight.items():
            if request.writing:
                return seq
        return before

    def _send_read(self, request: Request) -> None:
        # round robin over the in-sync replicas
        candidates = self.in_sync
        bit = self._reader << 1
        above = candidates & ~(bit - 1) if bit else candidates
        chosen = above & -above or candidates & -candidates
        self._reader = chosen
        request.wait = chosen
        if chosen:
            self.outbox.append((chosen, READ, request.seq, request.offset, request.length, b""))

    def _send_copy_read(self, request: Request) -> None:
        source = self.in_sync & -self.in_sync
        request.wait = source
        if source:
            self.outbox.append((source, READ, request.seq, request.offset, request.length, b""))

    # answers

    def answered(self, bit: int, seq: int, status: int, payload: bytes = b"") -> None:
        """Replica `bit` answered request `seq`. Late and unasked answers change nothing."""
        request = self.inflight.get(seq)
        if request is None or not request.wait & bit or self.leaving & bit or self.stopped:
            return
        if status != OK:
            self._refused(bit, request, status, payload)
            return
        op = request.op
        if op == READ:
            if len(payload) != request.length:
                self.lost(bit, f"answered a read of {request.length} bytes with {len(payload)}")
                return
            request.result = payload
        elif op == COPY and not request.writing:
            if len(payload) != request.length:
                self.lost(bit, f"answered a read of {request.length} bytes with {len(payload)}")
                return
            self._copy_write(request, payload)
            return
        request.wait = wait = request.wait & ~bit
        if not wait:
            self._finish(request)

    def _refused(self, bit: int, request: Request, status: int, payload: bytes) -> None:
        name = self.members(bit)[0]
        if status == STALE_EPOCH:
            self.stopped = True
            self.actions.append(Fenced(name, payload))
            return
        reason = payload.decode(errors="replace") or f"status {status}"
        last = self.in_sync == bit and not self.joining
        if not last or request.op in _PRIVATE or request.op == FLUSH:
            # a failed flush is never retried: what the replica's cache held may be gone
            self.lost(bit, f"refused a request: {reason}")
            return
        request.error = errno.ENOSPC if status == NO_SPACE else errno.EIO
        request.wait &= ~bit
        if not request.wait:
            self._finish(request)

    def _finish(self, request: Request) -> None:
        del self.inflight[request.seq]
        op = request.op
        if op in _CLIENT_RANGE:
            self.replies.append((request.token, request.error, request.result))
            self._release(request)
        elif op == FLUSH:
            token = request.token
            if not request.error and not isinstance(token, _SwapIn):
                self.settled = max(self.settled, request.low)
            if isinstance(token, _Internal):
                token.done(self, request)
            else:
                self.replies.append((token, request.error, b""))
        elif op == COPY:
            self._copied(request)
            self._release(request)
        elif op == TRACK:
            self._track = None
            self._tracked = request.targets
            self._step()
        if self.dirty or self.resyncs or self._inherited:
            self._pump()

    # membership

    def lost(self, bit: int, reason: str) -> None:
        """Replica `bit` failed: it erred, hung, broke its connection or restarted. Idempotent."""
        if self.stopped or not bit & (self.in_sync | self.joining | self.resyncing):
            return
        name = self.members(bit)[0]
        self._reasons[bit] = reason
        self.actions.append(Disconnect(name, reason))
        if self.resyncing & bit:
            self.resyncing &= ~bit
            self.resyncs.pop(bit, None)
            self._forget(bit, everything=True)
            self._step()
            self._pump()
            return
        self.in_sync &= ~bit
        self.joining &= ~bit
        self.leaving |= bit
        if not self.in_sync:
            self.stopped = True
            self.actions.append(Faulted(f"no in-sync replica is left; the last, {name}, {reason}"))
            return
        self._forget(bit, everything=False)
        self._step()
        self._pump()

    def _forget(self, bit: int, everything: bool) -> None:
        """Stop waiting for `bit`: where it was only read from, and with `everything` where it was written to as well.

        A write stays open for a replica that the record still names.
        """
        for request in list(self.inflight.values()):
            if not request.wait & bit:
                continue
            if request.op == READ:
                self._send_read(request)
            elif request.op == COPY and not request.writing:
                self._send_copy_read(request)
            elif everything or request.op in _PRIVATE or isinstance(request.token, _Internal):
                request.wait &= ~bit
                if not request.wait:
                    if isinstance(request.token, _Internal):
                        request.error = errno.EIO
                    self._finish(request)

    def _step(self) -> None:
        """One move towards a record that names exactly the replicas that are complete."""
        if self.stopped or self._record_in_flight:
            return
        departed = self.departed
        if departed & ~self._tracked:
            if self._track is None:
                self._send_track(departed)
            return
        target = self.in_sync | self.joining
        if target != self.recorded_set:
            self._record_in_flight = target
            self.actions.append(WriteRecord(self.members(target)))
        elif self.leaving:
            self._left(self.leaving)

    def _send_track(self, departed: int) -> None:
        # what is dropped by this list is dropped from now on, what it adds is there when all have answered
        self._tracked &= departed
        request = Request(TRACK, 0, 0, self.members(departed))
        request.targets = departed
        self._track = request
        self._dispatch_private(request, self.fanout)

    def _dispatch_private(self, request: Request, mask: int) -> None:
        self._seq += 1
        request.seq = self._seq
        request.started = self.clock
        request.wait = mask
        self.inflight[request.seq] = request
        self.outbox.append((mask, request.op, request.seq, request.offset, request.length, request.payload))

    def recorded(self, in_sync: Iterable[str]) -> None:
        """The record durably names `in_sync` now."""
        if self.stopped:
            return
        self.recorded_set = self.mask(in_sync)
        self._record_in_flight = 0
        joined = self.joining & self.recorded_set
        if joined:
            self.joining &= ~joined
            self.in_sync |= joined
            for name in self.members(joined):
                self._reasons.pop(self.bit(name), None)
                self.actions.append(ReplicaJoined(name))
            self._private_state(joined)
            if self._track is None:
                self._send_track(self.departed)
        gone = self.leaving & ~self.recorded_set
        if gone:
            self._left(gone)
        self._step()

    def _left(self, gone: int) -> None:
        self.leaving &= ~gone
        for name in self.members(gone):
            self.actions.append(ReplicaLeft(name, self.reason(name)))
        for request in list(self.inflight.values()):
            if request.wait & gone:
                request.wait &= ~gone
                if not request.wait:
                    self._finish(request)

    def _private_state(self, joined: int) -> None:
        """A replica that became complete: its mark goes, and so do the intents it brought along."""
        self._seq += 1
        self.outbox.append((joined, STATE, self._seq, 0, 0, False))
        self._seq += 1
        self.outbox.append((joined, SETTLED, self._seq, self.settled, 1, b""))

    # after a crash: make members equal

    def begin(self, dirty: Iterable[int]) -> None:
        """Called once, when the members are open: `dirty` is the union of their intent maps (region numbers)."""
        self.dirty = set(dirty)
        self._dirty_total = len(self.dirty)
        self._inherited = bool(self.dirty)
        self._step()
        self._pump()

    def _equalise(self, region: int) -> None:
        self._equalising.add(region)
        self._copy(region, self.in_sync, None)

    def _copy(self, region: int, targets: int, resync: Resync | None) -> None:
        offset = region * self.region_size
        request = Request(COPY, offset, min(self.region_size, self.size - offset), token=resync)
        request.targets = targets
        self._copies += 1
        self._admit(request)

    def _copy_write(self, request: Request, payload: bytes) -> None:
        """The source has answered: write what it said to the targets, under the same lock."""
        source = request.wait
        del self.inflight[request.seq]
        targets = request.targets & ~source
        alive = targets & self.fanout
        self._seq += 1
        request.seq = self._seq
        request.started = self.clock
        request.writing = True
        # members that the record still names keep the region closed, as they would a client's write
        request.wait = alive | (targets & self.leaving)
        self.inflight[request.seq] = request
        if not request.wait:
            self._finish(request)
        elif alive:
            op = UNMAP if payload == _ZERO[: request.length] else WRITE
            data = b"" if op == UNMAP else payload
            self.outbox.append((alive, op, request.seq, request.offset, request.length, data))

    def _copied(self, request: Request) -> None:
        self._copies -= 1
        resync: Resync | None = request.token
        if resync is None:
            region = request.offset // self.region_size
            self._equalising.discard(region)
            if not request.error:
                self.dirty.discard(region)
        elif self.resyncs.get(request.targets) is resync:
            if request.error:
                self.lost(request.targets, "cannot be filled: the last in-sync replica cannot be read")
            else:
                resync.copying -= 1
                resync.copied += 1

    def _pump(self) -> None:
        """Start background work as far as the foreground leaves room."""
        if self.stopped or self.draining:
            return
        if self.dirty and not self.leaving and not self.in_sync & (self.in_sync - 1):
            # a single member cannot differ from itself
            self.dirty.clear()
        room = (_COPIES_BUSY if len(self.inflight) > self._copies else _COPIES_IDLE) - self._copies
        while room > 0 and len(self.dirty) > len(self._equalising):
            self._equalise(next(region for region in self.dirty if region not in self._equalising))
            room -= 1
        if self.dirty:
            return
        if self._inherited and not self.leaving:
            self._inherited = False
            self._dispatch_flush(_SettleInherited(), self.in_sync)
        for bit, resync in list(self.resyncs.items()):
            if resync.regions is None or resync.flushing:
                continue
            while room > 0 and resync.regions:
                resync.copying += 1
                self._copy(resync.regions.popleft(), bit, resync)
                room -= 1
            if not resync.regions and not resync.copying:
                resync.flushing = True
                self._dispatch_flush(_SwapIn(bit), bit)

    def _dispatch_flush(self, token: _Internal, mask: int) -> None:
        request = Request(FLUSH, 0, 0, token=token)
        request.low = self._oldest_write(self._seq + 1)
        self._dispatch_private(request, mask)

    # coming back

    def opened(self, bit: int) -> None:
        """An absent replica is connected, open at our epoch, marked as rebuilding, and tracks `departed`.

        From here on it gets every write; `resync` says later what it missed before.
        """
        if self.stopped or bit & (self.fanout | self.leaving):
            return
        self.resyncing |= bit
        resync = self.resyncs[bit] = Resync()
        # on their way to the others and not to this one, perhaps not in the others' maps either yet
        resync.overtaken = {
            region for request in self.inflight.values() if request.op in _MUTATING for region in self._regions(request)
        } | self.dirty
        self._step()

    def _regions(self, request: Request) -> range:
        last = request.offset + request.length - 1
        return range(request.offset // self.region_size, last // self.region_size + 1)

    def resync(self, bit: int, regions: Iterable[int]) -> None:
        """`regions` (of the maps read after `opened`) may differ on replica `bit`."""
        resync = self.resyncs.get(bit)
        if resync is None or resync.regions is not None:
            return
        resync.regions = deque(sorted(resync.overtaken.union(regions)))
        resync.total = len(resync.regions)
        self._pump()

    # time

    def tick(self, elapsed: float) -> None:
        """`elapsed` seconds have passed. A long gap was our own pause: it is not held against the replicas."""
        if self.stopped:
            return
        self.clock += min(elapsed, _LONGEST_TICK)
        late: dict[int, str] = {}
        for request in self.inflight.values():
            limit = self.flush_timeout if request.op == FLUSH else self.request_timeout
            if self.clock - request.started > limit:
                for name in self.members(request.wait & self.fanout):
                    late[self.bit(name)] = f"did not answer within {limit:g} s"
        for bit, reason in late.items():
            self.lost(bit, reason)
        if self.stopped:
            return
        if self.settled > self._settled_sent and self.in_sync:
            self._settled_sent = self.settled
            self._seq += 1
            self.outbox.append((self.in_sync | self.joining, SETTLED, self._seq, self.settled, 0, b""))
        if self.clock >= self._next_ping:
            self._next_ping = self.clock + _PING_EVERY
            if self.fanout:
                self._dispatch_private(Request(PING, 0, 0), self.fanout)
        self._pump()


class _Internal:
    """Who asked for a flush that no client asked for."""

    def done(self, core: Core, request: Request) -> None:
        raise NotImplementedError


class _SettleInherited(_Internal):
    """Everything was made equal and flushed: the intents of the last life can go."""

    def done(self, core: Core, request: Request) -> None:
        if request.error:
            core._inherited = True
            return
        core._seq += 1
        core.outbox.append((core.in_sync, SETTLED, core._seq, core.settled, 1, b""))
        core.actions.append(Equalised(core._dirty_total))


class _SwapIn(_Internal):
    """A returning replica has everything on its disk: into the record with it."""

    def __init__(self, bit: int) -> None:
        self.bit = bit

    def done(self, core: Core, request: Request) -> None:
        if request.error or not core.resyncing & self.bit:
            return
        del core.resyncs[self.bit]
        core.resyncing &= ~self.bit
        core.joining |= self.bit
        core._step()
