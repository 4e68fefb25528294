"""A process of the volume: started in a session of its own, its log kept, asked before it is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import trio

from share_manager.errors import ProcessDiedError
from share_manager.share.procfs import ProcessId, identify

LOG_LIMIT = 8 << 20
_TAIL = 16384
_KEPT = 20


class Child:
    """Made by `start_child`. It outlives us when we die: the next run finds it by its arguments."""

    def __init__(self, name: str, process: trio.Process, identity: ProcessId, log: Path, log_start: int) -> None:
        self.name = name
        self.identity = identity
        self.log = log
        self._process = process
        self._log_start = log_start
        self.said: list[dict[str, object]] = []
        self.spoke = trio.Event()
        self.closed = trio.Event()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.poll()

    async def follow_output(self) -> None:
        """Keep the JSON objects that the process prints, one a line, until it closes its output. `spoke` is set with
        the first, or when there will be none."""
        assert self._process.stdout is not None
        rest = b""
        try:
            async for chunk in self._process.stdout:
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    try:
                        value = json.loads(line)
                    except ValueError:
                        continue
                    if isinstance(value, dict):
                        self.said = [*self.said[-_KEPT:], value]
                        self.spoke.set()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            self.spoke.set()
            self.closed.set()

    def said_event(self, name: str) -> dict[str, object] | None:
        return next((line for line in self.said if line.get("event") == name), None)

    async def wait(self) -> int:
        return await self._process.wait()

    def terminate(self) -> None:
        self._process.terminate()

    def make_way(self) -> None:
        """SIGINT: an engine leaves as by SIGTERM, for a successor in the same attachment."""
        self._process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        self._process.kill()

    async def stop(self, timeout: float) -> bool:
        """SIGTERM, then after `timeout` SIGKILL. Whether it left by itself."""
        if self.returncode is None:
            self._process.terminate()
            with trio.move_on_after(timeout):
                await self._process.wait()
                return True
            self._process.send_signal(signal.SIGKILL)
            with trio.move_on_after(10):
                await self._process.wait()
            return False
        return True

    def reason(self) -> str:
        """What it said last: the error that it printed, else the end of its log, in one line."""
        error = self.said_event("error")
        if error is not None and error.get("message"):
            return str(error["message"])
        try:
            with self.log.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(self._log_start, size - _TAIL))
                text = file.read().decode(errors="replace")
        except OSError:
            return ""
        return last_reason(text)

    def died(self) -> ProcessDiedError:
        status = self.returncode
        # killed, it had no time to say why
        killed = status is not None and status < 0
        return ProcessDiedError(self.name, status, "" if killed else self.reason(), None if killed else self.log)

    async def aclose(self) -> None:
        if self._process.stdout is not None:
            await self._process.stdout.aclose()


def last_reason(text: str) -> str:
    """The message in the last line of a log of JSON lines, or of anything else."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return ""
    try:
        value = json.loads(lines[-1])
    except ValueError:
        return lines[-1]
    if not isinstance(value, dict):
        return lines[-1]
    for key in ("reason", "error", "message", "event"):
        if value.get(key):
            return str(value[key])
    return lines[-1]


async def start_child(name: str, argv: Sequence[str], log: Path, *, pass_fds: Sequence[int] = ()) -> Child:
    """Its stderr goes to the end of `log`, which is set aside when it has become large."""
    log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if log.exists() and log.stat().st_size > LOG_LIMIT:
        log.replace(log.with_suffix(".log.1"))
    fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        start = os.fstat(fd).st_size
        process = await trio.lowlevel.open_process(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=fd,
            # -m would put the directory it is started in before everything else
            env={**os.environ, "PYTHONSAFEPATH": "1"},
            cwd="/",
            start_new_session=True,
            pass_fds=tuple(pass_fds),
        )
    finally:
        os.close(fd)
    identity = identify(process.pid) or ProcessId(process.pid, 0)
    return Child(name, process, identity, log, start)
