"""What a user may say to `share-manager bench`, and how far it is."""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import trio
from cyclopts import App, Parameter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from share_manager.bench.flush import FLUSH_TARGETS
from share_manager.bench.measure import Observer, Outcome, Plan, measure
from share_manager.bench.model import CELLS, QUICK_CELLS
from share_manager.bench.nfs.targets import NFS_TARGETS
from share_manager.bench.report import print_report, report
from share_manager.bench.targets import BLOCK_TARGETS, FILE_TARGETS
from share_manager.errors import InvalidValueError
from share_manager.units import parse_size

app = App(
    name="bench",
    help="Measure every layer side by side: plain file, loop device, engine, known references, filesystem, NFS.",
)
NAMES = tuple(target.name for target in (*BLOCK_TARGETS, *FLUSH_TARGETS, *FILE_TARGETS, *NFS_TARGETS))
LEAST_SIZE, MOST_REPEATS, MOST_SECONDS = 128 << 20, 100, 600


@app.default
def bench(
    *,
    directory: Annotated[Path, Parameter(help="Where to measure, such as /var/lib/share-manager.")] = Path(),
    size: Annotated[str | None, Parameter(help="Of each target, such as 4Gi. Default 1Gi, quick 256Mi.")] = None,
    seconds: Annotated[float | None, Parameter(help="Of load in each sample. Default 3, quick 1.")] = None,
    repeats: Annotated[
        int | None, Parameter(help="Samples of each cell; medians are shown. Default 3, quick 1.")
    ] = None,
    targets: Annotated[
        str, Parameter(help=f"Only these, such as plain,loop,engine-3. There are: {', '.join(NAMES)}.")
    ] = ",".join(NAMES),
    nfs_client: Annotated[
        str | None, Parameter(help="Program that mounts and loads the NFS targets; default: this kernel's own client.")
    ] = None,
    quick: Annotated[bool, Parameter(negative="", help="A look in four minutes: little data, one sample.")] = False,
    output: Annotated[Literal["text", "json"], Parameter(help="Tables, or one JSON document.")] = "text",
) -> None:
    """Measure every layer of the data path on one directory, in one run.

    Takes about 30 minutes, with --quick about four. Ctrl-C leaves nothing behind.

    Example: share-manager bench --directory /var/lib/share-manager --quick
    """
    plan = plan_of(directory, size, seconds, repeats, targets, nfs_client, quick)
    with _progress(plan.steps) as observer:
        outcome, ended_by = trio.run(_until_signalled, plan, observer)
    if ended_by is not None:
        print("share-manager bench: interrupted; everything it had made is removed", file=sys.stderr)
        # the shell's convention for a program that a signal ended
        sys.exit(128 + ended_by)
    assert outcome is not None
    found = report(plan, outcome)
    if output == "json":
        print(msgspec.json.encode(found).decode())
    else:
        # rich takes a pipe for 80 columns wide
        print_report(found, Console() if sys.stdout.isatty() else Console(width=110))


def plan_of(
    directory: Path,
    size: str | None,
    seconds: float | None,
    repeats: int | None,
    targets: str,
    nfs_client: str | None,
    quick: bool,
) -> Plan:
    """Raises InvalidValueError."""
    if not directory.is_dir():
        raise InvalidValueError("--directory", str(directory), "there is no such directory")
    bytes_each = parse_size(size or ("256Mi" if quick else "1Gi"), "--size")
    if bytes_each < LEAST_SIZE:
        raise InvalidValueError("--size", size or "", f"at least {LEAST_SIZE >> 20}Mi, to measure more than a cache")
    seconds = (1.0 if quick else 3.0) if seconds is None else seconds
    if not 0.1 <= seconds <= MOST_SECONDS:
        raise InvalidValueError("--seconds", f"{seconds:g}", f"from 0.1 to {MOST_SECONDS}")
    repeats = (1 if quick else 3) if repeats is None else repeats
    if not 1 <= repeats <= MOST_REPEATS:
        raise InvalidValueError("--repeats", str(repeats), f"from 1 to {MOST_REPEATS}")
    wanted = {name.strip() for name in targets.split(",") if name.strip()}
    if unknown := sorted(wanted - set(NAMES)):
        raise InvalidValueError("--targets", unknown[0], f"the targets are {', '.join(NAMES)}")
    if nfs_client is not None and not _words(nfs_client):
        raise InvalidValueError("--nfs-client", nfs_client, "a command line, as a shell would take it")
    if not wanted:
        raise InvalidValueError("--targets", targets, f"name one or more of {', '.join(NAMES)}")
    return Plan(
        directory=directory,
        size=bytes_each,
        seconds=seconds,
        repeats=repeats,
        cells=QUICK_CELLS if quick else CELLS,
        block=tuple(target for target in BLOCK_TARGETS if target.name in wanted),
        files=tuple(target for target in (*FILE_TARGETS, *NFS_TARGETS) if target.name in wanted),
        flushes=tuple(target for target in FLUSH_TARGETS if target.name in wanted),
        nfs_client=nfs_client,
    )


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:
        return []


async def _until_signalled(plan: Plan, observer: Observer) -> tuple[Outcome | None, int | None]:
    """What was measured, or the signal that ended it."""
    outcome: Outcome | None = None
    ended_by: int | None = None

    async def listen(task_status: trio.TaskStatus[None]) -> None:
        nonlocal ended_by
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            task_status.started()
            async for number in signals:
                ended_by = number
                observer.doing("interrupted, cleaning up")
                nursery.cancel_scope.cancel()

    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(listen)
            outcome = await measure(plan, observer)
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        # only the measuring task raises
        if len(group.exceptions) == 1:
            raise group.exceptions[0] from None
        raise
    return outcome, ended_by


class _Bar:
    def __init__(self, progress: Progress, steps: int) -> None:
        self._progress = progress
        self._task = progress.add_task("starting", total=steps)

    def doing(self, what: str) -> None:
        self._progress.update(self._task, description=what)

    def done(self, steps: int = 1) -> None:
        self._progress.advance(self._task, steps)


class _Lines:
    """For logs: a line for each set-up, and one for each tenth of the way."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._count = 0

    def doing(self, what: str) -> None:
        if "set up" in what or self._count * 10 // self._steps != (self._count - 1) * 10 // self._steps:
            print(f"bench: {self._count}/{self._steps} {what}", file=sys.stderr, flush=True)

    def done(self, steps: int = 1) -> None:
        self._count += steps


@contextlib.contextmanager
def _progress(steps: int) -> Iterator[Observer]:
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(steps)
        return
    columns = (
        BarColumn(bar_width=16),
        MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=7)),
        TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
        TextColumn("left"),
        TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
    )
    with Progress(*columns, console=console, transient=True, expand=True) as progress:
        yield _Bar(progress, steps)
