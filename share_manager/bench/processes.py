"""Servers under measurement: started, ended by their pid, and their processor time."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from share_manager.errors import CommandError

_TICKS = os.sysconf("SC_CLK_TCK")


class UnavailableError(Exception):
    """A target cannot be measured here; the run goes on without it. The message is the reason in its row."""


@dataclass(frozen=True)
class Server:
    name: str
    pid: int
    stdout: Path
    stderr: Path
    process: trio.Process

    def why(self) -> str:
        """The last thing that it said."""
        for path in (self.stderr, self.stdout):
            lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
            if lines:
                return lines[-1]
        return f"exit status {self.process.poll()}"

    def check(self) -> None:
        """Raises UnavailableError when it has ended."""
        if self.process.poll() is not None:
            raise UnavailableError(f"{self.name} ended: {self.why()}")


@contextlib.asynccontextmanager
async def serving(
    name: str,
    argv: list[str],
    work: Path,
    env: Mapping[str, str] | None = None,
    patience: float = 30,
    pass_fds: Sequence[int] = (),
) -> AsyncIterator[Server]:
    """A server process with its output in `work`; asked to end by SIGTERM and given `patience` seconds for it.

    Raises UnavailableError when the program is missing.
    """
    stdout, stderr = work / f"{name}.out", work / f"{name}.err"
    with stdout.open("wb") as out, stderr.open("wb") as err:
        try:
            # a session of its own: a terminal's Ctrl-C must not end it before what is stacked on it is undone
            process = await trio.lowlevel.open_process(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
                env=env,
                pass_fds=tuple(pass_fds),
            )
        except FileNotFoundError:
            raise UnavailableError(f"{argv[0]} is not installed") from None
    try:
        yield Server(name, process.pid, stdout, stderr, process)
    finally:
        with trio.CancelScope(shield=True):
            await end(process, patience)


async def end(process: trio.Process, patience: float) -> None:
    """SIGTERM, and SIGKILL after `patience` seconds."""
    with trio.move_on_after(patience):
        if process.poll() is None:
            process.terminate()
        await process.wait()
        return
    process.kill()
    await process.wait()


async def run(argv: list[str]) -> str:
    """Output of a short command that is never left half done. Raises CommandError, UnavailableError."""
    try:
        with trio.CancelScope(shield=True):
            done = await trio.run_process(
                argv, stdin=subprocess.DEVNULL, capture_stdout=True, capture_stderr=True, check=False
            )
    except FileNotFoundError:
        raise UnavailableError(f"{argv[0]} is not installed") from None
    if done.returncode:
        raise CommandError(argv, done.returncode, done.stderr.decode(errors="replace"))
    return done.stdout.decode(errors="replace").strip()


def cpu_seconds_of(stat: str) -> tuple[int, float]:
    """Parent and processor seconds (user and system) in a line of /proc/PID/stat, proc(5)."""
    # the second field is the program's name in parentheses, which may hold blanks and parentheses
    fields = stat[stat.rindex(")") + 2 :].split()
    return int(fields[1]), (int(fields[11]) + int(fields[12])) / _TICKS


def cpu_seconds(roots: Iterable[int]) -> dict[int, float]:
    """Processor seconds so far of each process in the trees below `roots`."""
    parents: dict[int, int] = {}
    seconds: dict[int, float] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError, ValueError):
            parents[int(entry.name)], seconds[int(entry.name)] = cpu_seconds_of((entry / "stat").read_text())
    wanted = {pid for pid in roots if pid in seconds}
    grown = True
    while grown:
        children = {pid for pid, parent in parents.items() if parent in wanted} - wanted
        wanted |= children
        grown = bool(children)
    return {pid: seconds[pid] for pid in wanted}


def cpu_between(before: Mapping[int, float], after: Mapping[int, float]) -> float:
    """Seconds spent between two looks; a process that came in between counts whole."""
    return sum(now - before.get(pid, 0.0) for pid, now in after.items())
