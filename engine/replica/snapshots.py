"""Requests about snapshots. What changes the head stops everything else; all other work goes on beside the data.

A head switch (SNAPSHOT, REVERT) is a barrier: it waits until nothing of the owner is parked, and what comes behind it
on the connection waits for its answer. A coalesce step changes only files below the head, in ways that no reader can
see, and takes the lock of the control requests, so that the chain has one change at a time.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING

import msgspec
import structlog
import trio

from engine.errors import CorruptBlockError, StoreError
from engine.replica.sums import digest, mend
from engine.store.switch import HeadSwitch
from engine.wire import messages
from engine.wire.frame import Frame, FrameType

if TYPE_CHECKING:
    from engine.replica.exchange import Exchange
    from engine.replica.server import Server

log = structlog.get_logger()

CHANGES = frozenset(map(int, (FrameType.SNAPSHOT, FrameType.REVERT, FrameType.REMOVE_SNAPSHOT)))
# what a coalesce step may copy at most, so that an OPEN or a SNAPSHOT never waits for long behind one
MAX_STEP = 16 << 20
# threads for reads of snapshots; the syncs of the head have the common pool and never wait for one of these
READERS = 2

Work = Callable[[], Awaitable[bytes | None]]


def no_room(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


class SnapshotRequests:
    def __init__(self, server: Server) -> None:
        self._server = server
        self._readers = trio.CapacityLimiter(READERS)
        self._nursery: trio.Nursery | None = None

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Where the background requests run, until it is cancelled."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    # control requests

    async def control(self, connection: Exchange, frame: Frame) -> None:
        """Answer one of `CHANGES`. Raises ProtocolError, StoreError, OSError."""
        kind, payload, store = frame[0], frame[5], self._server.store
        if kind == FrameType.SNAPSHOT:
            new = messages.decode(payload, messages.Snapshot)
            freeze = partial(
                store.begin_snapshot, new.name, user_created=new.user_created, labels=new.labels, created=new.created
            )
            await self._switch(connection, frame, freeze, sync=True)
        elif kind == FrameType.REVERT:
            to = messages.decode(payload, messages.Revert)
            await self._switch(connection, frame, partial(store.begin_revert, to.name, created=to.created), sync=False)
        else:
            await self._remove(connection, frame, messages.decode(payload, messages.RemoveSnapshot))

    async def _switch(self, connection: Exchange, frame: Frame, begin: Callable[[], HeadSwitch], *, sync: bool) -> None:
        server = self._server
        await server.quiesce()
        async with server.whole():
            if server.refused(connection, frame):
                return
            change = begin()
            if sync:
                try:
                    await trio.to_thread.run_sync(server.store.sync)
                except OSError as error:
                    server.fail_parked(f"fdatasync failed: {error}")
                    raise
                if server.refused(connection, frame):  # deposed during the sync
                    return
            # nobody applies anything meanwhile: the owner's frames wait, and a new owner's OPEN waits for the lock
            try:
                await trio.to_thread.run_sync(change.run)
            except OSError as error:
                if change.in_doubt:
                    server.fail_parked(f"cannot change the head: {error}")
                raise
            server.store.finish_switch(change)
            await trio.to_thread.run_sync(change.release)
            if server.refused(connection, frame):
                return
        connection.reply(frame[0], 0, frame[2])

    async def _remove(self, connection: Exchange, frame: Frame, wanted: messages.RemoveSnapshot) -> None:
        async with self._server.whole():
            if self._server.refused(connection, frame):
                return
            await trio.to_thread.run_sync(self._server.store.mark_removed, wanted.name)
        connection.reply(frame[0], 0, frame[2])

    # requests that nothing waits for

    def background(self, connection: Exchange, frame: Frame) -> None:
        """Begin with the request; it is answered some time. Raises ProtocolError."""
        kind, payload = frame[0], frame[5]
        work: Work
        if kind == FrameType.SNAPSHOTS:
            work = partial(self._list, connection, frame)
        elif kind == FrameType.COALESCE:
            work = partial(self._coalesce, connection, frame, messages.decode(payload, messages.Coalesce))
        elif kind == FrameType.PULL:
            work = partial(self._pull, connection, frame, messages.decode(payload, messages.Pull))
        elif kind == FrameType.DIGEST:
            work = partial(digest, self._server, connection, frame, messages.decode(payload, messages.Digest))
        elif kind == FrameType.MEND:
            work = partial(mend, self._server, connection, frame, messages.decode(payload, messages.Mend))
        elif kind == FrameType.READ_SNAPSHOT:
            work = partial(self._read, connection, frame, messages.decode(payload, messages.ReadSnapshot))
        else:
            work = self._server.layers.work(connection, frame)
        assert self._nursery is not None
        self._server.background += 1
        self._nursery.start_soon(self._answer, connection, frame, work)

    async def _answer(self, connection: Exchange, frame: Frame, work: Work) -> None:
        """`work` returns the payload, or None when it has answered itself."""
        try:
            payload = await work()
            if payload is not None:
                connection.reply(frame[0], 0, frame[2], offset=frame[3], length=frame[4], payload=payload)
        except CorruptBlockError as error:
            connection.corrupt(frame, error)
        except (StoreError, OSError) as error:
            self._server.answer_failure(connection, frame, error)
        except Exception:
            # a defect that one peer's frames can reach must not take the volume from its engine
            log.exception("request failed", type=frame[0], peer=connection.peer)
            connection.close()
        finally:
            self._server.background -= 1
            self._server.stir()
        connection.send(now=True)

    async def _list(self, connection: Exchange, frame: Frame) -> bytes | None:
        async with self._server.whole():
            if self._server.refused(connection, frame):
                return None
            found = await trio.to_thread.run_sync(self._server.store.list_snapshots)
        entries = tuple(messages.SnapshotEntry(**msgspec.structs.asdict(info)) for info in found)
        reply = messages.SnapshotsReply(snapshots=entries, head_allocated=self._server.store.head_allocated)
        return messages.encode(reply)

    async def _coalesce(self, connection: Exchange, frame: Frame, wanted: messages.Coalesce) -> bytes | None:
        server = self._server
        async with server.whole():
            if server.refused(connection, frame):
                return None
            step = server.store.begin_coalesce(wanted.name, min(wanted.budget, MAX_STEP))
            # reads and writes of the head go on: what the step does is nothing that they could see
            try:
                await trio.to_thread.run_sync(step.run)
            except OSError as error:
                if not no_room(error):  # it may have been a sync, which must not be tried again
                    server.fail_parked(f"cannot merge a snapshot: {error}")
                raise
            left = step.merge.left
            done = server.store.finish_coalesce(step)
            if server.refused(connection, frame):
                return None
        return messages.encode(messages.CoalesceReply(done=done, copied=step.copied, left=0 if done else left))

    async def _pull(self, connection: Exchange, frame: Frame, wanted: messages.Pull) -> bytes | None:
        server, store = self._server, self._server.store
        async with server.whole():
            reply = messages.PullReply(done=True)
            while True:
                if server.refused(connection, frame):
                    return None
                step = store.begin_pull(min(wanted.budget, MAX_STEP), finish=wanted.finish)
                if step is None:
                    break
                try:
                    await trio.to_thread.run_sync(step.run)
                    done = store.finish_pull(step)
                except OSError as error:
                    # what was copied is nobody's yet, and is copied again; the end changes the chain
                    if step.pull.switched and not no_room(error):
                        server.fail_parked(f"cannot pull a clone: {error}")
                    raise
                pull = step.pull
                reply = messages.PullReply(
                    done=done,
                    complete=pull.complete,
                    copied=step.copied,
                    passed=pull.origin.passed,
                    total=pull.total,
                )
                # once the store has let go of what is shared, nothing comes between that and letting go on disk
                if done or not pull.switched:
                    break
        return messages.encode(reply)

    async def _read(self, connection: Exchange, frame: Frame, wanted: messages.ReadSnapshot) -> bytes | None:
        data = await trio.to_thread.run_sync(
            self._server.store.read_snapshot, wanted.name, frame[3], frame[4], limiter=self._readers
        )
        return None if self._server.refused(connection, frame) else data
