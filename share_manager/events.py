"""What a running command tells: each step as it happens, as a line for a person or as a JSON object a line."""

from __future__ import annotations

import contextlib
import select
import sys
import time
from typing import IO, Any, Literal, Protocol

import msgspec
from rich.console import Console
from rich.text import Text

Level = Literal["info", "warning", "error"]
_PATIENCE_MS = 1000


class Sink(Protocol):
    def emit(self, event: str, message: str, level: Level, fields: dict[str, Any]) -> None: ...


class Reporter:
    """`emit` one event: `event` and `fields` are stable names for programs, `message` is for people."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def emit(self, event: str, message: str, *, level: Level = "info", **fields: Any) -> None:
        self._sink.emit(event, message, level, fields)

    def warn(self, event: str, message: str, **fields: Any) -> None:
        self._sink.emit(event, message, "warning", fields)


class JsonSink:
    """`{"event": ..., "time": seconds since 1970, "level": ..., "message": ..., ...}`"""

    def __init__(self, out: IO[str] | None = None) -> None:
        self._out = out or sys.stdout

    def emit(self, event: str, message: str, level: Level, fields: dict[str, Any]) -> None:
        line = {"event": event, "time": round(time.time(), 3), "level": level, "message": message, **fields}
        _write(self._out, msgspec.json.encode(line).decode())


class LineSink:
    """Plain lines with the time of day, for logs and pipes."""

    def __init__(self, out: IO[str] | None = None) -> None:
        self._out = out or sys.stdout

    def emit(self, event: str, message: str, level: Level, fields: dict[str, Any]) -> None:
        mark = "" if level == "info" else f"{level}: "
        _write(self._out, f"{time.strftime('%H:%M:%S')} {mark}{message}")


class ConsoleSink:
    """For a terminal; prints above a live view that uses the same console."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def emit(self, event: str, message: str, level: Level, fields: dict[str, Any]) -> None:
        style = {"info": "", "warning": "yellow", "error": "bold red"}[level]
        line = Text.assemble(
            (time.strftime("%H:%M:%S "), "dim"), (message, "bold green" if event == "ready" else style)
        )
        # the terminal may be gone
        with contextlib.suppress(OSError):
            self._console.print(line, soft_wrap=True)


class ListSink:
    """Keeps what it is told; for tests."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def emit(self, event: str, message: str, level: Level, fields: dict[str, Any]) -> None:
        self.events.append({"event": event, "level": level, "message": message, **fields})


def _write(out: IO[str], line: str) -> None:
    """A reader that went away, or that reads no more, must neither take the share down nor hold it up."""
    try:
        descriptor = out.fileno()
    except (OSError, ValueError, AttributeError):
        descriptor = -1
    try:
        if descriptor >= 0:
            poll = select.poll()
            poll.register(descriptor, select.POLLOUT)
            # a pipe is ready when a whole line of up to PIPE_BUF (4096) bytes fits
            if not poll.poll(_PATIENCE_MS):
                return
        out.write(line + "\n")
        out.flush()
    except (OSError, ValueError):
        pass
