"""What a replica cannot answer at once, as far as nothing of it awaits: writes before their intent bits, and flushes.

A write whose regions' bits are not on disk waits in the gate, and behind that perhaps for room in `Direct`. A flush
waits for the writes before it, and for an fdatasync that begins after them: one at a time, for all that wait then.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio
from mypy_extensions import mypyc_attr

from engine.ops import FLUSH, WRITE
from engine.replica.gate import Gate
from engine.replica.right import Confirmations
from engine.wire import messages
from engine.wire.frame import Frame, FrameType, Status

if TYPE_CHECKING:
    from engine.replica.direct import Direct
    from engine.replica.exchange import Exchange
    from engine.replica.syncer import Syncer
    from engine.store import Store

MAX_PARKED = 64 << 20
MAX_BACKGROUND = 16

Item = tuple["Exchange", Frame]


class Counters:
    """Since the process began."""

    def __init__(self) -> None:
        self.reads = 0
        self.writes = 0
        self.flushes = 0
        self.unmaps = 0
        self.read_bytes = 0
        self.written_bytes = 0
        self.corrupt = 0


@mypyc_attr(allow_interpreted_subclasses=True)
class Backlog:
    """The half of a `Server` that never awaits.

    `owner` is the connection that may touch the data. `changed` is for the `waiters` tasks that wait for room, or for
    quiet. `background` counts the requests that are worked on beside the data.
    """

    def __init__(self, store: Store, syncer: Syncer) -> None:
        self.store = store
        self.owner: Exchange | None = None
        self.token = store.token
        self.failed = ""
        self.counters = Counters()
        self.direct: Direct | None = None
        self.gate: Gate[Item] = Gate(store.maps)
        self.changed = trio.lowlevel.ParkingLot()
        self.waiters = 0
        self.background = 0
        self.confirmations = Confirmations(time.monotonic(), store.token[0], closed=not store.meta.dirty)
        # a watch's thread looks at token, owner and confirmations under it, and this thread changes them under it
        self.guard = threading.Lock()
        self.watched: Exchange | None = None
        # what to call when one of these descriptors is readable, by whoever does not leave that to the event loop
        self.completions: dict[int, Callable[[], None]] = {syncer.eventfd: self.synced}
        self.wake_maps = trio.Event()
        self._ready: deque[Item] = deque()  # out of the gate, waiting for room in `direct`
        self._parked_bytes = 0
        self._flushes: list[Item] = []
        self._syncing: list[Item] = []
        self._in_batch = False
        self.syncer = syncer

    def fail(self, reason: str) -> None:
        raise NotImplementedError

    def stir(self) -> None:
        """Something that a task may wait for has changed."""
        if self.waiters:
            self.changed.unpark_all()

    # around every batch

    def begin_batch(self) -> None:
        """Until `submit`, syncs wait: one serves all flushes of the batch."""
        self._in_batch = True

    def submit(self) -> None:
        """Hand to the disk what a batch prepared."""
        self._in_batch = False
        if self.direct is not None:
            self.direct.submit()
        if self._flushes:
            alone = self._alone()
            self._begin_sync(alone and self.watched is self.owner)
            if alone:
                self._finish_sync(True)

    def tick(self) -> None:
        self.store.maps.regions.now = time.monotonic()

    def busy(self) -> bool:
        """Tasks of the event loop have something to do, or wait for what a connection does."""
        return self.waiters > 0 or self.background > 0 or not self.gate.idle

    def crowded(self) -> bool:
        """So much is parked, submitted or under way that no connection may bring more."""
        starved = self.direct is not None and self.direct.starved
        return (starved or self._parked_bytes > MAX_PARKED or self.background >= MAX_BACKGROUND) and not self.failed

    def quiet(self) -> bool:
        """Nothing is parked or submitted."""
        return self.gate.idle and not self._ready and not self.submitted() and not self._flushes and not self._syncing

    def submitted(self) -> bool:
        return self.direct is not None and not self.direct.idle

    # answered at once

    def confirm(self, connection: Exchange, seq: int) -> None:
        """Its owner asks whether there is a higher token: it would not be the owner then."""
        with self.guard:
            self.confirmations.confirmed(time.monotonic())
        connection.reply(FrameType.CONFIRM, 0, seq)
        # with a flush that was asked for ahead it would wait for the disk, and cost the replica its place
        connection.send(now=True)

    def settled(self, connection: Exchange, frame: Frame) -> None:
        try:
            self.store.maps.settled(frame[3], bool(frame[4]))
        except OSError as error:
            self.fail(f"cannot write a region map: {error}")
            connection.reply(frame[0], Status.IO_ERROR, frame[2], payload=self.failed.encode())
            return
        connection.reply(frame[0], 0, frame[2], offset=frame[3], length=frame[4])

    def highest(self) -> bytes:
        """Payload of a STALE_EPOCH reply."""
        return messages.encode(messages.Token(epoch=self.token[0], incarnation=self.token[1]))

    # writes that wait

    def park(self, connection: Exchange, frame: Frame) -> None:
        """This write waits for the intent bits of its regions."""
        self.gate.park((connection, frame), frame[3], frame[4])
        self._parked_bytes += len(frame[5])
        self.wake_maps.set()

    def admit(self, items: list[Item]) -> None:
        """The intent bits of these writes are durable, the flushes among them are behind those."""
        self._ready += items
        self._feed()
        self.stir()

    def direct_progress(self) -> None:
        """Some requests are done, so there is room for others."""
        if self._ready:
            self._feed()
        self.stir()

    def _feed(self) -> None:
        """Begin what has waited for its intent bits, as far as there is room."""
        direct, fd = self.direct, self.store.direct
        touched: dict[Exchange, None] = {}
        while self._ready and not self.failed:
            connection, frame = self._ready[0]
            kind, _, seq, offset, _, payload = frame
            # the owner may have changed meanwhile
            if connection is not self.owner:
                pass
            elif kind == FLUSH:
                self._flush_behind(connection, frame)
            elif direct is None or fd < 0 or (kind == WRITE and self.store.cache is not None):
                connection.apply(frame)
                touched[connection] = None
            elif kind == WRITE:
                if not direct.write(connection, fd, seq, offset, payload):
                    break
            elif not direct.unmap(connection, frame):
                break
            self._ready.popleft()
            self._parked_bytes -= len(payload)
        if direct is not None:
            direct.ring.submit()
        for connection in touched:
            connection.send()

    # flushes

    def flush(self, connection: Exchange, frame: Frame) -> None:
        """Answer once an fdatasync that starts after everything received before was applied is done."""
        with self.guard:
            self.confirmations.confirmed(self.store.maps.regions.now)
        if self.gate.barrier((connection, frame)):
            return
        if self._ready:
            self._ready.append((connection, frame))
        else:
            self._flush_behind(connection, frame)

    def _flush_behind(self, connection: Exchange, frame: Frame) -> None:
        if self.direct is None or not self.direct.barrier((connection, frame)):
            self.flush_head([(connection, frame)])

    def flush_head(self, waiting: list[Item]) -> None:
        """All writes before these flushes were applied."""
        self._flushes += waiting
        if self.failed:
            self.fail_parked(self.failed)
        elif not self._in_batch:
            self._begin_sync(False)

    def _alone(self) -> bool:
        """An engine has asked for a flush ahead: it waits for that, and has nothing else under way."""
        return len(self._flushes) == 1 and bool(self._flushes[0][1][4]) and not self._syncing and not self.busy()

    def _begin_sync(self, may_block: bool) -> None:
        if not self._syncing and self._flushes and not self.failed:
            self._syncing, self._flushes = self._flushes, []
            self.syncer.start(may_block=may_block)

    def synced(self) -> None:
        """The syncer's eventfd is readable."""
        self._finish_sync(False)

    def _finish_sync(self, worth_waiting: bool) -> None:
        try:
            if not self.syncer.finished(worth_waiting=worth_waiting):
                return
        except OSError as error:
            self._flushes, self._syncing = self._syncing + self._flushes, []
            self.fail_parked(f"fdatasync failed: {error}")
            return
        waiting, self._syncing = self._syncing, []
        touched: dict[Exchange, None] = {}
        for connection, frame in waiting:
            self.counters.flushes += 1
            if connection is self.owner:
                connection.reply(frame[0], 0, frame[2])
                touched[connection] = None
        for connection in touched:
            connection.send(now=True)
        self._begin_sync(False)
        self.stir()

    # the end

    def fail_parked(self, reason: str) -> None:
        """Fail for good, and refuse all that waits."""
        self.fail(reason)
        waiting, self._flushes = [*self.discard(), *self._flushes], []
        for connection, frame in waiting:
            connection.reply(frame[0], Status.IO_ERROR, frame[2], payload=reason.encode())
            connection.send(now=True)

    def discard(self) -> list[Item]:
        """Forget everything that waits for a write or for intent bits, and return it."""
        dropped = [*self._ready, *self.gate.discard()]
        self._ready.clear()
        self._parked_bytes -= sum([len(frame[5]) for _, frame in dropped])
        return dropped if self.direct is None else [*self.direct.discard(), *dropped]
