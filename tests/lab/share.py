"""A volume served by the product, as a user runs it: the command line, its events, its status, its signals."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from tests.lab import leftovers
from tests.lab.mounts import Export
from tests.lab.network import Lab

PROGRAM = Path(sys.executable).with_name("share-manager")


class Process(msgspec.Struct):
    pid: int | None = None


class Engine(msgspec.Struct):
    pid: int | None = None
    block_file: str = ""
    frontend: str = ""


class Replica(msgspec.Struct):
    name: str
    address: str
    state: str
    directory: str
    pid: int | None = None
    reason: str = ""


class Status(msgspec.Struct):
    """What `share-manager status --output json` promises, no more."""

    volume: str
    state: str
    endpoint: str | None
    epoch: int
    size_bytes: int
    in_grace: bool | None
    clients: list[dict[str, Any]]
    share_manager: Process | None
    engine: Engine
    device: str | None
    mountpoint: str | None
    ganesha: Process
    replicas: list[Replica]

    def pids(self) -> dict[str, int]:
        """By name: share-manager, engine, ganesha and the replicas."""
        found = {
            "share-manager": self.share_manager.pid if self.share_manager else None,
            "engine": self.engine.pid,
            "ganesha": self.ganesha.pid,
            **{replica.name: replica.pid for replica in self.replicas},
        }
        return {name: pid for name, pid in found.items() if pid is not None}

    def replica(self, name: str) -> Replica:
        return next(replica for replica in self.replicas if replica.name == name)

    @property
    def settled(self) -> bool:
        """Serving, with every replica in sync and no grace period."""
        in_sync = all(replica.state == "in_sync" for replica in self.replicas)
        return self.state == "running" and in_sync and self.in_grace is False


class ShareFailedError(AssertionError):
    """The product did not do what it was asked, with what it said."""


class Share:
    """One volume, served inside a lab's namespace. `close` leaves nothing of it, and says what it had to remove."""

    def __init__(
        self,
        lab: Lab,
        name: str,
        *,
        size: str = "256Mi",
        port: int = 2049,
        options: Sequence[str] = (),
        data_dir: Path | None = None,
    ) -> None:
        self.lab = lab
        self.volume = f"{name}{lab.mark}"
        self.port = port
        self.export = Export(lab.server, port, f"/{self.volume}")
        self.size = size
        self.options = tuple(options)
        self.place = lab.directory / f"share-{name}"
        self.data_dir = data_dir or self.place / "data"
        self.events: list[dict[str, Any]] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._news = threading.Condition()
        self._runs = 0
        self._devices: set[str] = set()

    def argv(self) -> list[str]:
        return [
            *(str(PROGRAM), "serve", self.volume, "--data-dir", str(self.data_dir), "--size", self.size),
            *("--bind", self.lab.server, "--port", str(self.port), "--output", "json", *self.options),
        ]

    def start(self, budget: float = 60.0) -> Share:
        """Serve; return when it says that it is ready. Raises ShareFailedError."""
        self.spawn()
        self.wait_event("ready", budget)
        return self

    def spawn(self) -> None:
        """Begin to serve, without waiting."""
        assert self._process is None
        self._runs += 1
        self.place.mkdir(parents=True, exist_ok=True)
        self.events = []
        with self._errors.open("wb") as errors:
            self._process = self.lab.popen(
                self.argv(),
                stdout=subprocess.PIPE,
                stderr=errors,
                env={leftovers.TOKEN: str(self.place)},
                cwd=Path("/"),
            )
        self._reader = threading.Thread(target=self._read, args=(self._process, self.events), daemon=True)
        self._reader.start()

    def wait_event(self, name: str, budget: float = 60.0, after: int = 0) -> dict[str, Any]:
        """The first event of that name from number `after` on. Raises ShareFailedError."""
        end = time.monotonic() + budget
        with self._news:
            while True:
                for event in self.events[after:]:
                    if event.get("event") == name:
                        return event
                assert self._reader is not None
                if not self._reader.is_alive() or not self._news.wait(max(0.0, end - time.monotonic())):
                    raise ShareFailedError(f"{self.volume}: no event {name!r}\n{self.said()}")

    def wait_end(self, budget: float = 60.0) -> int:
        """Wait until it ends by itself; its exit status."""
        assert self._process is not None
        try:
            code = self._process.wait(budget)
        except subprocess.TimeoutExpired:
            raise ShareFailedError(f"{self.volume}: does not end\n{self.said()}") from None
        self._reap()
        return code

    def comes_up(self, budget: float = 60.0) -> bool:
        """Wait until it is ready or has given up by itself; which of them. Raises ShareFailedError for neither."""
        try:
            self.wait_event("ready", budget)
        except ShareFailedError:
            if self.serving:
                raise
            self.wait_end()
            return False
        return True

    def stop(self, budget: float = 60.0, how: signal.Signals = signal.SIGTERM) -> None:
        """Ask it to leave and see that it does so in order. Raises ShareFailedError."""
        assert self._process is not None
        self._process.send_signal(how)
        code = self.wait_end(budget)
        if code != 0:
            raise ShareFailedError(f"{self.volume}: stopped with status {code}\n{self.said()}")
        if left := self.left():
            raise ShareFailedError(f"{self.volume}: left behind after a stop: {'; '.join(map(str, left))}")

    def status(self) -> Status:
        done = self.command("status", self.volume)
        if done.returncode != 0:
            raise ShareFailedError(f"{self.volume}: status says {done.returncode}: {done.stderr}{done.stdout}")
        answer = msgspec.json.decode(done.stdout)
        return msgspec.convert(answer[0] if isinstance(answer, list) else answer, Status)

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Another command on the same data directory, with JSON output."""
        argv: list[str | Path] = [PROGRAM, *arguments, "--data-dir", self.data_dir, "--output", "json"]
        return self.lab.run(argv, cwd=Path("/"))

    def wait_status(self, what: str, condition: Callable[[Status], bool], budget: float = 60.0) -> Status:
        """Ask for the status until it fits. Raises ShareFailedError."""
        end = time.monotonic() + budget
        while True:
            status = self.status()
            if condition(status):
                return status
            if time.monotonic() > end:
                shown = msgspec.json.encode(status).decode()
                raise ShareFailedError(f"{self.volume}: never {what}\n{shown}\n{self.said()}")
            # each question is a process that takes its share of two cores from the one that is asked
            time.sleep(0.4)

    def wait_settled(self, budget: float = 90.0) -> Status:
        return self.wait_status("settled", lambda status: status.settled, budget)

    def stored(self) -> int:
        """Bytes that the files of all its replicas take up, without asking the product."""
        images = (self.data_dir / "volumes" / self.volume / "replicas").glob("*/*.img")
        return sum(image.stat().st_blocks * 512 for image in images)

    def wait_stored(self, goal: int, budget: float = 60.0) -> None:
        end = time.monotonic() + budget
        while self.stored() < goal:
            if time.monotonic() > end:
                raise ShareFailedError(f"{self.volume}: never {goal} bytes stored\n{self.said()}")
            time.sleep(0.01)

    def signal(self, names: Iterable[str], number: signal.Signals) -> float:
        """Signal components by name, all at once; the time. A killed share manager is waited for."""
        names = list(names)
        pids = self.status().pids()
        now = time.time()
        for name in names:
            os.kill(pids[name], number)
        if number == signal.SIGKILL and "share-manager" in names:
            self.wait_end()
        return now

    @property
    def serving(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def engine(self) -> int:
        """The engine's process id, found without asking the share manager, which may be busy."""
        found = [process for process in leftovers.processes(self.place) if " -m engine " in process.detail]
        if len(found) != 1:
            raise ShareFailedError(f"{self.volume}: {len(found)} engines run\n{self.said()}")
        return int(found[0].name)

    def left(self) -> list[leftovers.Leftover]:
        return [*leftovers.find(self.place, self.volume), *leftovers.lost_loops(self._devices)]

    def said(self) -> str:
        events = "\n".join(msgspec.json.encode(event).decode() for event in self.events[-30:])
        errors = self._errors.read_text(errors="replace")[-6000:] if self._errors.exists() else ""
        return f"events:\n{events}\nstderr:\n{errors}"

    def replica_directories(self) -> list[Path]:
        return [Path(replica.directory) for replica in self.status().replicas]

    def close(self) -> None:
        """Stop it if it serves, by force if need be, and delete its data. Raises ShareFailedError if there was need."""
        problem = ""
        # shown with a test that failed
        print(f"{self.volume}: {self.said()}")
        if self.serving:
            try:
                self.stop()
            except ShareFailedError as error:
                problem = str(error)
        left = self.left()
        if left and not problem:
            problem = f"{self.volume}: left behind: {'; '.join(map(str, left))}"
        leftovers.remove(self.place, self.volume)
        if self._process is not None:
            self._process.wait(20)
            self._reap()
        shutil.rmtree(self.place, ignore_errors=True)
        if problem:
            raise ShareFailedError(problem)

    @property
    def _errors(self) -> Path:
        return self.place / f"stderr-{self._runs}"

    def _reap(self) -> None:
        if self._reader is not None:
            # when it was killed, its children may still hold the other end of the pipe
            self._reader.join(2)
        self._process = None

    def _read(self, process: subprocess.Popen[bytes], events: list[dict[str, Any]]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                with self._news:
                    with contextlib.suppress(msgspec.DecodeError):
                        events.append(msgspec.json.decode(line))
                        self._devices |= {events[-1]["device"]} if events[-1].get("device") else set()
                    self._news.notify_all()
        with self._news:
            self._news.notify_all()
