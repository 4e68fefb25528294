"""A guest: a real Linux kernel with its own NFS client, as a process (User Mode Linux)."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar, cast

from tests.lab import leftovers
from tests.lab.network import SUBNET, Lab

P = ParamSpec("P")
T = TypeVar("T")

CHECKOUT = Path(__file__).resolve().parents[2]
AGENT_PORT = 7000
BOOT_BUDGET = 60.0

_numbers = itertools.count(11)


def ptrace_library(directory: Path) -> Path:
    """Made there once: what lets User Mode Linux run on processors with more state than it knows (see xstate.c)."""
    library = directory / "xstate.so"
    if not library.exists():
        source = Path(__file__).with_name("xstate.c")
        subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", library, source], check=True, timeout=60)
    return library


class GuestError(Exception):
    """Something that was asked of a guest failed there. `errno` is the guest's, if there was one."""

    def __init__(self, guest: str, what: str, detail: str, errno: int | None = None) -> None:
        super().__init__(guest, what, detail, errno)
        self.guest = guest
        self.what = what
        self.detail = detail
        self.errno = errno

    def __str__(self) -> str:
        return f"{self.guest}: {self.what}: {self.detail}"


class Job(Generic[T]):
    """Something that runs in a guest. Closing it does not end it; `stop` asks it to, `kill` makes it."""

    def __init__(self, guest: Guest, what: str, connection: socket.socket) -> None:
        self.what = what
        self.events: list[dict[str, Any]] = []
        self._guest = guest
        self._connection = connection
        self._buffer = b""
        self._outcome: dict[str, Any] | None = None
        self.pid: int = self._receive(time.monotonic() + 30)["pid"]

    def wait_event(self, name: str, timeout: float = 30.0, after: float = 0.0) -> dict[str, Any]:
        """The first event of that name, waiting for it. Raises GuestError when the job ends without it.

        With `after`, the first that says that it happened after that time.
        """
        end = time.monotonic() + timeout
        seen = 0
        while True:
            for event in self.events[seen:]:
                if event["event"] == name and event.get("time", 0.0) >= after:
                    return event
            seen = len(self.events)
            if self._outcome is not None:
                self.result()
                raise GuestError(self._guest.name, self.what, f"ended without the event {name!r}")
            self._advance(end)

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.sendall(b"stop\n")

    def result(self, timeout: float = 120.0) -> T:
        """What it returned, waiting for it. Raises GuestError."""
        end = time.monotonic() + timeout
        while self._outcome is None:
            self._advance(end)
        self.close()
        if "error" in self._outcome:
            error = self._outcome["error"]
            detail = f"{error['type']}: {error['message']}\n{error['traceback']}"
            raise GuestError(self._guest.name, self.what, detail, error["errno"])
        return cast(T, self._outcome["result"])

    def finish(self, timeout: float = 120.0) -> T:
        """Ask it to stop, then its result."""
        self.stop()
        return self.result(timeout)

    @property
    def done(self) -> bool:
        """Whether its outcome is known, without waiting."""
        with contextlib.suppress(TimeoutError):
            while self._outcome is None:
                self._advance(time.monotonic())
        return self._outcome is not None

    def kill(self) -> None:
        """SIGKILL it and its children, in the guest."""
        if self._outcome is None:
            with contextlib.suppress(GuestError):
                self._guest.kill_group(self.pid)
        self.close()

    def close(self) -> None:
        self._connection.close()
        self._guest.jobs.discard(self)

    def _advance(self, end: float) -> None:
        message = self._receive(end)
        if "event" in message:
            self.events.append(message["event"])
        else:
            self._outcome = message

    def _receive(self, end: float) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            self._connection.settimeout(max(0.001, end - time.monotonic()))
            try:
                data = self._connection.recv(65536)
            except TimeoutError:
                raise TimeoutError(f"{self._guest.name}: {self.what}: no answer in time") from None
            if not data:
                detail = f"its process was killed{self._guest.autopsy()}"
                raise GuestError(self._guest.name, self.what, detail)
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return cast(dict[str, Any], json.loads(line))


class Guest:
    """One client machine of a lab.

    Its root filesystem is this machine's, read-only, under an overlay in its memory; what it writes is gone with it.
    Functions of `tests.lab.workloads` run in it with `call` (wait for the result) and `spawn` (do not). `disks` are
    image files, which it has as /dev/ubda and so on, without partitions.
    """

    def __init__(self, lab: Lab, name: str, memory: str = "256M", disks: Sequence[Path] = ()) -> None:
        self.lab = lab
        self.name = name
        self.number = next(_numbers)
        self.address = f"{SUBNET}.{self.number}"
        self.memory = memory
        self.disks = tuple(disks)
        self.directory = lab.directory / f"guest-{name}"
        self.jobs: set[Job[Any]] = set()
        self.mounts: set[str] = set()
        self._process: subprocess.Popen[bytes] | None = None
        self._tap: str | None = None

    def start(self, budget: float = BOOT_BUDGET) -> Guest:
        """Boot; return when its agent answers. Raises GuestError after `budget` seconds."""
        self.boot()
        self.wait_up(budget)
        return self

    @property
    def hostname(self) -> str:
        """Its NFS client id contains that: unique among everything that may ever meet on one server."""
        return f"{self.name}-{os.getpid()}-{self.number}"

    @property
    def link(self) -> str:
        """Its end of the lab's network. It has one from its first boot on."""
        assert self._tap is not None
        return self._tap

    def boot(self) -> None:
        """Begin to boot, without waiting."""
        self.directory.mkdir(exist_ok=True)
        self._tap = self._tap or self.lab.tap()
        argv = [
            *("setpriv", "--pdeathsig", "KILL", "linux.uml", f"mem={self.memory}"),
            *("rootfstype=hostfs", "rootflags=/", "ro", "quiet", "con=null", "con0=null,fd:1", "ssl=null"),
            f"vec0:transport=tap,ifname={self._tap},depth=64,gro=1,mac=52:54:00:00:00:{self.number:02x}",
            f"init={Path(__file__).with_name('init.sh')}",
            *(f"ubd{chr(ord('a') + i)}={disk}" for i, disk in enumerate(self.disks)),
            f"uml_dir={self.directory}",
            f"umid={self.name}",
            f"lab_address={self.address}/24",
            f"lab_hostname={self.hostname}",
            f"lab_checkout={CHECKOUT}",
            f"lab_port={AGENT_PORT}",
        ]
        environment = {
            "TMPDIR": "/dev/shm",
            "LD_PRELOAD": str(ptrace_library(self.lab.directory)),
            leftovers.TOKEN: str(self.directory),
        }
        with (self.directory / "console.log").open("ab") as console:
            self._process = self.lab.popen(argv, stdout=console, stderr=console, env=environment)

    def wait_up(self, budget: float = BOOT_BUDGET) -> None:
        end = time.monotonic() + budget
        while True:
            try:
                self.lab.connect(self.address, AGENT_PORT, 1.0).close()
                return
            except OSError as error:
                if self._process is None or self._process.poll() is not None or time.monotonic() > end:
                    raise GuestError(self.name, "boot", f"{error}\n{self.console()[-2000:]}") from None
            time.sleep(0.05)

    def console(self) -> str:
        return (self.directory / "console.log").read_text(errors="replace")

    def autopsy(self) -> str:
        """What is to be said of a guest that has ended by itself; nothing when it runs."""
        if self._process is None:
            return "; it is switched off"
        with contextlib.suppress(subprocess.TimeoutExpired):
            return f"; the guest ended with status {self._process.wait(2)}\n{self.console()[-4000:]}"
        return ""

    def spawn(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Job[T]:
        """Run a function of a workload in the guest, by keyword arguments that JSON can carry."""
        assert not args, "workloads take keyword arguments"
        request = {"op": "call", "module": function.__module__, "function": function.__name__, "arguments": kwargs}
        return self._submit(function.__name__, request)

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return self.spawn(function, *args, **kwargs).result()

    def run(self, *argv: str, timeout: float = 60.0, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a program in the guest."""
        job: Job[dict[str, Any]] = self._submit(" ".join(argv), {"op": "run", "argv": argv, "timeout": timeout})
        answer = job.result(timeout + 10)
        if check and answer["status"] != 0:
            detail = f"status {answer['status']}: {answer['stdout']}{answer['stderr']}".rstrip()
            raise GuestError(self.name, job.what, detail)
        return subprocess.CompletedProcess(argv, answer["status"], answer["stdout"], answer["stderr"])

    def kill_group(self, pid: int) -> None:
        self._submit(f"kill {pid}", {"op": "kill", "group": pid}).result()

    def kernel_log(self) -> str:
        """What the guest's kernel said since the last call."""
        return self.run("dmesg", "--read-clear").stdout

    def last_words(self) -> str:
        """Its clock and all that its kernel has said since `kernel_log` was last called, or why that cannot be had."""
        try:
            return self.run("sh", "-c", "cat /proc/uptime && dmesg", timeout=10).stdout
        except (GuestError, OSError) as error:
            return str(error)

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def pause(self) -> None:
        """Stop the machine. The main process only: its stopped helpers would crash it."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)

    def power_cut(self) -> None:
        if self._process is not None:
            # the group: helper processes would keep the tap
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(30)
            self._process = None
            end = time.monotonic() + 10
            while leftovers.processes(self.directory) and time.monotonic() < end:
                time.sleep(0.02)
        self.mounts.clear()
        for job in list(self.jobs):
            job.close()

    close = power_cut

    def _submit(self, what: str, request: dict[str, Any]) -> Job[Any]:
        try:
            connection = self.lab.connect(self.address, AGENT_PORT, 20.0)
        except OSError as error:
            raise GuestError(self.name, what, f"the guest does not answer: {error}{self.autopsy()}") from None
        try:
            connection.sendall(json.dumps(request).encode() + b"\n")
            job: Job[Any] = Job(self, what, connection)
        except BaseException:
            connection.close()
            raise
        self.jobs.add(job)
        return job
