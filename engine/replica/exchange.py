"""A connection's frames in and answers out, batch by batch, for as long as nothing has to be awaited."""

from __future__ import annotations

import select
import socket
import time
from typing import TYPE_CHECKING, Final

import trio
from mypy_extensions import mypyc_attr

from engine.errors import ProtocolError
from engine.readiness import LINGER
from engine.replica.executor import CONTROL, MAX_UNSENT, Executor
from engine.wire.frame import HEADER_SIZE, MAX_PAYLOAD, Frame, FrameReader

if TYPE_CHECKING:
    from engine.replica.backlog import Backlog

# why `go_on` has returned
QUIET: Final = 0  # nothing came any more: wait until the socket is readable
FULL: Final = 1  # wait until there is room
REQUEST: Final = 2  # `next_frame` is a request with work of its own


class ConnectionEndError(Exception):
    """The peer closed."""


@mypyc_attr(allow_interpreted_subclasses=True)
class Exchange(Executor):
    """The half of a `Connection` that never awaits."""

    def __init__(self, server: Backlog, sock: socket.socket, peer: str) -> None:
        super().__init__(server, sock, peer)
        self.reader = FrameReader(HEADER_SIZE + MAX_PAYLOAD)
        # answers can be sent
        self.open = False
        # set when everything queued is with the kernel; until then a task of the connection's sends
        self.draining: trio.Event | None = None
        self.give_way = 0.0
        self._poll: select.poll | None = None
        self.received: list[Frame] = []
        self._at = 0

    def drain(self) -> None:
        """Send what is queued as the kernel takes it, then set `draining` and make it None."""
        raise NotImplementedError

    def take(self, frames: list[Frame]) -> None:
        """What `go_on` begins with."""
        self.received, self._at = frames, 0

    def next_frame(self) -> Frame:
        """The request that stopped `go_on`, which goes on behind it."""
        self._at += 1
        return self.received[self._at - 1]

    @property
    def last(self) -> bool:
        """Nothing was received behind the last frame."""
        return self._at == len(self.received) and not self.reader.partial

    def go_on(self) -> int:
        """Execute what was taken, receive more, and so on; returns why not. Raises as `receive`."""
        server = self.server
        while True:
            frames = self.received
            count = len(frames)
            while self._at < count:
                server.begin_batch()
                try:
                    self._at = self.execute(frames, self._at)
                finally:
                    server.submit()
                if self._at < count and frames[self._at][0] in CONTROL and self._unsent <= MAX_UNSENT:
                    return REQUEST
                self.send()
                if self._unsent > MAX_UNSENT or server.crowded():
                    return FULL
            self.send()
            if not self._linger():
                return QUIET
            self.receive()

    def receive(self) -> None:
        """Take what has arrived, perhaps nothing. Raises ConnectionEndError, ProtocolError, OSError."""
        reader = self.reader
        self.received, self._at = [], 0
        try:
            count = self._sock.recv_into(reader.space())
        except BlockingIOError:
            return
        if not count:
            if reader.partial:
                raise ProtocolError("the connection ended within a frame")
            raise ConnectionEndError
        reader.received(count)
        self.received = reader.frames()

    def _linger(self) -> bool:
        """Wait a moment for the owner's next frames, past the event loop (see Readiness); whether there are any."""
        server = self.server
        if server.owner is not self:
            return False
        completions = server.completions
        if self._poll is None:
            self._poll = select.poll()
            for fd in (self._sock.fileno(), *completions):
                self._poll.register(fd, select.POLLIN)
        while time.monotonic() < self.give_way and not server.busy():
            events = self._poll.poll(LINGER * 1000)
            if not events:
                return False
            readable = False
            for fd, _ in events:
                completed = completions.get(fd)
                if completed is not None:
                    completed()
                else:
                    readable = True
            if readable:
                return True
        return False

    def send(self, *, now: bool = False) -> None:
        """Send what is queued, as far as the kernel takes it now; the rest follows by itself.

        Without `now` it may wait for the answer of a flush that was asked for ahead.
        """
        if now:
            self._together = False
        if not self._out or self._together or self.draining is not None or not self.open:
            return
        if not self.send_some():
            self.draining = trio.Event()
            self.drain()
