"""Servers that outlived the process that started them."""

import os
import signal
from pathlib import Path

import msgspec
import trio

from ganesha.children import KILL_TIMEOUT
from ganesha.errors import StopError


class Leftover(msgspec.Struct, frozen=True, kw_only=True):
    """A process of an earlier run in this run directory."""

    pid: int
    program: str


def find_leftovers(run_dir: Path) -> list[Leftover]:
    """The ganesha and message bus that were started with the configuration files of `run_dir`, ganesha first.

    Told by the exact argument, so neither a reused process id nor another volume's server is taken for one. Sees the
    processes of this process id namespace.
    """
    marks = {
        "ganesha.nfsd": os.fsencode(run_dir / "ganesha.conf"),
        "dbus-daemon": b"--config-file=" + os.fsencode(run_dir / "bus.conf"),
    }
    found = []
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        arguments = _arguments(pid)
        program = os.fsdecode(os.path.basename(arguments[0])) if arguments else ""
        if marks.get(program) in arguments[1:]:
            found.append(Leftover(pid=pid, program=program))
    return sorted(found, key=lambda leftover: leftover.program != "ganesha.nfsd")


async def kill_leftovers(run_dir: Path, *, timeout: float = KILL_TIMEOUT) -> list[Leftover]:
    """SIGKILLs what find_leftovers finds, waits until it is gone, and returns it.

    Raises StopError for a process that is still there after `timeout` seconds, because it hangs on I/O.
    """
    killed = []
    for leftover in find_leftovers(run_dir):
        try:
            fd = os.pidfd_open(leftover.pid)
        except ProcessLookupError:
            continue
        try:
            # The id may have passed to another process since; the descriptor cannot.
            if leftover not in find_leftovers(run_dir):
                continue
            signal.pidfd_send_signal(fd, signal.SIGKILL)
            with trio.move_on_after(timeout):
                await trio.lowlevel.wait_readable(fd)
                killed.append(leftover)
                continue
            raise StopError(leftover.pid, timeout)
        except ProcessLookupError:
            continue
        finally:
            os.close(fd)
    return killed


def _arguments(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]
    except OSError:
        return []
