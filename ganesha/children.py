"""The programs that make up a server, as children of this process."""

import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import trio

from ganesha.errors import MissingProgramError, StartError, StopError
from ganesha.logs import LogTail

KILL_TIMEOUT = 10.0
_BUS_START = 10.0
_BUS_STOP = 2.0


@asynccontextmanager
async def run_bus(run_dir: Path) -> AsyncIterator[trio.Process]:
    """The message bus of `bus.conf`, listening when entered. Raises StartError."""
    log = run_dir / "bus.log"
    command = [find_program("dbus-daemon", "dbus-daemon"), "--nofork", "--nopidfile", "--print-address=1"]
    command += [f"--config-file={run_dir / 'bus.conf'}"]
    process = await spawn(command, log, {}, (), stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        address = bytearray()
        with trio.move_on_after(_BUS_START):
            while not address.endswith(b"\n") and (data := await process.stdout.receive_some()):
                address += data
        await process.stdout.aclose()
        if not address.endswith(b"\n"):
            lines = [event.message for event in LogTail(log).read()]
            raise StartError(f"its message bus failed: {lines[-1] if lines else 'no answer'}", log=log)
        yield process
    finally:
        with trio.CancelScope(shield=True):
            await end(process, _BUS_STOP)


class Tied:
    """A process that the kernel kills when this one ends, however it does (prctl(2), PR_SET_PDEATHSIG)."""

    def __init__(self, command: Sequence[str], **options: Any) -> None:
        """Raises OSError, MissingProgramError."""
        # the kernel takes the end of the thread that started it for ours: so that is not to be one of trio's
        tie = [find_program("setpriv", "util-linux"), "--pdeathsig", "KILL", "--"]
        self._popen = subprocess.Popen([*tie, *command], **options)

    @property
    def pid(self) -> int:
        return self._popen.pid

    def poll(self) -> int | None:
        return self._popen.poll()

    async def wait(self) -> int:
        if self.poll() is None:
            # not reaped yet, so it is this process
            fd = os.pidfd_open(self.pid)
            try:
                await trio.lowlevel.wait_readable(fd)
            finally:
                os.close(fd)
        return self._popen.wait()

    def send_signal(self, number: signal.Signals) -> None:
        self._popen.send_signal(number)

    def terminate(self) -> None:
        self._popen.terminate()

    def kill(self) -> None:
        self._popen.kill()


Process = trio.Process | Tied


async def spawn(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    keep_fds: Sequence[int],
    **options: Any,
) -> trio.Process:
    """A child whose output is appended to `log`, with `keep_fds` under the same numbers. Raises StartError.

    It has a session of its own: a terminal's Ctrl-C must not reach it, and it must survive this process.
    """
    with _options(command, log, environment, keep_fds) as usual:
        return await trio.lowlevel.open_process(list(command), **{**usual, **options})


def spawn_tied(command: Sequence[str], log: Path, environment: Mapping[str, str], keep_fds: Sequence[int]) -> Tied:
    """The same for one that must not survive this process. Blocks until it runs. Raises StartError,
    MissingProgramError."""
    with _options(command, log, environment, keep_fds) as usual:
        return Tied(command, **usual)


@contextmanager
def _options(
    command: Sequence[str], log: Path, environment: Mapping[str, str], keep_fds: Sequence[int]
) -> Iterator[dict[str, Any]]:
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield {
            "stdin": subprocess.DEVNULL,
            "stdout": output,
            "stderr": output,
            "env": {**os.environ, **environment},
            "cwd": "/",
            "start_new_session": True,
            "pass_fds": tuple(keep_fds),
        }
    except OSError as error:
        raise StartError(f"cannot run {command[0]}: {error.strerror}") from error
    finally:
        os.close(output)


async def end(process: Process, timeout: float) -> None:
    """SIGTERM, SIGKILL after `timeout` seconds, and StopError when it is still there after KILL_TIMEOUT more."""
    if process.poll() is not None:
        return
    process.terminate()
    with trio.move_on_after(timeout):
        await process.wait()
        return
    process.send_signal(signal.SIGKILL)
    with trio.move_on_after(KILL_TIMEOUT):
        await process.wait()
        return
    raise StopError(process.pid, KILL_TIMEOUT)


def find_program(name: str, package: str) -> str:
    """The path of a program, in PATH or the usual directories. Raises MissingProgramError."""
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin")
    if path is None:
        raise MissingProgramError(name, package)
    return path
