"""Drives the core: sockets, the record, the clock.

One task reads each connection, one sends what a round of events queued, one ticks, one writes the record, and one
per replica brings it back when it is absent. All of them run on one thread and touch the core only between awaits;
`Pipeline.drain` is the one place where the core's output is carried out, and it never awaits.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any

import msgspec
import outcome
import structlog
import trio

from engine.address import Address
from engine.client import EngineEvent, EngineStatus, OperationStats, ReplicaStatus
from engine.controller import actions
from engine.controller.actions import ReplicaState
from engine.controller.browse import Browser
from engine.controller.chains import Answers, Chains
from engine.controller.clone import Puller
from engine.controller.connection import (
    CALL,
    ReplicaConnection,
    ReplicaRefusedError,
    ReplicaUnreachableError,
)
from engine.controller.core import Core
from engine.controller.pipeline import Pipeline
from engine.controller.progress import Progress
from engine.controller.purge import Purger
from engine.controller.rebuild import Filling, Rebuild, figures, rest_after
from engine.controller.right import RightKeeper
from engine.controller.stats import Health
from engine.controller.stream import Stream
from engine.controller.watch import keep_watch
from engine.errors import (
    BusyError,
    EngineError,
    FencedError,
    NeedsRebuildError,
    NoReplicaError,
    ProtocolError,
    RecordConflictError,
    RecordError,
)
from engine.operations import OperationProgress
from engine.ops import FLUSH, READ, UNMAP, WRITE, BlockRequest, Data
from engine.poller import Poller
from engine.record import RecordStore, ReplicaRecord, VolumeRecord
from engine.wire import messages
from engine.wire.frame import REPLY, Frame, FrameType, Status

log = structlog.get_logger()

_TICK = 0.25
_PROGRESS_EVERY = 2.0
_BITMAP_PAGE = 1 << 20
# a region is copied with one request
_REGION_SIZES = frozenset(1 << shift for shift in range(12, 21))
_OPERATIONS = {READ: "read", WRITE: "write", FLUSH: "flush", UNMAP: "unmap"}


class _TaskRequest(BlockRequest):
    """A request, and the task that waits for it."""

    def __init__(self, op: int, offset: int, length: int, payload: bytes) -> None:
        super().__init__(op, offset, length, payload)
        self.task: trio.lowlevel.Task | None = trio.lowlevel.current_task()

    def finish(self, error: int, data: Data) -> None:
        if self.task is not None:
            trio.lowlevel.reschedule(self.task, outcome.Value((error, data)))

    def abandon(self, _: Callable[[], None]) -> trio.lowlevel.Abort:
        # what was sent cannot be taken back, but nobody waits for its answer any more
        self.task = None
        return trio.lowlevel.Abort.SUCCEEDED


class _RecordChange:
    """A change of the record that is no change of membership, and whoever waits for it."""

    __slots__ = ("apply", "done")

    def __init__(self, apply: Callable[[VolumeRecord], VolumeRecord]) -> None:
        self.apply = apply
        self.done = trio.Event()


class Controller:
    """One attached volume. Made by `attach`; implements `engine.frontend.BlockVolume`."""

    def __init__(
        self,
        record: VolumeRecord,
        store: RecordStore,
        key: bytes,
        *,
        incarnation: int,
        instances: Mapping[str, str] | None,
        open_timeout: float,
        doubted: Collection[str],
        request_timeout: float,
        reconnect_interval: float,
        resync_rate: float,
        right_lasts: float,
    ) -> None:
        self.record = record
        self.size = record.size
        self.target_size = record.size
        self.request_timeout = request_timeout
        self.token = (record.epoch, incarnation)
        self.failure: EngineError | None = None
        self.failed = trio.Event()
        self.poller = Poller()
        self._store = store
        self._key = key
        self._instances = instances
        self._open_timeout = open_timeout
        self._doubted = doubted
        self._reconnect_interval = reconnect_interval
        self._resync_rate = resync_rate
        self._replicas = {replica.name: replica for replica in record.replicas}
        self._connections: dict[int, ReplicaConnection] = {}
        self.health: defaultdict[str, Health] = defaultdict(Health)
        self.scrubbing = False
        self._flusher: trio.lowlevel.Task | None = None
        self._wakeup_due = False
        self._record_wanted: tuple[str, ...] | None = None
        self._record_change = trio.Event()
        self._record_changes: list[_RecordChange] = []
        self._exclusive: Callable[[], str] | None = None
        self._size_watchers: list[Callable[[], None]] = []
        # whoever changes the chain a little at a time, beside all else, holds it for each step
        self.background_step = trio.Lock()
        self.has_file = False
        self.chains = Chains(self)
        self.purger = Purger(self)
        self._keepers: dict[str, tuple[trio.CancelScope, trio.Event]] = {}
        self._fillings: dict[int, Filling] = {}
        self._progress: dict[int, Progress] = {}
        self._rested = 0.0
        self._changed = trio.Event()
        self._listeners: set[trio.MemorySendChannel[EngineEvent]] = set()
        self._open = False
        self.puller = Puller(self, self._tell)
        self.browser = Browser(self)
        self.right = RightKeeper(self, right_lasts)
        self._pipeline = Pipeline(self._new_core(1 << 20), self._act, self._pulse, self._ping)
        # the frontends' way in, past this object
        self.submit: Callable[[BlockRequest], None] = self._pipeline.submit
        self.kick: Callable[[], None] = self._pipeline.drain

    def _new_core(self, region_size: int) -> Core:
        core = Core(
            size=self.size,
            replicas=[replica.name for replica in self.record.replicas],
            in_sync=self.record.in_sync,
            region_size=region_size,
            request_timeout=self.request_timeout,
        )
        core.copy_rate = self._resync_rate
        return core

    def limit_resync(self, rate: float) -> None:
        """Bytes a second that replicas are brought up to date with; 0: as fast as the foreground leaves room."""
        self._resync_rate = self.core.copy_rate = rate

    @property
    def core(self) -> Core:
        return self._pipeline.core

    # requests

    async def read(self, offset: int, length: int) -> bytes:
        """Raises OSError."""
        return bytes(await self._execute(READ, offset, length, b""))

    async def write(self, offset: int, data: bytes) -> None:
        """Returns when every in-sync replica has it. Raises OSError."""
        await self._execute(WRITE, offset, len(data), data)

    async def unmap(self, offset: int, length: int) -> None:
        """The range reads as zeros afterwards. Raises OSError."""
        await self._execute(UNMAP, offset, length, b"")

    async def flush(self) -> None:
        """Returns when all that was acknowledged before is on every in-sync replica's disk. Raises OSError."""
        await self._execute(FLUSH, 0, 0, b"")

    async def _execute(self, op: int, offset: int, length: int, payload: bytes) -> Data:
        if op != FLUSH and (length <= 0 or offset < 0 or offset + length > self.size):
            raise OSError(errno.EINVAL, f"request {offset}+{length} is outside the volume of {self.size} bytes")
        request = _TaskRequest(op, offset, length, payload)
        self.submit(request)
        self._wake()
        error, data = await trio.lowlevel.wait_task_rescheduled(request.abandon)
        if error:
            raise OSError(error, os.strerror(error))
        return data  # type: ignore[no-any-return]

    @property
    def answered_requests(self) -> int:
        """Counts up with every answer to a client."""
        return sum(operation.count for operation in self._pipeline.operations.values())

    # carrying out what the core decided

    def _wake(self) -> None:
        """Have the queue drained after all tasks that are runnable now: one sendmsg carries the requests of all."""
        if self._flusher is not None:
            task, self._flusher = self._flusher, None
            trio.lowlevel.reschedule(task)
        else:
            self._wakeup_due = True

    async def _flush_rounds(self) -> None:
        def cancelled(_: Callable[[], None]) -> trio.lowlevel.Abort:
            self._flusher = None
            return trio.lowlevel.Abort.SUCCEEDED

        while True:
            if not self._wakeup_due:
                self._flusher = trio.lowlevel.current_task()
                await trio.lowlevel.wait_task_rescheduled(cancelled)
            self._wakeup_due = False
            self._drain()
            await trio.lowlevel.cancel_shielded_checkpoint()

    def _drain(self) -> None:
        self._pipeline.drain()

    def _ping(self, stream: Stream, seq: int, header: bytes) -> bool:
        watch = self._connections[stream.bit].watch
        return watch is not None and watch.ping(seq, header)

    def _pulse(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
        self.poller.give_way()

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Looks at `condition` after every round that changed membership (while held or draining: after every one)."""
        while not condition():
            await self._changed.wait()

    def _act(self, action: actions.Action) -> None:
        match action:
            case actions.WriteRecord(in_sync):
                self._record_wanted = in_sync
                self._record_change.set()
            case actions.Disconnect(replica, reason):
                self._disconnect(self.core.bit(replica))
                log.warning("replica failed", replica=replica, reason=reason)
            case actions.ReplicaLeft(replica, reason):
                self._tell("replica_left", replica, f"left the in-sync set: {reason}")
            case actions.ReplicaJoined(replica):
                self.purger.kick()
                self._tell("replica_in_sync", replica, "is in sync")
            case actions.Rest():
                self._nursery.start_soon(self._rest)
            case actions.Damaged(replica, offset, length, snapshot, media):
                self.health[replica].damaged += 1
                what = "cannot be read" if media else "is not what was written"
                where = f"snapshot {snapshot}" if snapshot else "the volume"
                self._tell("replica_damaged", replica, f"{length} bytes at {offset} of {where}: the disk's copy {what}")
            case actions.Repaired(replicas, offset, length, ok, token):
                for replica in replicas if ok else ():
                    self.health[replica].repaired += token is None
                    self._tell("replica_repaired", replica, f"{length} bytes at {offset} were put right")
                if token is not None:
                    token.set()
            case actions.Unreadable(offset, length):
                self._tell("unreadable", message=f"no in-sync replica can read {length} bytes at {offset}")
            case actions.Guarded(token):
                token.set()
            case actions.Equalised(regions):
                self._tell("equalised", message="replicas are equal again after a crash", done=regions, total=regions)
            case actions.Fenced(replica, detail):
                self._fail(FencedError(self.token, messages.decode_token(detail), f"replica {replica}"))
            case actions.Faulted(reason):
                self._fail(NoReplicaError(self.record.volume, {"engine": reason}))

    def _fail(self, failure: EngineError) -> None:
        if self.failure is None:
            self.failure = failure
            self.core.stopped = True
            self._pulse()
            self._tell("fenced" if isinstance(failure, FencedError) else "faulted", message=str(failure))
            self.failed.set()

    def _connect(self, connection: ReplicaConnection) -> None:
        self._connections[connection.bit] = connection
        self._pipeline.connect(connection.stream)

    def _disconnect(self, bit: int) -> None:
        connection = self._connections.pop(bit, None)
        self._pipeline.disconnect(bit)
        if connection is not None:
            connection.close()

    async def _rest(self) -> None:
        """Between copies in the background, which began when the last rest ended."""
        await trio.sleep(rest_after(trio.current_time() - self._rested))
        self._rested = trio.current_time()
        self.core.rested()
        self._drain()

    # tasks

    def _serve(self, connection: ReplicaConnection) -> None:
        """Deliver answers from now on, until the connection ends, which is the replica's loss."""
        stream = connection.stream
        stream.odd = partial(self._odd, connection)
        stream.broken = partial(self._ended, connection)
        fd = stream.sock.fileno()
        self.poller.add(fd, partial(self._pipeline.readable, stream))
        connection.before_close = partial(self.poller.remove, fd)
        self._nursery.start_soon(self._pump, connection)

    async def _pump(self, connection: ReplicaConnection) -> None:
        with connection.scope:
            try:
                await connection.pump_when_writable()
            except OSError as error:
                self._broken(connection, error)
            finally:
                connection.close()

    def _ended(self, connection: ReplicaConnection, error: Exception) -> None:
        if not connection.closed:
            assert isinstance(error, OSError | EngineError)
            self._broken(connection, error)

    def _broken(self, connection: ReplicaConnection, error: OSError | EngineError) -> None:
        reason = f"its connection failed: {error.strerror}" if isinstance(error, OSError) else str(error)
        # the core is made anew while members are opened: take the one that counts now
        self.core.lost(connection.bit, reason)
        if self._connections.get(connection.bit) is connection:
            self._disconnect(connection.bit)
        connection.close()
        self._drain()

    def _odd(self, connection: ReplicaConnection, frame: Frame) -> None:
        """An answer that is no plain success of a request of the core's. Raises EngineError."""
        kind, status, seq, offset, length, payload = frame
        if not kind & REPLY:
            self.core.lost(connection.bit, f"sent a frame of type {kind:#x} that is no answer")
        elif seq & CALL:
            connection.deliver(frame)
            self.poller.give_way()
        elif status == Status.STALE_EPOCH:
            # also unasked: a replica that was opened by a higher epoch says so
            self._fail(connection.fenced(payload))
        elif status == Status.CORRUPT:
            snapshot = messages.decode(payload, messages.Corrupt).snapshot
            self.core.damaged(connection.bit, seq, offset, length, snapshot=snapshot)
        else:
            self.core.answered(connection.bit, seq, status, payload)

    def pong(self, connection: ReplicaConnection, seq: int) -> None:
        """A ping was answered, on whatever way."""
        self.core.answered(connection.bit, seq, Status.OK)
        self._drain()

    async def _tick(self) -> None:
        last = trio.current_time()
        progress = last + _PROGRESS_EVERY
        while True:
            await trio.sleep(_TICK)
            now = trio.current_time()
            self.core.tick(now - last)
            last = now
            self._drain()
            self._follow_progress()
            if now >= progress:
                progress = now + _PROGRESS_EVERY
                self._tell_progress()

    def _follow_progress(self) -> None:
        core = self.core
        for bit in [bit for bit in self._progress if bit not in core.resyncs]:
            del self._progress[bit]
        for bit, resync in core.resyncs.items():
            done, total, phase = figures(self._fillings.get(bit), resync, core.region_size)
            if total:
                self._progress.setdefault(bit, Progress()).advance(done, total, phase)

    def _tell_progress(self) -> None:
        for bit, progress in self._progress.items():
            if (now := progress.latest) is not None and now.done < now.total:
                self._publish(
                    EngineEvent(
                        event="resync_progress",
                        replica=self.core.members(bit)[0],
                        done=now.done,
                        total=now.total,
                        rate=now.rate,
                        left=now.left,
                        phase=now.message,
                    )
                )

    def resync_progress(self, name: str) -> OperationProgress | None:
        """How far a replica is that is brought up to date; None for others."""
        bit = self.core.bit(name)
        return self._progress[bit].latest if bit in self._progress and bit in self.core.resyncs else None

    async def change_record(self, apply: Callable[[VolumeRecord], VolumeRecord]) -> VolumeRecord:
        """Have `apply` done to the record, again on what a conflict shows; return what was written.

        `apply` must leave `in_sync` alone. Waits while the record store is away. Raises what made the engine stop.
        """
        change = _RecordChange(apply)
        self._record_changes.append(change)
        self._record_change.set()
        await self.wait_until(lambda: change.done.is_set() or self.failure is not None)
        if not change.done.is_set():
            assert self.failure is not None
            raise self.failure
        return self.record

    @contextlib.asynccontextmanager
    async def exclusive(self, what: str | Callable[[], str]) -> AsyncIterator[None]:
        """One change of the chain or of the set of replicas at a time; no merging goes on. Raises BusyError."""
        if self._exclusive is not None:
            raise BusyError(self.record.volume, self._exclusive())
        self._exclusive = (lambda: what) if isinstance(what, str) else what
        try:
            async with self.background_step:
                pass  # the last step is done, and none begins while we are here
            yield
        finally:
            self._exclusive = None

    @property
    def busy(self) -> bool:
        """Somebody is inside `exclusive`."""
        return bool(self._exclusive)

    async def call_all(self, mask: int, kind: FrameType, message: messages.Message | None = None) -> Answers:
        """One control request to all replicas of `mask` at once. Whoever does not answer in time is lost.

        Raises FencedError.
        """
        done: dict[str, bytes] = {}
        refused: dict[str, ReplicaRefusedError] = {}

        async def call(connection: ReplicaConnection) -> None:
            try:
                with trio.fail_after(self.request_timeout):
                    done[connection.name] = (await connection.call(kind, message))[5]
            except ReplicaRefusedError as error:
                refused[connection.name] = error
            except trio.TooSlowError:
                self.core.lost(connection.bit, f"did not answer {kind.name} within {self.request_timeout:g} s")
            except FencedError as error:
                self._fail(FencedError(self.token, error.highest, error.where))
            except EngineError as error:
                self.core.lost(connection.bit, str(error))

        async with trio.open_nursery() as nursery:
            for connection in self.connected(mask):
                nursery.start_soon(call, connection)
        self._drain()
        if self.failure is not None:
            raise self.failure
        return Answers(done, refused)

    async def members_recorded(self) -> None:
        """Wait until the record has let go of all that were lost. Raises what made the engine stop."""
        await self.wait_until(lambda: not self.core.leaving or self.failure is not None)
        if self.failure is not None:
            raise self.failure

    def watch_size(self, changed: Callable[[], None]) -> None:
        """Have `changed` called whenever the volume has grown; it must not raise or block."""
        self._size_watchers.append(changed)

    def tell_size(self) -> None:
        for changed in self._size_watchers:
            changed()

    def _grown(self, size: int) -> None:
        """Record and replicas have that size."""
        self.size = self.core.size = size
        self.target_size = max(self.target_size, size)
        self._tell("grown", message=f"the volume has {size} bytes", total=size)
        self.tell_size()

    def fenced(self, error: FencedError) -> None:
        """A replica knows a higher token: this is the end."""
        self._fail(FencedError(self.token, error.highest, error.where))

    def connected(self, mask: int) -> tuple[ReplicaConnection, ...]:
        """The connections of the replicas in `mask`."""
        return tuple(connection for bit, connection in self._connections.items() if bit & mask)

    def lose(self, connection: ReplicaConnection, reason: str) -> None:
        """Its replica failed outside of the data path."""
        if self._connections.get(connection.bit) is connection:
            self.core.lost(connection.bit, reason)
            self._drain()

    async def _write_record(self) -> None:
        """Carries out changes of the record, one at a time; a store that is away is asked until it answers."""
        while True:
            await self._record_change.wait()
            self._record_change = trio.Event()
            wanted, self._record_wanted = self._record_wanted, None
            changes, self._record_changes = self._record_changes, []
            pause = 0.1
            while True:
                try:
                    # between the read of self.record and the swap nothing else writes it: this is the only task
                    self.record = await trio.to_thread.run_sync(self._swap, self.record, wanted, changes)
                    break
                except FencedError as fenced:
                    self._fail(fenced)
                    return
                except RecordError as error:
                    log.warning("a change of the record waits for its store", error=str(error))
                    await trio.sleep(pause)
                    pause = min(pause * 2, 5.0)
            if self.record.size > self.size:
                self._grown(self.record.size)
            for change in changes:
                change.done.set()
            self._pulse()
            if wanted is not None:
                log.info("membership recorded", in_sync=list(wanted), version=self.record.version)
                self.core.recorded(wanted)
                self._drain()

    def _swap(
        self, record: VolumeRecord, in_sync: tuple[str, ...] | None, changes: list[_RecordChange]
    ) -> VolumeRecord:
        for _ in range(8):
            if record.epoch != self.token[0]:
                raise FencedError(self.token, (record.epoch, 0), "the volume record")
            new = record if in_sync is None else record.with_members(in_sync)
            for change in changes:
                new = change.apply(new)
            new = msgspec.structs.replace(new, version=record.version + 1)
            try:
                self._store.swap(record.version, new)
            except RecordConflictError:
                record = self._store.read()
                continue
            return new
        raise RecordError("the volume record changes faster than it can be written")

    # opening and coming back

    async def _open_replica(
        self, name: str, timeout: float | None = None
    ) -> tuple[ReplicaConnection, messages.OpenReply]:
        """Connect and claim a replica. Raises EngineError; the connection is served from then on."""
        timeout = self._open_timeout if timeout is None else timeout
        bit = self.core.bit(name)
        address = Address.parse(self._replicas[name].address)
        connection: ReplicaConnection | None = None
        try:
            with trio.fail_after(timeout):
                connection = await ReplicaConnection.connect(name, bit, address, self._key)
                connection.token = self.token
                if self.right.wanted and connection.version < messages.CONFIRM_SINCE:
                    raise ReplicaUnreachableError(name, "it is of a release that cannot confirm the right to serve")
                self._serve(connection)
                body = messages.Open(
                    volume_uuid=self.record.uuid, epoch=self.token[0], incarnation=self.token[1], gathers=True
                )
                reply = messages.decode((await connection.call(FrameType.OPEN, body))[5], messages.OpenReply)
        except trio.TooSlowError:
            if connection is not None:
                connection.close()
            raise ReplicaUnreachableError(name, f"no answer within {timeout:g} s") from None
        except EngineError:
            if connection is not None:
                connection.close()
            raise
        if reply.region_size not in _REGION_SIZES:
            connection.close()
            raise ReplicaUnreachableError(name, f"its maps have regions of {reply.region_size} bytes")
        connection.origin = reply.origin
        if reply.watch:
            self._nursery.start_soon(keep_watch, connection, address, self._key, self.pong)
        return connection, reply

    async def _open_members(self) -> None:
        """Open all in-sync members at once, leave out the unreachable, make the rest ready for reads."""
        opened: dict[str, tuple[ReplicaConnection, messages.OpenReply]] = {}
        reasons: dict[str, str] = {}
        fenced: list[FencedError] = []

        async def try_open(name: str) -> None:
            try:
                # whoever has been silent for seconds is not waited for another one by all clients
                patience = self._open_timeout / 3 if name in self._doubted else self._open_timeout
                connection, reply = await self._open_replica(name, patience)
                if reply.size < self.size:
                    connection.close()
                    raise ReplicaUnreachableError(name, f"it holds {reply.size} bytes, the volume has {self.size}")
                self.right.right.heard(reply.older_age, time.monotonic())
                opened[name] = connection, reply
            except FencedError as error:
                fenced.append(error)
            except EngineError as error:
                reasons[name] = str(error)

        async with trio.open_nursery() as nursery:
            for name in self.record.in_sync:
                nursery.start_soon(try_open, name)
        if fenced:
            raise FencedError(self.token, fenced[0].highest, fenced[0].where)
        for name in [name for name, (connection, _) in opened.items() if self._restarted(connection)]:
            # what it had acknowledged and not flushed may be gone, and nobody above would write it again
            reasons[name] = "its process was restarted"
            opened.pop(name)[0].close()
        if not opened:
            raise NoReplicaError(self.record.volume, reasons)
        ((region_size, _),) = Counter(reply.region_size for _, reply in opened.values()).most_common(1)
        for name in [name for name, (_, reply) in opened.items() if reply.region_size != region_size]:
            connection, reply = opened.pop(name)
            reasons[name] = f"its maps have regions of {reply.region_size} bytes, those of the others {region_size}"
            connection.close()
        self._pipeline.core = self._new_core(region_size)
        for connection, _ in opened.values():
            if connection.closed:
                reasons[connection.name] = "its connection broke while it was opened"
            else:
                self._connect(connection)
        dirty: set[int] = set()
        for name, (connection, reply) in opened.items():
            if (reply.dirty_regions or reply.rebuilding) and not connection.closed:
                try:
                    with trio.fail_after(self.request_timeout):
                        dirty |= await self._bitmap(connection, "")
                        if reply.rebuilding:
                            # it became complete, and was not told any more
                            await connection.call(FrameType.STATE, messages.State(rebuilding=False))
                except trio.TooSlowError:
                    reasons[name] = "it did not say which regions are dirty"
                except EngineError as error:
                    reasons[name] = str(error)
        for name, reason in reasons.items():
            self.core.lost(self.core.bit(name), reason)
        # nothing is asked of the core before it begins; replicas that are lost meanwhile leave as always
        await self.chains.make_equal()
        self.core.begin(dirty)
        self._drain()
        # no read before the record has let go of those that were not reached
        await self.members_recorded()
        await self.chains.revert_is_finished()

    def _restarted(self, connection: ReplicaConnection) -> bool:
        return self._instances is not None and self._instances.get(connection.name) != connection.instance

    def keep(self, name: str) -> None:
        """From now on `name` is brought back whenever it is out."""
        self._keepers[name] = trio.CancelScope(), trio.Event()
        self._nursery.start_soon(self._keep, name)

    async def stop_keeping(self, name: str) -> None:
        """Not any more, and not now: what is being done for it ends."""
        scope, ended = self._keepers.pop(name)
        scope.cancel()
        await ended.wait()

    async def _keep(self, name: str) -> None:
        scope, ended = self._keepers[name]
        try:
            with scope:
                await self._bring_back_always(name)
        finally:
            ended.set()

    async def _bring_back_always(self, name: str) -> None:
        pause = self._reconnect_interval
        while True:
            await trio.sleep(pause)
            state = self.core.state(name)
            if self.core.draining or state is not ReplicaState.OUT:
                # one that fails while it is filled, on a full disk perhaps, is not tried ever so often
                pause = self._reconnect_interval if state is ReplicaState.IN_SYNC else pause
                continue
            pause = min(pause * 1.5, 5.0)
            try:
                await self._bring_back(name)
            except FencedError as error:
                self._fail(FencedError(self.token, error.highest, error.where))
                return
            except EngineError as error:
                log.debug("replica stays out", replica=name, reason=str(error))
                self.core.note(self.core.bit(name), str(error))

    async def _bring_back(self, name: str) -> None:
        core, bit = self.core, self.core.bit(name)
        connection, reply = await self._open_replica(name)
        if reply.region_size != core.region_size:
            connection.close()
            raise ReplicaUnreachableError(name, f"its maps have regions of {reply.region_size} bytes")
        try:
            with trio.fail_after(self.request_timeout):
                await connection.call(FrameType.STATE, messages.State(rebuilding=True))
                rebuild = reply.rebuild
                if not rebuild:
                    try:
                        await self._catch_up(connection, reply.size)
                    except NeedsRebuildError as error:
                        log.info("replica is rebuilt", replica=name, reason=str(error))
                        rebuild = True
            if rebuild:
                await self._rebuild(connection, reply.size)
        except trio.TooSlowError:
            core.lost(bit, "did not answer while it was opened")
            raise ReplicaUnreachableError(name, "too slow while it was opened") from None
        except EngineError as error:
            core.lost(bit, str(error))
            raise
        except trio.Cancelled:
            core.lost(bit, "is not wanted any more")
            raise
        finally:
            if core.state(name) is ReplicaState.OUT:
                connection.close()
                self._drain()

    async def _catch_up(self, connection: ReplicaConnection, size: int) -> None:
        """It lacks what it missed, and no more than that. Raises NeedsRebuildError, EngineError."""
        core, name = self.core, connection.name
        while True:
            departed, chain = core.departed, self.chains.version
            size = await self._grow(connection, size)
            await self.chains.match(name, connection)
            await self._track_departed(connection, departed)
            unchanged = departed == core.departed and chain == self.chains.version and size >= self.target_size
            if unchanged and not self.chains.changing:
                break
        # no await between the check above and opened(): nobody can leave, and the volume not grow, unseen
        self._opened(connection)
        missed = await self.missed(connection)
        core.resync(connection.bit, missed)
        self._tell("replica_resyncing", name, "is being brought up to date", total=len(missed) * core.region_size)
        self._drain()

    async def _grow(self, connection: ReplicaConnection, size: int) -> int:
        """See that it has the size that the volume is to have; the size that it has then."""
        wanted = self.target_size
        if size < wanted:
            await connection.call(FrameType.RESIZE, messages.Resize(size=wanted))
        return max(size, wanted)

    async def _rebuild(self, connection: ReplicaConnection, size: int) -> None:
        """It is empty, or its snapshots are others."""
        rebuild = Rebuild(self, connection)
        # the volume does not grow in here
        async with self.exclusive(rebuild.describe):
            self._fillings[connection.bit] = rebuild.filling
            try:
                self._tell("replica_resyncing", connection.name, "is being rebuilt")
                with trio.fail_after(self.request_timeout):
                    await self._grow(connection, size)
                await rebuild.run()
            finally:
                del self._fillings[connection.bit]

    async def follow(self, connection: ReplicaConnection) -> None:
        """From here on the replica gets every write. Raises EngineError."""
        while True:
            departed = self.core.departed
            await self._track_departed(connection, departed)
            if departed == self.core.departed:
                break
        # no await between the check above and opened(): nobody can leave unseen in between
        self._opened(connection)

    async def _track_departed(self, connection: ReplicaConnection, departed: int) -> None:
        await connection.call(FrameType.TRACK, messages.Track(names=self.core.members(departed)))

    def _opened(self, connection: ReplicaConnection) -> None:
        """Raises ReplicaUnreachableError."""
        if connection.closed or self.core.draining:
            raise ReplicaUnreachableError(connection.name, "the connection ended while it was opened")
        self._connect(connection)
        self.core.opened(connection.bit)
        self._drain()

    async def to_the_end(self, work: Callable[[], Awaitable[None]]) -> None:
        """`work`, which goes on when whoever waits for it is cancelled. Raises what EngineError it raises."""
        done = trio.Event()
        failures: list[EngineError] = []

        async def run() -> None:
            try:
                await work()
            except EngineError as error:
                failures.append(error)
            finally:
                done.set()

        self._nursery.start_soon(run)
        await done.wait()
        if failures:
            raise failures[0]

    # who is a replica at all

    async def add_replica(self, replica: ReplicaRecord) -> None:
        """Record another replica, which is not in sync, and bring it up to date from now on."""
        # the core first: who looks at the record meanwhile must find all of it there
        self.core.add(replica.name)
        self._drain()
        await self.change_record(lambda record: msgspec.structs.replace(record, replicas=(*record.replicas, replica)))
        self._replicas[replica.name] = replica
        self.keep(replica.name)

    async def remove_replica(self, name: str) -> None:
        """Take a replica out of the in-sync set, then out of the record; the others forget what it missed.

        The caller knows that another one is in sync, and has stopped keeping this one.
        """
        core, bit = self.core, self.core.bit(name)
        core.lost(bit, "is being removed")
        self._disconnect(bit)
        self._drain()
        await self.wait_until(lambda: not bit & (core.leaving | core.recorded_set) or self.failure is not None)
        if self.failure is not None:
            raise self.failure
        await self.change_record(
            lambda record: msgspec.structs.replace(
                record, replicas=tuple(replica for replica in record.replicas if replica.name != name)
            )
        )
        del self._replicas[name]
        core.remove(bit)
        self._drain()

    def connection(self, name: str) -> ReplicaConnection | None:
        return self._connections.get(self.core.bit(name))

    async def missed(self, connection: ReplicaConnection) -> set[int]:
        """Regions in which a returning replica may differ: its own intents and what the members noted meanwhile."""
        core = self.core
        if connection.name in self.record.reverted_without:
            # what its head held then is in nobody's map
            return set(range(-(-self.size // core.region_size)))
        missed = await self._bitmap(connection, "")
        for member in core.members(core.in_sync):
            survivor = self.connection(member)
            if survivor is None:
                continue
            try:
                missed |= await self._bitmap(survivor, connection.name)
            except (ReplicaRefusedError, ProtocolError):
                # a member without a map of its absence: nothing is known, so everything is copied
                return set(range(-(-self.size // core.region_size)))
        return missed

    async def _bitmap(self, connection: ReplicaConnection, name: str) -> set[int]:
        """Regions of the volume that a map of the replica has set. Raises EngineError."""
        count = -(-self.size // self.core.region_size)
        bits = b""
        while len(bits) * 8 < count:
            *_, page = await connection.call(
                FrameType.BITMAP, messages.Bitmap(name=name), offset=len(bits), length=_BITMAP_PAGE
            )
            if not page:
                raise ProtocolError(f"the map {name!r} of replica {connection.name} ends within the volume")
            bits += page
        # a replica may be larger than the volume; what lies beyond is nobody's
        return {region for region in _regions(bits) if region < count}

    # work beside the data path

    async def ask(
        self, name: str, kind: FrameType, message: messages.Message | None = None, *, offset: int = 0, length: int = 0
    ) -> Frame:
        """One control request to a replica that is connected, and its answer.

        Raises ReplicaUnreachableError, also for one that takes too long, ReplicaRefusedError, FencedError.
        """
        connection = self.connection(name)
        if connection is None:
            raise ReplicaUnreachableError(name, "it is not connected")
        with trio.move_on_after(self.request_timeout):
            return await connection.call(kind, message, offset=offset, length=length)
        raise ReplicaUnreachableError(name, f"no answer to {kind.name} within {self.request_timeout:g} s")

    async def _not_holding(self) -> None:
        """While a snapshot is taken nothing may begin."""
        while self.core.holding:  # noqa: ASYNC110 - for milliseconds, seldom
            await trio.sleep(0.02)

    @contextlib.asynccontextmanager
    async def guarded(self, offset: int, length: int, timeout: float) -> AsyncIterator[None]:
        """Nobody writes to the range within the block. Raises BusyError when it cannot be had in time."""
        await self._not_holding()
        granted = trio.Event()
        guard = self.core.guard(offset, length, granted)
        try:
            self._drain()
            with trio.move_on_after(timeout):
                await granted.wait()
            if not granted.is_set():
                raise BusyError(self.record.volume, f"a write to the {length} bytes at {offset}")
            yield
        finally:
            self.core.unguard(guard)
            self._drain()

    async def repair(
        self, offset: int, length: int, wrong: Iterable[str], right: Iterable[str], *, by_checksum: bool
    ) -> None:
        """Have a range of the head written anew on `wrong`, as one of `right` has it, and wait for the attempt."""
        sources = self.core.mask(right)
        for name in wrong:
            done = trio.Event()
            await self._not_holding()
            self.core.repair(offset, length, self.core.bit(name), sources, done, by_checksum=by_checksum)
            self._drain()
            await done.wait()

    # life

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Controller]:
        """Attached inside the block. Leaving it without an error detaches cleanly.

        Raises NoReplicaError, FencedError, RecordError.
        """
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._flush_rounds)
            nursery.start_soon(self.poller.run, self._pipeline.drain)
            nursery.start_soon(self._write_record)
            await self._open_members()
            nursery.start_soon(self._tick)
            nursery.start_soon(self.right.run)
            nursery.start_soon(self.puller.run)
            for replica in self.record.replicas:
                self.keep(replica.name)
            nursery.start_soon(self.purger.run)
            self._open = True
            self._tell("ready", message="attached")
            yield self
            if self.failure is None:
                await self._detach()
            self._open = False
            nursery.cancel_scope.cancel()

    async def _detach(self) -> None:
        """Flush and mark every in-sync replica clean. What does not answer in time stays marked dirty."""
        core = self.core
        core.draining = True
        with trio.move_on_after(self.request_timeout * 2):
            await self.wait_until(lambda: core.idle)
            await self.flush()
            for connection in self.connected(core.in_sync):
                try:
                    await connection.call(FrameType.CLOSE, messages.Close(kept=self.right.kept))
                except EngineError as error:
                    log.warning("replica not closed cleanly", replica=connection.name, reason=str(error))

    # telling

    def _tell(self, event: str, replica: str = "", message: str = "", done: int = 0, total: int = 0) -> None:
        log.info(event, replica=replica, message=message)
        self._publish(EngineEvent(event=event, replica=replica, message=message, done=done, total=total))

    def _publish(self, event: EngineEvent) -> None:
        for listener in list(self._listeners):
            try:
                listener.send_nowait(event)
            except (trio.WouldBlock, trio.BrokenResourceError):
                # whoever does not read is not waited for
                self._listeners.discard(listener)
                listener.close()

    @contextlib.contextmanager
    def events(self) -> Any:
        """A receive channel of events from now on."""
        send, receive = trio.open_memory_channel[EngineEvent](256)
        self._listeners.add(send)
        try:
            yield receive
        finally:
            self._listeners.discard(send)
            send.close()

    @property
    def state(self) -> str:
        if self.failure is not None:
            return "stopped"
        if not self._open:
            return "opening"
        if self.core.leaving:
            return "waiting"
        return "equalising" if self.core.dirty else "ready"

    def status(self, frontend: str, block_file: str) -> EngineStatus:
        core = self.core
        replicas: list[ReplicaStatus] = []
        for replica in self.record.replicas:
            bit = core.bit(replica.name)
            connection = self._connections.get(bit)
            progress = self.resync_progress(replica.name) or OperationProgress()
            replicas.append(
                ReplicaStatus(
                    name=replica.name,
                    address=replica.address,
                    directory=replica.directory,
                    state=core.state(replica.name).value,
                    reason=core.reason(replica.name),
                    instance=connection.instance if connection else "",
                    resync_done=progress.done,
                    resync_total=progress.total,
                    resync_rate=progress.rate,
                    resync_left=progress.left,
                    phase=progress.message,
                    damaged=self.health[replica.name].damaged,
                    repaired=self.health[replica.name].repaired,
                    scrubbed_at=self.health[replica.name].scrubbed_at,
                )
            )
        operations: dict[str, OperationStats] = {
            name: self._pipeline.operations[op].snapshot() for op, name in _OPERATIONS.items()
        }
        return EngineStatus(
            volume=self.record.volume,
            state=self.state,
            pid=os.getpid(),
            epoch=self.token[0],
            incarnation=self.token[1],
            size=self.size,
            frontend=frontend,
            block_file=block_file,
            replicas=tuple(replicas),
            operations=operations,
            dirty_regions=len(core.dirty),
            requests_in_flight=len(core.inflight),
            busy=self._exclusive() if self._exclusive else "",
            clone=self.puller.status,
        )


def _regions(bitmap: bytes) -> set[int]:
    """Numbers of the set bits, lowest bit of the first byte first."""
    return {index * 8 + bit for index, byte in enumerate(bitmap) if byte for bit in range(8) if byte >> bit & 1}


def attach(
    store: RecordStore,
    key: bytes,
    *,
    epoch: int,
    incarnation: int = 1,
    instances: Mapping[str, str] | None = None,
    open_timeout: float = 1.0,
    doubted: Collection[str] = (),
    request_timeout: float = 8.0,
    reconnect_interval: float = 0.5,
    resync_rate: float = 0.0,
    right_lasts: float = 0.0,
) -> Controller:
    """A controller for the attachment that claimed `epoch` in the record.

    With `instances` it takes over from an earlier incarnation, whose requests had come from a page cache that is still
    there: members that were restarted since then are out. Raises RecordError, FencedError.
    """
    record = store.read()
    if record.epoch != epoch:
        raise FencedError((epoch, incarnation), (record.epoch, 0), "the volume record")
    return Controller(
        record,
        store,
        key,
        incarnation=incarnation,
        instances=instances,
        open_timeout=open_timeout,
        doubted=doubted,
        request_timeout=request_timeout,
        reconnect_interval=reconnect_interval,
        resync_rate=resync_rate,
        right_lasts=right_lasts,
    )
