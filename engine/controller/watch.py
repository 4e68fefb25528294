"""A second connection to a replica, for PING and CONFIRM, so that its disk may keep the first one waiting."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import structlog
import trio

from engine.address import Address
from engine.controller.connection import CALL, ReplicaConnection
from engine.errors import EngineError, ProtocolError
from engine.wire import messages
from engine.wire.frame import REPLY, Frame, FrameType, Status

log = structlog.get_logger()

SET_UP_SECONDS = 5.0
PAUSE_SECONDS = 5.0

Pong = Callable[[ReplicaConnection, int], None]


async def keep_watch(connection: ReplicaConnection, address: Address, key: bytes, pong: Pong) -> None:
    """Until `connection` is closed. Without a watch it carries everything itself."""
    while not connection.closed:
        own: ReplicaConnection | None = None
        try:
            with trio.fail_after(SET_UP_SECONDS):
                own = await ReplicaConnection.connect(connection.name, connection.bit, address, key)
                own.token = connection.token
                body = messages.Token(epoch=own.token[0], incarnation=own.token[1])
                await own.exchange(FrameType.WATCH, messages.encode(body))
            if own.instance == connection.instance and not connection.closed:
                await Watch(connection, own, pong).run()
        except (OSError, EngineError, trio.TooSlowError) as error:
            log.debug("no watch", replica=connection.name, reason=str(error))
        finally:
            if own is not None:
                own.close()
        if not connection.closed:
            await trio.sleep(PAUSE_SECONDS)


class Watch:
    def __init__(self, connection: ReplicaConnection, own: ReplicaConnection, pong: Pong) -> None:
        self._connection = connection
        self._own = own
        self._pong = pong
        self._pings: dict[int, bytes] = {}

    async def run(self) -> None:
        """Be the watch of the connection until one of the two ends. Raises OSError, EngineError."""
        self._connection.watch = self
        try:
            while True:
                try:
                    await trio.lowlevel.wait_readable(self._own.sock)
                except trio.ClosedResourceError:
                    return
                for frame in self._own.receive():
                    self._take(frame)
        finally:
            self._connection.watch = None
            self._give_back()

    def _take(self, frame: Frame) -> None:
        kind, status, seq, _, _, _ = frame
        if seq & CALL:
            self._own.deliver(frame)
        elif kind == FrameType.PING | REPLY and status == Status.OK:
            self._pings.pop(seq, None)
            self._pong(self._connection, seq)
        else:
            raise ProtocolError(f"replica {self._own.name} sent a frame of type {kind:#x} on its watch")

    def ping(self, seq: int, header: bytes) -> bool:
        """False: it has to go the other way."""
        self._own.queue(header)
        try:
            self._own.pump()
        except OSError:
            self.close()
            return False
        self._pings[seq] = header
        return True

    async def confirm(self) -> None:
        """Raises FencedError, ReplicaRefusedError, ReplicaUnreachableError: it is no watch any more."""
        await self._own.call(FrameType.CONFIRM)

    def close(self) -> None:
        self._own.close()

    def _give_back(self) -> None:
        """Who was not heard here is asked again: it is not to be lost for the watch's end."""
        if self._connection.closed:
            return
        for header in self._pings.values():
            self._connection.queue(header)
        with contextlib.suppress(OSError):  # whoever sends next finds out
            self._connection.pump()
