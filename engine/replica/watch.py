"""Answers that must not wait for a disk: PING and CONFIRM, on a connection and a thread of their own.

An engine that opened the replica comes with a second connection and WATCH. While it has that, the event loop may wait
for an fdatasync itself, which saves the way to a worker of the kernel and back, several times as long as the rest of an
answer: whether the process lives, and whether its engine has been replaced, is told here meanwhile.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

import structlog

from engine.errors import ProtocolError
from engine.wire.frame import REPLY, FrameReader, FrameType, encode_frame

log = structlog.get_logger()

# the status of a CONFIRM, and the payload of its answer
Confirm = Callable[[], tuple[int, bytes]]


class Watch:
    def __init__(self, sock: socket.socket, peer: str, confirm: Confirm) -> None:
        """`sock` is taken over: who wants this to end shuts down a duplicate of it. `confirm` runs in the thread."""
        self._sock = sock
        self._peer = peer
        self._confirm = confirm

    def run(self) -> None:
        """Blocks until the connection ends."""
        with self._sock as sock:
            try:
                sock.setblocking(True)
                self._serve(sock)
            except ProtocolError as error:
                log.warning("watch ended", peer=self._peer, reason=str(error))
            except OSError as error:
                log.info("watch ended", peer=self._peer, reason=error.strerror)

    def _serve(self, sock: socket.socket) -> None:
        reader = FrameReader()
        while count := sock.recv_into(reader.space()):
            reader.received(count)
            for kind, _, seq, _, _, _ in reader.frames():
                if kind == FrameType.PING:
                    status, payload = 0, b""
                elif kind == FrameType.CONFIRM:
                    status, payload = self._confirm()
                else:
                    raise ProtocolError(f"frame type {kind:#x} on a watch")
                sock.sendall(encode_frame(kind | REPLY, seq, payload, status=status))
