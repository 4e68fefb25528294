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
8. While held and `quiet`, every replica that is written to has applied the same requests, and none is under way.
9. A flush that is answered without asking is one that nothing was written since, at any replica, to the last that was.
10. What one replica cannot read, or denies by its checksums, is read from another and written anew on the first; only
   what no in-sync replica can read is answered with EIO.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec

from engine.controller.actions import (
    Action,
    Damage,
    Damaged,
    Disconnect,
    Equalised,
    Faulted,
    Fenced,
    Guarded,
    Repaired,
    ReplicaJoined,
    ReplicaLeft,
    ReplicaState,
    Rest,
    Unreadable,
    WriteRecord,
)
from engine.controller.foresight import Foresight
from engine.ops import FLUSH, READ, UNMAP, WRITE, Data

# the numbers of engine.wire.frame.FrameType, which this module does not import; a test keeps them equal
PING: Final = 8
SETTLED: Final = 10
TRACK: Final = 11
STATE: Final = 13
READ_LAYER: Final = 26
WRITE_LAYER: Final = 27
MEND: Final = 33
# a copy of one region between replicas: a read, then a write, under one lock
COPY: Final = 100
# nobody writes to the range until it is given back
GUARD: Final = 101
# a part of a READ or COPY that nobody could read as a whole; under the lock of that one
PIECE: Final = 102

OK: Final = 0
STALE_EPOCH: Final = 1
IO_ERROR: Final = 3
NO_SPACE: Final = 4

_GRAIN_SHIFT: Final = 18
_MUTATING: Final = frozenset({WRITE, UNMAP, COPY})
_CLIENT_RANGE: Final = frozenset({READ, WRITE, UNMAP})
_READING: Final = frozenset({READ, COPY, PIECE})
_PRIVATE: Final = frozenset({PING, TRACK})
_COPIES_IDLE: Final = 4
_COPIES_BUSY: Final = 1
_PING_EVERY: Final = 2.0
_LONGEST_TICK: Final = 1.0
# bytes between rests: a sparse volume is gone through in one go
_REST_AFTER: Final = 1 << 18
# what may be copied at once after a pause, in seconds of the rate
_BURST: Final = 1.0
_ZERO: Final = bytes(1 << 20)
_BLOCK: Final = 4096
# ranges that a replica could not read and that were written anew; with more its disk is taken for broken
_MAX_MEDIA_ERRORS: Final = 1024


class Repair:
    """Why a range is copied: to be written anew on replicas that lost it. `sources` may be read for it.

    `by_checksum`: the target puts it back where it was if it is what the checksums remember. That is no change of the
    volume: after a crash in between the replica has what it had, and knows that it is wrong.
    """

    __slots__ = ("by_checksum", "damage", "failed", "snapshot", "sources", "token")

    def __init__(self, sources: int, damage: Damage | None, token: Any, *, by_checksum: bool) -> None:
        self.sources = sources
        self.damage = damage
        self.token = token
        self.by_checksum = by_checksum
        self.snapshot = "" if damage is None else damage.snapshot
        self.failed = False


class Request:
    __slots__ = (
        "blockers",
        "covers",
        "damages",
        "error",
        "followers",
        "length",
        "low",
        "offset",
        "op",
        "parts",
        "payload",
        "pieces",
        "raw",
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
        self.result: Data = b""
        self.targets = 0
        # of a FLUSH: how many changes were sent before it
        self.covers = 0
        self.damages: tuple[Damage, ...] = ()
        self.pieces = 0
        self.parts: tuple[Request, ...] = ()
        # of a COPY: what the volume reads as, not what the head's own image holds
        self.raw = False
        self.writing = op in (WRITE, UNMAP)


class Resync:
    """What one returning replica still has to be given. `regions` is None until it is known.

    They are copied in ascending order: all below `frontier` are done.
    """

    __slots__ = ("copied", "copying", "flushing", "overtaken", "regions", "total")

    def __init__(self) -> None:
        self.regions: deque[int] | None = None
        self.overtaken: set[int] = set()
        self.copying: set[int] = set()
        self.copied = 0
        self.total = 0
        self.flushing = False

    @property
    def frontier(self) -> int | None:
        """The first region that is not done; None when all are."""
        waiting = [*self.copying]
        if self.regions:
            waiting.append(self.regions[0])
        return min(waiting, default=None)


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
        foresight: Foresight | None = None,
    ) -> None:
        self.size = size
        self.names = tuple(replicas)
        self.region_size = region_size
        self._block = min(_BLOCK, region_size)
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
        self.replies: list[tuple[Any, int, Data]] = []
        self.actions: list[Action] = []

        self.stopped = False
        # set before a detach: no new background copies
        self.draining = False
        self.holding = False
        self._queue: list[tuple[int, int, int, Any, Any]] = []
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

        # changes sent to any replica, and how many of them the last flush that succeeded covers; what an engine before
        # this one left unflushed is covered by none yet
        self._changes = 0
        self._flushed = -1
        self._foresight = foresight or Foresight()
        self._ahead: Request | None = None

        self.settled = 0
        self._settled_sent = 0
        self.dirty: set[int] = set()
        self._dirty_total = 0
        self._equalising: set[int] = set()
        self._inherited = False
        self._copies = 0
        self.resyncs: dict[int, Resync] = {}
        # bytes a second that background copies may take; 0: as many as the foreground leaves
        self.copy_rate = 0.0
        self._allowance = 0.0
        self._resting = False
        self._healing: set[Damage] = set()
        self._rewritten: set[Damage] = set()
        self._unrested = 0

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

    def note(self, bit: int, reason: str, *, replace: bool = False) -> None:
        """Remember why an absent replica stays out, unless something is known already (with `replace`: even then)."""
        if replace:
            self._reasons[bit] = reason
        self._reasons.setdefault(bit, reason)

    @property
    def busy(self) -> bool:
        """Clients' requests are under way, for which background work makes room."""
        return len(self.inflight) > self._copies

    @property
    def untracked(self) -> bool:
        """Not every survivor keeps a map for every departed replica yet."""
        return bool(self.departed & ~self._tracked)

    def may_copy(self) -> bool:
        """Whether the rate allows a copy now; whoever makes one calls `copying`."""
        return not self.copy_rate or self._allowance > 0

    def copying(self, length: int) -> None:
        """`length` bytes are being copied in the background."""
        if self.copy_rate:
            self._allowance -= length

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
        if self.holding:
            self._queue.append((op, offset, length, payload, token))
            return
        if op == READ and self.dirty:
            for region in range(offset // self.region_size, (offset + length - 1) // self.region_size + 1):
                if region in self.dirty and region not in self._equalising:
                    self._equalise(region)
        if op == FLUSH:
            self._flush(token)
            return
        request = Request(op, offset, length, payload, token)
        alone = not self.inflight
        self._admit(request)
        if op == WRITE and self._foresight.write(length) and alone:
            self._ahead = Request(FLUSH, 0, 1, token=_Ahead())
            self._dispatch(self._ahead)

    def _flush(self, token: Any) -> None:
        self._foresight.flush()
        ahead = self._ahead
        if self._flushed == self._changes:
            self.settled = max(self.settled, self._oldest_write(self._seq + 1))
            self.replies.append((token, 0, b""))
        elif ahead is not None and ahead.covers == self._changes:
            ahead.token.waiting.append(token)
        else:
            self._dispatch(Request(FLUSH, 0, 0, token=token))

    def hold(self) -> None:
        """Admit nothing more: what is submitted waits, in its order, and no copy begins. Membership goes on."""
        self.holding = True

    @property
    def quiet(self) -> bool:
        """While held: all that was admitted is complete. Pings and lists of departed replicas may be under way."""
        return not self.waiting and all(request.op in _PRIVATE for request in self.inflight.values())

    def release(self) -> None:
        """Admit what was submitted meanwhile, in its order."""
        self.holding = False
        queue, self._queue = self._queue, []
        for held in queue:
            self.submit(*held)
        self._pump()

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
            self._read_elsewhere(request)
        elif op == GUARD:
            if request.token is None:
                self.unguard(request)
            else:
                self.actions.append(Guarded(request.token))
        else:
            if op == FLUSH:
                request.low = self._oldest_write(seq)
                request.covers = self._changes
            else:
                self._changes += 1
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

    def _read_elsewhere(self, request: Request) -> None:
        """Read from a member that has not failed this request; without one in pieces, in the end with EIO."""
        candidates = self.in_sync & self._sources(request)
        for damage in request.damages:
            candidates &= ~damage.bit
        source = candidates & -candidates
        request.wait = source
        if source:
            request.started = self.clock
            if request.op == COPY and not request.raw:
                self.outbox.append((source, READ_LAYER, request.seq, request.offset, request.length, None))
            else:
                self.outbox.append((source, READ, request.seq, request.offset, request.length, b""))
        elif not self.in_sync:
            return
        elif not self._read_in_pieces(request):
            request.error = errno.EIO
            for damage in request.damages:
                self._tell(damage)
            self.actions.append(Unreadable(request.offset, request.length))
            self._finish(request)

    def _sources(self, request: Request) -> int:
        token = request.token
        if isinstance(token, _Piece):
            return self._sources(token.parent)
        return token.sources if isinstance(token, Repair) else self._everyone

    def _read_in_pieces(self, request: Request) -> bool:
        """Each half may have somebody who can read it. False for a range within one block."""
        start, end = request.offset, request.offset + request.length
        middle = start + request.length // 2 & -self._block
        middle = middle if middle > start else middle + self._block
        if middle >= end:
            return False
        request.damages = ()
        # what is put together from pieces is no layer's any more
        request.raw = True
        request.pieces = 2
        parts = []
        for low, high in ((start, middle), (middle, end)):
            piece = Request(PIECE, low, high - low, token=_Piece(request))
            self._seq = piece.seq = self._seq + 1
            self.inflight[piece.seq] = piece
            parts.append(piece)
        request.parts = (parts[0], parts[1])
        for piece in parts:
            self._read_elsewhere(piece)
        return True

    def _piece_done(self, parent: Request) -> None:
        parent.pieces -= 1
        if parent.pieces:
            return
        first, second = parent.parts
        parent.parts = ()
        parent.error = first.error or second.error
        data = b"" if parent.error else b"".join((first.result, second.result))
        if parent.op == COPY and not parent.error:
            self._copy_write(parent, data)
            return
        parent.result = data
        self._finish(parent)

    # answers

    def answered(self, bit: int, seq: int, status: int, payload: Data = b"") -> None:
        """Replica `bit` answered request `seq`. Late and unasked answers change nothing."""
        request = self.inflight.get(seq)
        if request is None or not request.wait & bit or self.leaving & bit or self.stopped:
            return
        if status != OK:
            self._refused(bit, request, status, payload)
            return
        op = request.op
        if op in (READ, PIECE):
            if len(payload) != request.length:
                self.lost(bit, f"answered a read of {request.length} bytes with {len(payload)}")
                return
            request.result = payload
            if request.damages:
                self._heal(request)
        elif op == COPY and not request.writing:
            if request.raw and len(payload) != request.length:
                self.lost(bit, f"answered a read of {request.length} bytes with {len(payload)}")
                return
            if request.damages:
                self._heal(request)
            self._copy_write(request, payload)
            return
        request.wait = wait = request.wait & ~bit
        if not wait:
            self._finish(request)

    def _refused(self, bit: int, request: Request, status: int, payload: Data) -> None:
        name = self.members(bit)[0]
        if status == STALE_EPOCH:
            self.stopped = True
            self.actions.append(Fenced(name, bytes(payload)))
            return
        if status == IO_ERROR and request.op in _READING and not request.writing:
            block = self._block
            start = request.offset & -block
            end = min(request.offset + request.length + block - 1 & -block, self.size)
            self.damaged(bit, request.seq, start, end - start, media=True)
            return
        reason = bytes(payload).decode(errors="replace") or f"status {status}"
        last = self.in_sync == bit and not self.joining
        if not last or request.op in _PRIVATE or request.op == FLUSH:
            # a failed flush is never retried: what the replica's cache held may be gone
            self.lost(bit, f"refused a request: {reason}")
            return
        request.error = errno.ENOSPC if status == NO_SPACE else errno.EIO
        if request.op in _MUTATING:
            # what a failed write left there is this replica's alone: a returning one that took the write would differ
            for other in self.members(self.resyncing):
                self.lost(self.bit(other), f"took a write that failed on {name}, the last in-sync replica")
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
                if not request.error:
                    self._flushed = max(self._flushed, request.covers)
                if request is self._ahead:
                    self._ahead = None
                waiting = token.waiting if isinstance(token, _Ahead) else (token,)
                self.replies.extend((one, request.error, b"") for one in waiting)
        elif op == COPY:
            self._copied(request)
            self._release(request)
        elif op == PIECE:
            self._piece_done(request.token.parent)
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
        self._rewritten = {damage for damage in self._rewritten if damage.bit != bit}
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
                if request.damages:
                    self._read_elsewhere(request)
                else:
                    self._send_read(request)
            elif request.op in _READING and not request.writing:
                self._read_elsewhere(request)
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
        if departed & ~self._tracked or self._tracked & ~self._everyone:
            if self._track is None:
                self._send_track(departed)
            if departed & ~self._tracked:
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

    # changing who is a replica at all

    def add(self, name: str) -> int:
        """Another replica, which is out and lacks everything; its bit. Survivors note from now on what it misses."""
        self.names = (*self.names, name)
        bit = 1 << (len(self.names) - 1)
        self._everyone |= bit
        self._step()
        return bit

    def remove(self, bit: int) -> None:
        """Forget a replica that is out, and that the record does not name any more. Its bit is not used again."""
        assert not bit & (self.fanout | self.leaving | self.recorded_set)
        self.names = tuple("" if 1 << i == bit else name for i, name in enumerate(self.names))
        self._everyone &= ~bit
        self._reasons.pop(bit, None)
        self._step()

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
        self._copy_range(offset, min(self.region_size, self.size - offset), targets, resync)

    def _copy_range(self, offset: int, length: int, targets: int, token: Resync | Repair | None) -> None:
        request = Request(COPY, offset, length, token=token)
        request.targets = targets
        request.raw = isinstance(token, Repair)
        self._copies += 1
        self._admit(request)

    def _copy_write(self, request: Request, payload: Data) -> None:
        """The source has answered: write what it said to the targets, under the same lock."""
        source = request.wait
        if request.token is not None:
            # what the source holds there, which may be nothing
            self.copying(len(payload))
            self._unrested += len(payload)
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
            self._changes += 1
            token = request.token
            if isinstance(token, Repair) and token.by_checksum:
                mend = (token.snapshot, payload)
                self.outbox.append((alive, MEND, request.seq, request.offset, request.length, mend))
            elif not request.raw:
                # as the source told it: what is a hole in its head becomes one in the others'
                self.outbox.append((alive, WRITE_LAYER, request.seq, request.offset, request.length, payload))
            elif payload == _ZERO[: request.length]:
                self.outbox.append((alive, UNMAP, request.seq, request.offset, request.length, b""))
            else:
                self.outbox.append((alive, WRITE, request.seq, request.offset, request.length, payload))

    def _copied(self, request: Request) -> None:
        self._copies -= 1
        resync: Resync | Repair | None = request.token
        if resync is None:
            # also where no member can read a block: all answer EIO for that one
            region = request.offset // self.region_size
            self._equalising.discard(region)
            self.dirty.discard(region)
        elif isinstance(resync, Repair):
            self._repaired(request, resync)
        elif self.resyncs.get(request.targets) is resync:
            if request.error:
                self.lost(request.targets, "cannot be filled: the last in-sync replica cannot be read")
            else:
                resync.copying.discard(request.offset // self.region_size)
                resync.copied += 1
                if self.busy and not self._resting and self._unrested >= _REST_AFTER:
                    self._resting = True
                    self._unrested = 0
                    self.actions.append(Rest())

    def rested(self) -> None:
        """Clients had the replicas for themselves for a while."""
        self._resting = False
        if self.resyncs:
            self._pump()

    # what a replica's disk lost

    def damaged(self, bit: int, seq: int, offset: int, length: int, *, snapshot: str = "", media: bool = False) -> None:
        """Replica `bit` answered `seq` with: this range is not what was written (or cannot be read).

        The answer to MEND too, when what it brings is not what the checksums remember.
        """
        request = self.inflight.get(seq)
        if request is None or not request.wait & bit or self.leaving & bit or self.stopped:
            return
        repair = request.token
        if request.op == COPY and request.writing and isinstance(repair, Repair) and repair.by_checksum:
            self._not_by_checksum(bit, request, repair)
            return
        if request.op not in _READING or request.writing or not 0 <= offset < offset + length <= self.size:
            self.lost(bit, "answered with a damage that cannot be")
            return
        request.damages = (*request.damages, Damage(bit, offset, length, snapshot, media))
        self._read_elsewhere(request)

    def _tell(self, damage: Damage) -> None:
        name = self.members(damage.bit)[0]
        self.actions.append(Damaged(name, damage.offset, damage.length, damage.snapshot, damage.media))

    def _heal(self, request: Request) -> None:
        """Somebody could read what others could not: have it written anew there, once this request is done."""
        for damage in [part for whole in request.damages for part in self._copyable(whole)]:
            if damage in self._healing or not damage.bit & self.in_sync or self.draining:
                continue
            self._tell(damage)
            if damage in self._rewritten or len(self._rewritten) >= _MAX_MEDIA_ERRORS:
                self.lost(damage.bit, f"its disk cannot read {damage.offset}+{damage.length}, also when written anew")
                continue
            if damage.media:
                self._rewritten.add(damage)
            self._healing.add(damage)
            others = self._everyone & ~damage.bit
            repair = Repair(others, damage, None, by_checksum=not damage.media)
            self._copy_range(damage.offset, damage.length, damage.bit, repair)

    def _copyable(self, damage: Damage) -> list[Damage]:
        """In parts that one COPY can carry."""
        end = damage.offset + damage.length
        return [
            msgspec.structs.replace(damage, offset=at, length=min(self.region_size, end - at))
            for at in range(damage.offset, end, self.region_size)
        ]

    def _not_by_checksum(self, bit: int, request: Request, repair: Repair) -> None:
        """The target has no checksums of the range any more, or of other content: somebody has written there."""
        repair.failed = True
        request.wait &= ~bit
        if not request.wait:
            self._finish(request)
        if not repair.snapshot:
            plain = Repair(repair.sources & ~bit, None, repair.token, by_checksum=False)
            self._copy_range(request.offset, request.length, bit, plain)

    def repair(
        self, offset: int, length: int, target: int, sources: int, token: Any, *, by_checksum: bool = False
    ) -> None:
        """Write a range of at most a region anew on `target`, as one of `sources` has it; ends in a `Repaired`."""
        self._copy_range(offset, length, target, Repair(sources, None, token, by_checksum=by_checksum))

    def _repaired(self, request: Request, repair: Repair) -> None:
        if repair.damage is not None:
            self._healing.discard(repair.damage)
        if repair.failed and not repair.snapshot:
            return  # the next attempt tells
        ok = not repair.failed and not request.error and request.targets & self.in_sync == request.targets
        names = self.members(request.targets)
        self.actions.append(Repaired(names, request.offset, request.length, ok, repair.token))

    def guard(self, offset: int, length: int, token: Any) -> Request:
        """Keep writes off the range, from the `Guarded` with this token on, until `unguard` of what is returned."""
        request = Request(GUARD, offset, length, token=token)
        self._admit(request)
        return request

    def unguard(self, request: Request) -> None:
        """Also before it was granted."""
        if request.blockers:
            request.token = None
            return
        if self.inflight.pop(request.seq, None) is not None:
            self._release(request)
            self._pump()

    def _pump(self) -> None:
        """Start background work as far as the foreground leaves room."""
        if self.stopped or self.draining or self.holding:
            return
        if self.dirty and not self.leaving and not self.in_sync & (self.in_sync - 1):
            # a single member cannot differ from itself
            self.dirty.clear()
        room = (_COPIES_BUSY if self.busy else _COPIES_IDLE) - self._copies
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
            while room > 0 and resync.regions and not self._resting and self.may_copy():
                region = resync.regions.popleft()
                resync.copying.add(region)
                self._copy(region, bit, resync)
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

        From here on it gets every write; `resync` says later what it missed before. Not while held: it would miss what
        the others are held for.
        """
        if self.stopped or self.holding or bit & (self.fanout | self.leaving):
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
        elapsed = min(elapsed, _LONGEST_TICK)
        self.clock += elapsed
        self._allowance = min(self._allowance + self.copy_rate * elapsed, self.copy_rate * _BURST)
        late: dict[int, str] = {}
        # a disk that is slow to flush holds up what is behind the flush, too; a ping tells whether anybody is there
        flushing = 0
        for request in self.inflight.values():
            if request.op == FLUSH:
                flushing |= request.wait
        for request in self.inflight.values():
            waited = self.clock - request.started
            if waited > self.request_timeout:
                wait = request.wait & self.fanout
                if request.op != PING and waited <= self.flush_timeout:
                    wait &= ~flushing
                for name in self.members(wait):
                    late[self.bit(name)] = f"did not answer within {waited:.1f} s"
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


class _Piece:
    """What the part of a request that is read in parts has for a token."""

    __slots__ = ("parent",)

    def __init__(self, parent: Request) -> None:
        self.parent = parent


class _Ahead:
    """A flush that is sent together with the write before it, since one will be asked for; who asked meanwhile."""

    __slots__ = ("waiting",)

    def __init__(self) -> None:
        self.waiting: list[Any] = []


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
