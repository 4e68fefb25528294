"""A command of the product that runs until it is stopped: its events as they come, its signals, its end."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

Start = Callable[[list[str], Any], subprocess.Popen[bytes]]


class ProgramFailedError(AssertionError):
    """It did not do what it was asked, with what it said."""


class Program:
    """`start` runs an argument vector with a file for stderr, and stdout as a pipe. Each run has events of its own."""

    def __init__(self, name: str, argv: list[str], errors: Path, start: Start) -> None:
        self.name = name
        self.argv = argv
        self.events: list[dict[str, Any]] = []
        self._errors = errors
        self._start = start
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._news = threading.Condition()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self, *more: str) -> Program:
        assert not self.running
        self.events = []
        with self._errors.open("ab") as errors:
            self._process = self._start([*self.argv, *more], errors)
        self._reader = threading.Thread(target=self._read, args=(self._process, self.events), daemon=True)
        self._reader.start()
        return self

    def wait_event(self, name: str, budget: float = 60.0, after: float = 0.0) -> dict[str, Any]:
        """The first event of that name, from the time `after` on. Raises ProgramFailedError."""
        end = time.monotonic() + budget
        with self._news:
            while True:
                for event in self.events:
                    if event.get("event") == name and event["time"] >= after:
                        return event
                assert self._reader is not None
                if not self._reader.is_alive() or not self._news.wait(max(0.0, end - time.monotonic())):
                    raise ProgramFailedError(f"{self.name}: no event {name!r}\n{self.said()}")

    def stop(self, budget: float = 60.0) -> int:
        """Ask it to leave; its exit status. Raises ProgramFailedError."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        return self.wait_end(budget)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait(30)

    def wait_end(self, budget: float = 60.0) -> int:
        assert self._process is not None
        try:
            return self._process.wait(budget)
        except subprocess.TimeoutExpired:
            raise ProgramFailedError(f"{self.name}: does not end\n{self.said()}") from None

    def said(self) -> str:
        events = "\n".join(msgspec.json.encode(event).decode() for event in self.events[-60:])
        errors = self._errors.read_text(errors="replace")[-3000:] if self._errors.exists() else ""
        return f"events:\n{events}\nstderr:\n{errors}{self._where()}"

    def _where(self) -> str:
        """What its threads wait for, while it runs."""
        if not self.running:
            return ""
        shown = ""
        with contextlib.suppress(OSError):
            shown = Path(f"/proc/{self.pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:80]
            for task in Path(f"/proc/{self.pid}/task").iterdir():
                shown += f"\n{task.name}: {(task / 'wchan').read_text()} {(task / 'syscall').read_text().strip()}"
        return f"\nrunning: {shown}"

    def _read(self, process: subprocess.Popen[bytes], events: list[dict[str, Any]]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                with self._news:
                    with contextlib.suppress(msgspec.DecodeError):
                        events.append(msgspec.json.decode(line))
                    self._news.notify_all()
        with self._news:
            self._news.notify_all()
