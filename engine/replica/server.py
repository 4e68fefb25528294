"""A replica's server: who owns the replica, what waits for which sync, and how the process leaves.

At most one connection, `owner`, may touch the data: the one that opened with the highest token. Every batch of
frames checks that once and then runs without an await, so a batch belongs wholly to one owner. Anything that was
parked across an await is checked again before it is applied or answered.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable

import structlog
import trio

from engine.buffers import BufferPool
from engine.errors import (
    SnapshotExistsError,
    SnapshotInUseError,
    SnapshotNotFoundError,
    StoreError,
)
from engine.replica import offloop
from engine.replica.backlog import Backlog
from engine.replica.connection import Connection
from engine.replica.direct import Direct, Disk
from engine.replica.exchange import Exchange
from engine.replica.layers import LayerRequests
from engine.replica.listener import Listener, tune
from engine.replica.snapshots import CHANGES, SnapshotRequests, no_room
from engine.replica.sums import keep_sums
from engine.replica.syncer import Syncer, ThreadSyncer
from engine.store import REGION_SIZE, IoMode, Store
from engine.wire import messages
from engine.wire.frame import MAX_PAYLOAD, Frame, FrameType, Status

log = structlog.get_logger()

MAX_UNAUTHENTICATED = 64
EXPIRE_SECONDS = 2.0
LEAVE_SECONDS = 2.0


class Server(Backlog):
    def __init__(self, store: Store, key: bytes, ring: Disk | None = None, syncer: Syncer | None = None) -> None:
        """With a `ring` (see `offloop.open_ring`) data goes past the page cache where the store allows it.

        `ring` and `syncer` are closed by `serve`.
        """
        super().__init__(store, syncer or ThreadSyncer(lambda: store.sync()))
        self.key = key
        self.instance = os.urandom(8).hex()
        self.buffers = BufferPool(MAX_PAYLOAD)
        if ring is not None:
            self.direct = Direct(self, ring)
            self.completions[ring.eventfd] = self.direct.reap
        self._connections: dict[Connection, None] = {}  # oldest first
        self._control = trio.Lock()
        self.snapshots = SnapshotRequests(self)
        self.layers = LayerRequests(self)
        self._stop = trio.Event()

    async def serve(self, listener: Listener) -> bool:
        """Serve until `stop` (True: everything submitted is on disk) or a failure (False). Closes the listener."""
        try:
            return await self._serve(listener)
        finally:
            if self.direct is not None:
                self.direct.close()
            self.syncer.close()

    async def _serve(self, listener: Listener) -> bool:
        async with trio.open_nursery() as nursery:
            await nursery.start(self.snapshots.run)
            if self.direct is not None:
                nursery.start_soon(offloop.run, self.direct, self.store, self.layers)
            nursery.start_soon(self._accept, listener, nursery)
            nursery.start_soon(self._sync_maps)
            for eventfd, completed in self.completions.items():
                nursery.start_soon(self._watch, eventfd, completed)
            nursery.start_soon(self._expire)
            nursery.start_soon(keep_sums, self)
            await self._stop.wait()
            trio.lowlevel.notify_closing(listener.sock)
            listener.close()
            if not self.failed:
                await self._leave()
            with trio.move_on_after(LEAVE_SECONDS):
                for connection in list(self._connections):
                    connection.send(now=True)
                    await connection.drained()
            nursery.cancel_scope.cancel()
        return not self.failed

    def stop(self) -> None:
        self._stop.set()

    async def stop_on_signal(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            task_status.started()
            async for number in signals:
                log.info("leaving", signal=signal.Signals(number).name)
                self.stop()

    async def _leave(self) -> None:
        for connection in self._connections:
            connection.read_scope.cancel()
        await self.quiesce()
        async with self.whole():  # not while the head is being switched
            if not self.failed:
                try:
                    await trio.to_thread.run_sync(self.store.sync)
                except OSError as error:
                    self.fail(f"fdatasync failed: {error}")

    # connections

    async def _accept(self, listener: Listener, nursery: trio.Nursery) -> None:
        while not self._stop.is_set():  # the listener is closed then, perhaps before this began
            try:
                await trio.lowlevel.wait_readable(listener.sock)
            except trio.ClosedResourceError:
                return
            try:
                sock, peer = listener.sock.accept()
            except BlockingIOError:
                continue
            except OSError as error:
                log.warning("cannot accept a connection", reason=error.strerror)
                await trio.sleep(0.1)
                continue
            tune(sock)
            strangers = [connection for connection in self._connections if not connection.authenticated]
            if len(strangers) >= MAX_UNAUTHENTICATED:
                self._connections.pop(strangers[0])
                strangers[0].close()
            connection = Connection(self, sock, _peer_name(sock, peer))
            self._connections[connection] = None
            nursery.start_soon(self._serve_connection, connection)

    async def _serve_connection(self, connection: Connection) -> None:
        try:
            await connection.run()
        except Exception:
            # a defect that one peer's frames can reach must not take the volume from its engine
            log.exception("connection failed", peer=connection.peer)
        finally:
            self._connections.pop(connection, None)
            if self.owner is connection:
                self.owner = None

    # data requests that cannot be answered at once

    async def _watch(self, eventfd: int, completed: Callable[[], None]) -> None:
        while True:
            await trio.lowlevel.wait_readable(eventfd)
            completed()

    async def change(self) -> None:
        """Wait until something that is parked, submitted or under way is done."""
        self.waiters += 1
        try:
            await self.changed.park()
        finally:
            self.waiters -= 1

    async def room(self) -> None:
        """Wait while too much is parked, submitted or under way."""
        while self.crowded():
            await self.change()

    @property
    def io(self) -> IoMode:
        """What became of the wish of the configuration."""
        if self.direct is None or self.store.direct < 0:
            return "buffered"
        return "direct" if self.store.cache is None else "auto"

    async def watch(self, connection: Connection, frame: Frame) -> None:
        """Answer a WATCH, and let the connection be one until it ends."""
        kind, _, seq, _, _, payload = frame
        wanted = messages.decode(payload, messages.Token)
        owner = self.owner
        if connection is owner:
            connection.reply(kind, Status.BAD_REQUEST, seq, payload=b"this connection owns the replica")
            return
        connection.token = wanted.epoch, wanted.incarnation
        if self.failed:
            connection.reply(kind, Status.IO_ERROR, seq, payload=self.failed.encode())
            return
        if owner is None or owner.token != connection.token or self.watched is owner:
            connection.refuse_unopened(frame)
            return
        connection.reply(kind, 0, seq)
        connection.send(now=True)
        await connection.drained()
        self.watched = owner
        try:
            await connection.watch(lambda: self._confirm(owner))
        finally:
            if self.watched is owner:
                self.watched = None

    def _confirm(self, owner: Exchange) -> tuple[int, bytes]:
        """Runs in the thread of the owner's watch."""
        with self.guard:
            if self.failed:
                return Status.IO_ERROR, self.failed.encode()
            if self.owner is owner and owner.token == self.token:
                self.confirmations.confirmed(time.monotonic())
                return Status.OK, b""
            return owner.refusal()

    async def _sync_maps(self) -> None:
        while not self.failed:
            while not self.gate.waiting:
                self.wake_maps = trio.Event()
                await self.wake_maps.wait()
            try:
                sync = self.gate.begin()
                await trio.to_thread.run_sync(sync.run)
            except OSError as error:
                self.fail_parked(f"cannot write a region map: {error}")
                return
            self.admit(self.gate.finish(sync))

    async def _expire(self) -> None:
        while not self.failed:
            await trio.sleep(EXPIRE_SECONDS)
            self.tick()
            try:
                self.store.maps.expire()
            except OSError as error:
                self.fail_parked(f"cannot write a region map: {error}")

    def fail(self, reason: str) -> None:
        """For good: what the kernel dropped after a failed sync cannot be had back, so this replica leaves."""
        if not self.failed:
            self.failed = reason
            log.error("replica failed", reason=reason)
        self._stop.set()
        self.stir()

    async def quiesce(self) -> None:
        """Wait until nothing is parked or submitted."""
        while not self.failed and not self.quiet():
            await self.change()

    # control requests

    async def control(self, connection: Exchange, frame: Frame) -> None:
        """Answer a request that has work of its own. Raises ProtocolError."""
        kind, _, seq, _, _, payload = frame
        try:
            if kind == FrameType.STATUS:
                connection.reply(kind, 0, seq, payload=messages.encode(self._status()))
            elif kind == FrameType.OPEN:
                await self._open(connection, frame, messages.decode(payload, messages.Open))
            elif kind == FrameType.TRACK:
                await self._track(connection, frame, messages.decode(payload, messages.Track))
            elif kind == FrameType.STATE:
                await self._state(connection, frame, messages.decode(payload, messages.State))
            elif kind == FrameType.RESIZE:
                await self._resize(connection, frame, messages.decode(payload, messages.Resize))
            elif kind in CHANGES:
                await self.snapshots.control(connection, frame)
            elif kind == FrameType.BEGIN_REBUILD:
                await self.layers.begin(connection, frame, messages.decode(payload, messages.BeginRebuild))
            else:
                await self._close(connection, frame, messages.decode(payload, messages.Close) if payload else _CLOSE)
        except (StoreError, OSError) as error:
            self.answer_failure(connection, frame, error)

    def answer_failure(self, connection: Exchange, frame: Frame, error: StoreError | OSError) -> None:
        if isinstance(error, StoreError):
            status, text = _STATUS.get(type(error), Status.BAD_REQUEST), error.reason
        else:
            log.error("request failed", type=frame[0], reason=str(error))
            status, text = Status.NO_SPACE if no_room(error) else Status.IO_ERROR, str(error)
        connection.reply(frame[0], status, frame[2], payload=text.encode())

    @contextlib.asynccontextmanager
    async def whole(self) -> AsyncIterator[None]:
        """One control request at a time, and to its end once begun, even if its connection goes meanwhile."""
        async with self._control:
            with trio.CancelScope(shield=True):
                yield

    async def _open(self, connection: Exchange, frame: Frame, wanted: messages.Open) -> None:
        kind, _, seq, _, _, _ = frame
        token = (wanted.epoch, wanted.incarnation)
        if wanted.volume_uuid != self.store.identity.uuid:
            connection.reply(kind, Status.WRONG_VOLUME, seq)
            return
        if token >= self.token:
            # from here on nothing of an older owner is applied or answered, even if the token cannot be persisted
            with self.guard:
                self.token = token
            self._depose(connection)
        async with self.whole():
            if self._stale(connection, frame, token):
                return
            self._depose(connection)  # one with the same token may have been quicker
            await trio.to_thread.run_sync(self.store.set_token, *token)
            await trio.to_thread.run_sync(lambda: self.store.set_marks(dirty=True))
            # nobody can become owner meanwhile, so nothing more is submitted
            while self.submitted() and not self.failed:
                await self.change()
            if self._stale(connection, frame, token):  # a higher one came during these
                return
            maps = self.store.maps
            maps.regions.inherit()
            connection.token = token
            connection.gathers = wanted.gathers
            now = time.monotonic()
            with self.guard:
                self.owner = connection
                self.confirmations.opened(token[0], now)
            log.info("opened", peer=connection.peer, epoch=token[0], incarnation=token[1])
            answer = messages.OpenReply(
                size=self.store.size,
                region_size=REGION_SIZE,
                dirty_regions=maps.dirty_regions,
                tracked=maps.tracked,
                rebuilding=self.store.meta.rebuilding,
                rebuild=self.store.rebuild is not None,
                origin=self.store.origin.source if self.store.origin is not None else "",
                older_age=self.confirmations.age(now),
                watch=True,
            )
            connection.reply(kind, 0, seq, payload=messages.encode(answer))

    def _stale(self, connection: Exchange, frame: Frame, token: tuple[int, int]) -> bool:
        """Whether the OPEN had to be refused here."""
        if self.failed:
            connection.reply(frame[0], Status.IO_ERROR, frame[2], payload=self.failed.encode())
            return True
        if token < self.token:
            log.warning("open refused", peer=connection.peer, epoch=token[0], incarnation=token[1])
            connection.reply(frame[0], Status.STALE_EPOCH, frame[2], payload=self.highest())
            return True
        return False

    def _depose(self, successor: Exchange) -> None:
        """Discard what the owner has parked, and close it. Everything else of it is applied, or with the disk."""
        with self.guard:
            old, self.owner = self.owner, None
        for connection, frame in self.discard():
            connection.refuse_unopened(frame)
        self.stir()
        if old is not None and old is not successor:
            log.warning("superseded", peer=old.peer, by=successor.peer)
            if old.token is not None and old.token < self.token:
                # an engine that lost the volume must hear that, not guess it from a broken connection; it hangs up
                old.reply(FrameType.OPEN, Status.STALE_EPOCH, 0, payload=self.highest())
                old.send(now=True)
            else:
                old.send(now=True)
                old.close()

    async def _track(self, connection: Exchange, frame: Frame, wanted: messages.Track) -> None:
        async with self.whole():
            if self.refused(connection, frame):
                return
            change = self.store.begin_track(wanted.names)
            try:
                await trio.to_thread.run_sync(change.run)
            except OSError as error:
                self.fail_parked(f"cannot write a region map: {error}")
                raise
            self.store.maps.finish_track(change)
        connection.reply(frame[0], 0, frame[2])

    async def _state(self, connection: Exchange, frame: Frame, wanted: messages.State) -> None:
        async with self.whole():
            if self.refused(connection, frame):
                return
            await trio.to_thread.run_sync(lambda: self.store.set_marks(rebuilding=wanted.rebuilding))
        connection.reply(frame[0], 0, frame[2])

    async def _resize(self, connection: Exchange, frame: Frame, wanted: messages.Resize) -> None:
        async with self.whole():
            if self.refused(connection, frame):
                return
            # the owner's frames wait behind this one, so nothing asks for the new room before it is there
            if wanted.size > self.store.size:
                change = self.store.begin_resize(wanted.size)
                try:
                    await trio.to_thread.run_sync(change.run)
                except OSError as error:
                    if not no_room(error) and error.errno != errno.EFBIG:  # a sync may have failed
                        self.fail_parked(f"cannot grow: {error}")
                    raise
                self.store.finish_resize(change)
                log.info("grown", size=self.store.size)
            if self.refused(connection, frame):
                return
        connection.reply(frame[0], 0, frame[2])

    async def _close(self, connection: Exchange, frame: Frame, wanted: messages.Close) -> None:
        await self.quiesce()
        async with self.whole():
            if self.refused(connection, frame):
                return
            maps = self.store.maps
            try:
                await trio.to_thread.run_sync(self.store.sync)
                if self.refused(connection, frame):  # deposed during the sync
                    return
                maps.clear_settled_attachment()
                sync = maps.begin()
                await trio.to_thread.run_sync(sync.run)
            except OSError as error:
                self.fail_parked(f"fdatasync failed: {error}")
                raise
            maps.finish(sync)
            # one whose right is kept stays marked: a restart of this process must not take it for ended
            if not maps.dirty_regions and not wanted.kept:
                await trio.to_thread.run_sync(lambda: self.store.set_marks(dirty=False))
            with self.guard:
                if self.owner is connection:
                    self.owner = None
                    if not wanted.kept:
                        self.confirmations.closed()
            connection.token = None
        connection.reply(frame[0], 0, frame[2])

    def refused(self, connection: Exchange, frame: Frame) -> bool:
        if self.failed:
            connection.reply(frame[0], Status.IO_ERROR, frame[2], payload=self.failed.encode())
            return True
        if self.owner is not connection:
            connection.refuse_unopened(frame)
            return True
        return False

    def _status(self) -> messages.StatusReply:
        store, counters = self.store, self.counters
        return messages.StatusReply(
            replica=store.identity.replica,
            instance=self.instance,
            volume=store.identity.volume,
            volume_uuid=store.identity.uuid,
            size=store.size,
            allocated=store.allocated,
            epoch=self.token[0],
            incarnation=self.token[1],
            rebuilding=store.meta.rebuilding,
            dirty_regions=store.maps.dirty_regions,
            tracked=store.maps.tracked,
            reads=counters.reads,
            writes=counters.writes,
            flushes=counters.flushes,
            unmaps=counters.unmaps,
            read_bytes=counters.read_bytes,
            written_bytes=counters.written_bytes,
            corrupt=counters.corrupt,
            summed_regions=store.summed,
        )


_CLOSE = messages.Close()
_STATUS: dict[type[StoreError], Status] = {
    SnapshotExistsError: Status.EXISTS,
    SnapshotNotFoundError: Status.NOT_FOUND,
    SnapshotInUseError: Status.IN_USE,
}


def _peer_name(sock: socket.socket, peer: object) -> str:
    if isinstance(peer, tuple):
        return f"{peer[0]}:{peer[1]}"
    return f"unix, fd {sock.fileno()}"
