"""Options that several commands share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from cyclopts import Parameter
from rich.console import Console
from rich.table import Table as RichTable

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
VolumeName = Annotated[str, Parameter(help="Name of the volume: a DNS label, up to 63 of a-z, 0-9 and '-'.")]


def reporter(output: str, console: Console | None = None) -> Reporter:
    """`console` is where a live view runs, on a terminal."""
    if output == "json":
        return Reporter(JsonSink())
    return Reporter(LineSink() if console is None else ConsoleSink(console))


def print_json(value: object) -> None:
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n")
    sys.stdout.flush()


def terminal() -> Console | None:
    return Console() if sys.stdout.isatty() else None


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
