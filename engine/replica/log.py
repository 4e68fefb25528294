"""JSON lines to a supervisor that may be dead or asleep: logging never raises, and never blocks the event loop."""

from __future__ import annotations

import contextlib
import os
import select

import structlog

from engine import logs


class Pipe:
    """Lines to a descriptor; one that would block, or has no reader any more, is dropped."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)

    def msg(self, line: str) -> None:
        # a pipe that polls writable takes PIPE_BUF bytes at once (pipe(7))
        with contextlib.suppress(OSError):
            if self._poll.poll(0):
                os.write(self._fd, line.encode()[: select.PIPE_BUF - 1] + b"\n")

    log = debug = info = warning = error = critical = exception = msg


def configure_logging() -> None:
    logs.configure()
    structlog.configure(logger_factory=lambda *args: Pipe(2))
