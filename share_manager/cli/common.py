"""Options that several commands share."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from cyclopts import Parameter
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table as RichTable

from engine.operations import OperationProgress
from share_manager import units
from share_manager.errors import UsageError
from share_manager.events import ConsoleSink, JsonSink, LineSink, Reporter
from share_manager.paths import DEFAULT_DATA_DIR as DEFAULT_DATA_DIR

DataDir = Annotated[
    Path, Parameter(name="--data-dir", help="Directory that holds the volumes: records, replicas, logs.")
]
Steps = Annotated[
    Literal["text", "json"], Parameter(name="--output", help="Steps as lines for people, or one JSON object a line.")
]
Table = Annotated[Literal["table", "json"], Parameter(name="--output", help="A table for people, or JSON.")]
Frontend = Annotated[
    Literal["device", "pyfuse3"],
    Parameter(help="How the block file is served: device reads /dev/fuse itself, pyfuse3 goes through libfuse."),
]
Records = Annotated[str, Parameter(help="HOST:PORT of the record server (share-manager records serve).")]
ClusterSecret = Annotated[Path, Parameter(help="File with the secret that the nodes and the record server share.")]
Node = Annotated[str, Parameter(help="Name of this node, as the volumes' records have it.")]
VolumeName = Annotated[str, Parameter(help="Name of the volume: a DNS label, up to 63 of a-z, 0-9 and '-'.")]


def reporter(output: str, console: Console | None = None) -> Reporter:
    """`console` is where a live view runs, on a terminal."""
    if output == "json":
        return Reporter(JsonSink())
    return Reporter(LineSink() if console is None else ConsoleSink(console))


def quiet_reporter() -> Reporter:
    """The steps of an attachment that is only made for a command go to stderr: stdout is for the result."""
    return Reporter(LineSink(sys.stderr))


def print_json(value: object) -> None:
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n")
    sys.stdout.flush()


def confirm(question: str, nobody: str, kept: str) -> None:
    """Raises UsageError unless a person says yes: with `nobody` when there is none, else with `kept`."""
    if not sys.stdin.isatty():
        raise UsageError(nobody)
    sys.stdout.write(f"{question} [y/N] ")
    sys.stdout.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UsageError(kept)


def terminal() -> Console | None:
    return Console() if sys.stdout.isatty() else None


def error_terminal(output: str) -> Console | None:
    """Where a bar does not come between the lines of a result."""
    console = Console(stderr=True)
    return console if output != "json" and console.is_terminal else None


def table_console() -> Console:
    """Tables keep their columns in a pipe or a file, which have no width."""
    return Console() if sys.stdout.isatty() else Console(width=400)


def plain_table() -> RichTable:
    return RichTable(box=None, pad_edge=False, header_style="bold")


def plain_grid() -> RichTable:
    grid = RichTable.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    return grid


@contextlib.contextmanager
def progress_bar(console: Console | None, doing: str) -> Iterator[Callable[[OperationProgress], None] | None]:
    """How far an operation is, on a terminal: percent, rate, time left. None where `console` is none."""
    if console is None:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(doing, total=None, rate="")

        def show(now: OperationProgress) -> None:
            what = f"{doing}: {now.message}" if now.message else doing
            bar.update(task, description=what, completed=now.done, total=now.total or None, rate=speed(now))

        yield show


def speed(now: OperationProgress) -> str:
    return f"{units.format_rate(now.rate)}{units.format_left(now.left)}" if now.rate else ""
