"""Drives the core: sockets, the record, the clock.

One task reads each connection, one sends what a round of events queued, one ticks, one writes the record, and one
per replica brings it back when it is absent. All of them run on one thread and touch the core only between awaits;
`_drain` is the one place where the core's output is carried out, and it never awaits.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import outcome
import structlog
import trio
from google_crc32c import value as crc32c

from engine.address import Address
from engine.client import EngineEvent, EngineStatus, OperationStats, ReplicaStatus
from engine.controller import core as decide
from engine.controller.connection import (
    CALL,
    ReplicaConnection,
    ReplicaRefusedError,
    ReplicaUnreachableError,
)
from engine.controller.core import Core, ReplicaState
from engine.controller.stats import Operation
from engine.errors import EngineError, FencedError, NoReplicaError, RecordConflictError, RecordError
from engine.frontend.base import BlockRequest
from engine.ops import FLUSH, READ, UNMAP, WRITE
from engine.record import RecordStore, VolumeRecord
from engine.wire import messages
from engine.wire.frame import REPLY, Frame, FrameType, Status, encode_header

log = structlog.get_logger()

_TICK = 0.25
_PROGRESS_EVERY = 2.0
_BITMAP_PAGE = 1 << 20
_OPERATIONS = {READ: "read", WRITE: "write", FLUSH: "flush", UNMAP: "unmap"}


class _TaskRequest:
    """A request, and the task that waits for it."""

    __slots__ = ("length", "offset", "op", "payload", "started", "task")

    def __init__(self, op: int, offset: int, length: int, payload: bytes) -> None:
        self.task: trio.lowlevel.Task | None = trio.lowlevel.current_task()
        self.op = op
        self.offset = offset
        self.length = length
        self.payload = payload
        self.started = time.perf_counter()

    def finish(self, error: int, data: bytes) -> None:
        if self.task is not None:
            trio.lowlevel.reschedule(self.task, outcome.Value((error, data)))

    def abandon(self, _: Callable[[], None]) -> trio.lowlevel.Abort:
        # what was sent cannot be taken back, but nobody waits for its answer any more
        self.task = None
        return trio.lowlevel.Abort.SUCCEEDED


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
        request_timeout: float,
        reconnect_interval: float,
    ) -> None:
        self.record = record
        self.size = record.size
        self.token = (record.epoch, incarnation)
        self.failure: EngineError | None = None
        self.failed = trio.Event()
        self._store = store
        self._key = key
        self._instances = instances
        self._open_timeout = open_timeout
        self._request_timeout = request_timeout
        self._reconnect_interval = reconnect_interval
        self._replicas = {replica.name: replica for replica in record.replicas}
        self._connections: dict[int, ReplicaConnection] = {}
        self._routes: dict[int, tuple[ReplicaConnection, ...]] = {}
        self._operations = {op: Operation() for op in _OPERATIONS}
        self._flusher: trio.lowlevel.Task | None = None
        self._wakeup_due = False
        self._record_wanted: tuple[str, ...] | None = None
        self._record_change = trio.Event()
        self._changed = trio.Event()
        self._listeners: set[trio.MemorySendChannel[EngineEvent]] = set()
        self._open = False
        self.core = self._new_core(1 << 20)

    def _new_core(self, region_size: int) -> Core:
        return Core(
            size=self.size,
            replicas=[replica.name for replica in self.record.replicas],
            in_sync=self.record.in_sync,
            region_size=region_size,
            request_timeout=self._request_timeout,
        )

    # requests

    async def read(self, offset: int, length: int) -> bytes:
        """Raises OSError."""
        return await self._execute(READ, offset, length, b"")

    async def write(self, offset: int, data: bytes) -> None:
        """Returns when every in-sync replica has it. Raises OSError."""
        await self._execute(WRITE, offset, len(data), data)

    async def unmap(self, offset: int, length: int) -> None:
        """The range reads as zeros afterwards. Raises OSError."""
        await self._execute(UNMAP, offset, length, b"")

    async def flush(self) -> None:
        """Returns when all that was acknowledged before is on every in-sync replica's disk. Raises OSError."""
        await self._execute(FLUSH, 0, 0, b"")

    async def _execute(self, op: int, offset: int, length: int, payload: bytes) -> bytes:
        if op != FLUSH and (length <= 0 or offset < 0 or offset + length > self.size):
            raise OSError(errno.EINVAL, f"request {offset}+{length} is outside the volume of {self.size} bytes")
        request = _TaskRequest(op, offset, length, payload)
        self.submit(request)
        self._wake()
        error, data = await trio.lowlevel.wait_task_rescheduled(request.abandon)
        if error:
            raise OSError(error, os.strerror(error))
        return data  # type: ignore[no-any-return]

    def submit(self, request: BlockRequest) -> None:
        """Queue a request whose range lies within the volume; it is on its way after `kick`."""
        self.core.submit(request.op, request.offset, request.length, request.payload, request)

    def kick(self) -> None:
        """Send what was submitted."""
        self._drain()

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
        core = self.core
        while core.outbox or core.actions or core.replies:
            if core.outbox:
                sends, core.outbox = core.outbox, []
                touched: set[ReplicaConnection] = set()
                for mask, op, seq, offset, length, payload in sends:
                    route = self._routes.get(mask)
                    if route is None:
                        route = self._route(mask)
                    body = payload if type(payload) is bytes else _body(op, payload)
                    crc = crc32c(body) if body else 0
                    header = encode_header(op, 0, seq, offset, length, len(body), crc)
                    for connection in route:
                        connection.queue(header, body) if body else connection.queue(header)
                        touched.add(connection)
                for connection in touched:
                    try:
                        connection.pump()
                    except OSError as broken:
                        core.lost(connection.bit, f"cannot be written to: {broken.strerror}")
            if core.replies:
                replies, core.replies = core.replies, []
                now = time.perf_counter()
                for token, error, data in replies:
                    self._operations[token.op].add(now - token.started, token.length, error)
                    token.finish(error, data)
            if core.actions:
                actions, core.actions = core.actions, []
                for action in actions:
                    self._act(action)
                self._pulse()
        if core.draining:
            self._pulse()

    def _pulse(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _wait_until(self, condition: Callable[[], bool]) -> None:
        """Looks at `condition` after every round that changed membership (while draining: after every round)."""
        while not condition():
            await self._changed.wait()

    def _route(self, mask: int) -> tuple[ReplicaConnection, ...]:
        route = tuple(c for bit, c in self._connections.items() if bit & mask)
        self._routes[mask] = route
        return route

    def _act(self, action: decide.Action) -> None:
        match action:
            case decide.WriteRecord(in_sync):
                self._record_wanted = in_sync
                self._record_change.set()
            case decide.Disconnect(replica, reason):
                self._disconnect(self.core.bit(replica))
                log.warning("replica failed", replica=replica, reason=reason)
            case decide.ReplicaLeft(replica, reason):
                self._tell("replica_left", replica, f"left the in-sync set: {reason}")
            case decide.ReplicaJoined(replica):
                self._tell("replica_in_sync", replica, "is in sync")
            case decide.Equalised(regions):
                self._tell("equalised", message="replicas are equal again after a crash", done=regions, total=regions)
            case decide.Fenced(replica, detail):
                self._fail(FencedError(self.token, messages.decode_token(detail), f"replica {replica}"))
            case decide.Faulted(reason):
                self._fail(NoReplicaError(self.record.volume, {"engine": reason}))

    def _fail(self, failure: EngineError) -> None:
        if self.failure is None:
            self.failure = failure
            self.core.stopped = True
            self._pulse()
            self._tell("fenced" if isinstance(failure, FencedError) else "faulted", message=str(failure))
            self.failed.set()

    def _disconnect(self, bit: int) -> None:
        connection = self._connections.pop(bit, None)
        self._routes.clear()
        if connection is not None:
            connection.close()

    # tasks

    async def _serve_connection(self, connection: ReplicaConnection) -> None:
        """Delivers answers until the connection ends, which is the replica's loss."""
        bit = connection.bit
        with connection.scope:
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(connection.pump_when_writable)
                    while True:
                        for frame in await connection.receive():
                            self._answer(connection, frame)
                            if connection.closed:
                                return
                        self._drain()
            except* (OSError, EngineError) as group:
                if not connection.closed:
                    # the core is made anew while members are opened: take the one that counts now
                    self.core.lost(bit, _first(group))
                    if self._connections.get(bit) is connection:
                        self._disconnect(bit)
                    self._drain()
            finally:
                connection.close()

    def _answer(self, connection: ReplicaConnection, frame: Frame) -> None:
        kind, status, seq, _, _, payload = frame
        if not kind & REPLY:
            self.core.lost(connection.bit, f"sent a frame of type {kind:#x} that is no answer")
        elif seq & CALL:
            connection.deliver(frame)
        elif status == Status.STALE_EPOCH:
            # also unasked: a replica that was opened by a higher epoch says so
            self._fail(FencedError(self.token, messages.decode_token(payload), f"replica {connection.name}"))
        else:
            self.core.answered(connection.bit, seq, status, payload)

    async def _tick(self) -> None:
        last = trio.current_time()
        progress = last + _PROGRESS_EVERY
        while True:
            await trio.sleep(_TICK)
            now = trio.current_time()
            self.core.tick(now - last)
            last = now
            self._drain()
            if now >= progress:
                progress = now + _PROGRESS_EVERY
                self._tell_progress()

    def _tell_progress(self) -> None:
        for bit, resync in self.core.resyncs.items():
            if resync.total and resync.copied < resync.total:
                name, region = self.core.members(bit)[0], self.core.region_size
                self._publish(
                    EngineEvent(
                        event="resync_progress",
                        replica=name,
                        done=resync.copied * region,
                        total=resync.total * region,
                    )
                )

    async def _write_record(self) -> None:
        """Carries out membership changes, one at a time; a store that is away is asked until it answers."""
        while True:
            await self._record_change.wait()
            self._record_change = trio.Event()
            wanted = self._record_wanted
            assert wanted is not None
            pause = 0.1
            while True:
                try:
                    # between the read of self.record and the swap nothing else writes it: this is the only task
                    self.record = await trio.to_thread.run_sync(self._swap, self.record, wanted)
                    break
                except FencedError as fenced:
                    self._fail(fenced)
                    return
                except RecordError as error:
                    log.warning("the membership change waits for the record store", error=str(error))
                    await trio.sleep(pause)
                    pause = min(pause * 2, 5.0)
            log.info("membership recorded", in_sync=list(wanted), version=self.record.version)
            self.core.recorded(wanted)
            self._drain()

    def _swap(self, record: VolumeRecord, in_sync: tuple[str, ...]) -> VolumeRecord:
        for _ in range(8):
            if record.epoch != self.token[0]:
                raise FencedError(self.token, (record.epoch, 0), "the volume record")
            new = record.next(in_sync=in_sync)
            try:
                self._store.swap(record.version, new)
            except RecordConflictError:
                record = self._store.read()
                continue
            return new
        raise RecordError("the volume record changes faster than it can be written")

    # opening and coming back

    async def _open_replica(self, name: str) -> tuple[ReplicaConnection, messages.OpenReply]:
        """Connect and claim a replica. Raises EngineError; the connection is served from then on."""
        bit = self.core.bit(name)
        address = Address.parse(self._replicas[name].address)
        connection: ReplicaConnection | None = None
        try:
            with trio.fail_after(self._open_timeout):
                connection = await ReplicaConnection.connect(name, bit, address, self._key)
                self._nursery.start_soon(self._serve_connection, connection)
                body = messages.Open(volume_uuid=self.record.uuid, epoch=self.token[0], incarnation=self.token[1])
                reply = messages.decode((await connection.call(FrameType.OPEN, body))[5], messages.OpenReply)
        except trio.TooSlowError:
            if connection is not None:
                connection.close()
            raise ReplicaUnreachableError(name, f"no answer within {self._open_timeout:g} s") from None
        except EngineError:
            if connection is not None:
                connection.close()
            raise
        if reply.size < self.size:
            connection.close()
            raise ReplicaUnreachableError(name, f"it holds {reply.size} bytes, the volume has {self.size}")
        return connection, reply

    async def _open_members(self) -> None:
        """Open all in-sync members at once, leave out the unreachable, make the rest ready for reads."""
        opened: dict[str, tuple[ReplicaConnection, messages.OpenReply]] = {}
        reasons: dict[str, str] = {}
        fenced: list[FencedError] = []

        async def try_open(name: str) -> None:
            try:
                opened[name] = await self._open_replica(name)
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
        regions = {reply.region_size for _, reply in opened.values()}
        if len(regions) != 1:
            raise EngineError(f"the replicas' region sizes differ: {sorted(regions)}")
        self.core = self._new_core(regions.pop())
        for connection, _ in opened.values():
            if connection.closed:
                reasons[connection.name] = "its connection broke while it was opened"
            else:
                self._connections[connection.bit] = connection
        dirty: set[int] = set()
        for name, (connection, reply) in opened.items():
            if reply.dirty_regions and not connection.closed:
                try:
                    dirty |= _regions(await self._bitmap(connection, ""))
                except EngineError as error:
                    reasons[name] = str(error)
        for name, reason in reasons.items():
            self.core.lost(self.core.bit(name), reason)
        self.core.begin(dirty)
        self._drain()
        # no read before the record has let go of those that were not reached
        await self._wait_until(lambda: not self.core.leaving or self.failure is not None)
        if self.failure is not None:
            raise self.failure

    def _restarted(self, connection: ReplicaConnection) -> bool:
        return self._instances is not None and self._instances.get(connection.name) != connection.instance

    async def _keep(self, name: str) -> None:
        """Brings a replica back whenever it is out."""
        pause = self._reconnect_interval
        while True:
            await trio.sleep(pause)
            if self.core.draining or self.core.state(name) is not ReplicaState.OUT:
                pause = self._reconnect_interval
                continue
            try:
                await self._bring_back(name)
            except FencedError as error:
                self._fail(FencedError(self.token, error.highest, error.where))
                return
            except EngineError as error:
                log.debug("replica stays out", replica=name, reason=str(error))
                self.core.note(self.core.bit(name), str(error))
                pause = min(pause * 1.5, 5.0)

    async def _bring_back(self, name: str) -> None:
        core, bit = self.core, self.core.bit(name)
        connection, reply = await self._open_replica(name)
        try:
            with trio.fail_after(self._request_timeout):
                await connection.call(FrameType.STATE, messages.State(rebuilding=True))
                while True:
                    departed = core.departed
                    await connection.call(FrameType.TRACK, messages.Track(names=core.members(departed)))
                    if departed == core.departed:
                        break
                # no await between the check above and opened(): nobody can leave unseen in between
                if connection.closed or core.draining:
                    raise ReplicaUnreachableError(name, "the connection ended while it was opened")
                self._connections[bit] = connection
                self._routes.clear()
                core.opened(bit)
                self._drain()
                missed = await self._missed(name, connection, rebuilding=reply.rebuilding)
                core.resync(bit, missed)
                self._tell(
                    "replica_resyncing", name, "is being brought up to date", total=len(missed) * core.region_size
                )
                self._drain()
        except trio.TooSlowError:
            core.lost(bit, "did not answer while it was opened")
            raise ReplicaUnreachableError(name, "too slow while it was opened") from None
        except EngineError as error:
            core.lost(bit, str(error))
            raise
        finally:
            if core.state(name) is ReplicaState.OUT:
                connection.close()
                self._drain()

    async def _missed(self, name: str, connection: ReplicaConnection, *, rebuilding: bool) -> set[int]:
        """Regions in which a returning replica may differ: its own intents and what the members noted meanwhile."""
        core = self.core
        missed = _regions(await self._bitmap(connection, ""))
        for member in core.members(core.in_sync):
            survivor = self._connections.get(core.bit(member))
            if survivor is None:
                continue
            try:
                missed |= _regions(await self._bitmap(survivor, name))
            except ReplicaRefusedError:
                # a member without a map of its absence: nothing is known, so everything is copied
                return set(range(-(-self.size // core.region_size)))
        return missed

    async def _bitmap(self, connection: ReplicaConnection, name: str) -> bytes:
        pages: list[bytes] = []
        got = 0
        while True:
            _, _, _, _, total, page = await connection.call(
                FrameType.BITMAP, messages.Bitmap(name=name), offset=got, length=_BITMAP_PAGE
            )
            pages.append(page)
            got += len(page)
            if got >= total or not page:
                return b"".join(pages)

    # life

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Controller]:
        """Attached inside the block. Leaving it without an error detaches cleanly.

        Raises NoReplicaError, FencedError, RecordError.
        """
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._flush_rounds)
            nursery.start_soon(self._write_record)
            await self._open_members()
            nursery.start_soon(self._tick)
            for replica in self.record.replicas:
                nursery.start_soon(self._keep, replica.name)
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
        with trio.move_on_after(self._request_timeout * 2):
            await self._wait_until(lambda: core.idle)
            await self.flush()
            for connection in self._route(core.in_sync):
                try:
                    await connection.call(FrameType.CLOSE)
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
            resync, connection = core.resyncs.get(bit), self._connections.get(bit)
            replicas.append(
                ReplicaStatus(
                    name=replica.name,
                    address=replica.address,
                    directory=replica.directory,
                    state=core.state(replica.name).value,
                    reason=core.reason(replica.name),
                    instance=connection.instance if connection else "",
                    resync_done=resync.copied * core.region_size if resync else 0,
                    resync_total=resync.total * core.region_size if resync else 0,
                )
            )
        operations: dict[str, OperationStats] = {
            name: self._operations[op].snapshot() for op, name in _OPERATIONS.items()
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
        )


def _body(op: int, payload: Any) -> bytes:
    if op == decide.TRACK:
        return messages.encode(messages.Track(names=payload))
    return messages.encode(messages.State(rebuilding=payload))


def _regions(bitmap: bytes) -> set[int]:
    """Numbers of the set bits, lowest bit of the first byte first."""
    return {index * 8 + bit for index, byte in enumerate(bitmap) if byte for bit in range(8) if byte >> bit & 1}


def _first(group: BaseExceptionGroup[BaseException]) -> str:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, OSError):
        return f"its connection failed: {error.strerror}"
    return str(error)


def attach(
    store: RecordStore,
    key: bytes,
    *,
    epoch: int,
    incarnation: int = 1,
    instances: Mapping[str, str] | None = None,
    open_timeout: float = 1.0,
    request_timeout: float = 8.0,
    reconnect_interval: float = 0.5,
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
        request_timeout=request_timeout,
        reconnect_interval=reconnect_interval,
    )
