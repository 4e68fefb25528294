"""Frames to and from one replica's socket: queued, and sent and received many at a time."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Any

import trio

from engine.wire.frame import Frame, FrameReader

_IOV = 512


class Stream:
    """`bit` is the replica's place in the core's masks.

    The owner sets `odd`, which gets the answers that are about no request of the core's, and `broken`.
    """

    def __init__(self, bit: int, sock: socket.socket, reader: FrameReader) -> None:
        self.bit = bit
        self.sock = sock
        self.reader = reader
        self.closed = False
        # the socket is full
        self.blocked = trio.Event()
        self.odd: Callable[[Frame], None] = _unexpected
        self.broken: Callable[[Exception], None] = _unexpected
        self._queue: deque[Any] = deque()

    def queue(self, piece: Any) -> None:
        """bytes, or a view of what nobody changes."""
        self._queue.append(piece)

    def pump(self) -> None:
        """Send what is queued as far as the socket takes it. Raises OSError."""
        queue = self._queue
        if len(queue) == 1:
            try:
                sent: int = self.sock.send(queue[0])
            except BlockingIOError:
                self.blocked.set()
                return
            if sent == len(queue[0]):
                queue.clear()
                return
            queue[0] = memoryview(queue[0])[sent:]
        while queue:
            pieces = list(islice(queue, _IOV))
            try:
                sent = self.sock.sendmsg(pieces)
            except BlockingIOError:
                self.blocked.set()
                return
            for piece in pieces:
                if sent < len(piece):
                    if sent:
                        queue[0] = memoryview(piece)[sent:]
                    break
                sent -= len(piece)
                queue.popleft()

    def receive(self) -> list[Frame] | None:
        """Whole frames of what has arrived; None when the peer has closed. Raises OSError, ProtocolError."""
        try:
            count = self.sock.recv_into(self.reader.space())
        except BlockingIOError:
            return []
        if not count:
            return None
        self.reader.received(count)
        return self.reader.frames()


def _unexpected(_: Any) -> None:
    raise AssertionError("nobody has taken this stream over")
