"""`share-manager replica`: the replicas of a volume, whether it is served or not."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Annotated

import msgspec
import trio
from cyclopts import App, Parameter

from engine.operations import OperationProgress
from share_manager import replicas, units
from share_manager.cli.common import (
    DEFAULT_DATA_DIR,
    ClusterSecret,
    DataDir,
    Node,
    Records,
    Steps,
    Table,
    VolumeName,
    plain_table,
    print_json,
    progress_bar,
    reporter,
    speed,
    table_console,
    terminal,
)
from share_manager.cli.live import describe_replica
from share_manager.cluster import open_client
from share_manager.events import Reporter
from share_manager.maintenance import Attached, attached
from share_manager.node.host import ReplicaHost
from share_manager.paths import VolumePaths
from share_manager.share.inspect import volume_status
from share_manager.share.session import require_root
from share_manager.volumes import find_volume, read_record

app = App(name="replica", help="Add, remove, move and list a volume's replicas, and host those of a node.")

ReplicaName = Annotated[str, Parameter(help="Name of the replica, such as r2.")]
Rate = Annotated[
    str | None,
    Parameter(help="Bytes a second that may be copied, in Ki, Mi or Gi (50Mi); 0 as much as clients leave room for."),
]
Wait = Annotated[bool, Parameter(help="Wait until it is in sync, and show how far it is.")]


class ReplicaRow(msgspec.Struct, frozen=True, kw_only=True):
    """`resync_done` and `resync_total` in bytes, `resync_rate` in bytes a second, `resync_left` in seconds."""

    name: str
    state: str
    directory: str
    reason: str = ""
    phase: str = ""
    resync_done: int = 0
    resync_total: int = 0
    resync_rate: float = 0.0
    resync_left: float | None = None


@app.command(name="list")
def list_command(volume: VolumeName, /, *, data_dir: DataDir = DEFAULT_DATA_DIR, output: Table = "table") -> None:
    """List a volume's replicas: state, directory, and how far one is that is being filled.

    For example:

    share-manager replica list vol1
    """
    paths = find_volume(data_dir, units.parse_name(volume))
    found = trio.run(volume_status, paths).replicas
    if output == "json":
        # one that is in the record and has no process yet is left out of a running share's answer
        print_json([msgspec.convert(replica, ReplicaRow, from_attributes=True) for replica in found])
        return
    table = plain_table()
    for heading in ("NAME", "STATE", "DIRECTORY", ""):
        table.add_column(heading, overflow="fold")
    for replica in found:
        detail = describe_replica(replica).partition("resyncing ")[2] or replica.reason
        table.add_row(replica.name, replica.state.replace("_", " "), replica.directory, detail)
    table_console().print(table)


@app.command
def add(
    volume: VolumeName,
    /,
    *,
    directory: Annotated[
        Path | None,
        Parameter(help="Where its data goes: an absolute path, absent or empty; by default beside the others."),
    ] = None,
    name: Annotated[str | None, Parameter(help="Its name; by default the next of r1, r2, ...")] = None,
    rate: Rate = None,
    wait: Wait = True,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: Steps = "text",
) -> None:
    """Add a replica and fill it, snapshots included, while clients go on working.

    Interrupted, it goes on where it was. Of a volume that is served the command may be left; without one it is the
    command that fills it, and the next one, or the next `serve`, goes on.

    For example:

    share-manager replica add vol1

    share-manager replica add vol1 --directory /mnt/disk2/vol1-r4 --rate 100Mi
    """
    paths = find_volume(data_dir, units.parse_name(volume))
    chosen = units.parse_replica(name) if name is not None else None

    async def work(attached_volume: Attached, report: Reporter) -> None:
        new = chosen or replicas.new_name(read_record(paths))
        await replicas.limit(attached_volume.client, _rate(rate))
        place = await replicas.add(paths, attached_volume, new, directory)
        report.emit("replica_added", f"replica {new} added: {place}", replica=new, directory=str(place))
        if wait:
            await _wait(attached_volume, new, report, output)

    _run(paths, output, "before a replica is added", work)


@app.command
def remove(
    volume: VolumeName,
    name: ReplicaName,
    /,
    *,
    delete: Annotated[bool, Parameter(negative=(), help="Delete its directory, with its data.")] = False,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: Steps = "text",
) -> None:
    """Remove a replica, in sync or not; never the last one that is in sync.

    For example:

    share-manager replica remove vol1 r2 --delete
    """
    paths = find_volume(data_dir, units.parse_name(volume))

    async def work(attached_volume: Attached, report: Reporter) -> None:
        place = await replicas.remove(paths, attached_volume, name, delete=delete)
        left = "its directory is deleted" if delete else f"its directory is kept: {place}"
        report.emit("replica_removed", f"replica {name} removed; {left}", replica=name, directory=str(place))

    _run(paths, output, "before a replica is removed", work)


@app.command
def move(
    volume: VolumeName,
    name: ReplicaName,
    /,
    *,
    to: Annotated[Path, Parameter(help="Its new directory: an absolute path, absent or empty.")],
    rate: Rate = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: Steps = "text",
) -> None:
    """Move a replica to another directory: a new one is filled there, then the old one is removed and deleted.

    There is never a copy less than before. Interrupted, both stay: `replica list` shows them, and `replica remove`
    ends it.

    For example:

    share-manager replica move vol1 r2 --to /mnt/disk2/vol1
    """
    paths = find_volume(data_dir, units.parse_name(volume))

    async def work(attached_volume: Attached, report: Reporter) -> None:
        record = read_record(paths)
        replicas.find_replica(record, name)
        new = replicas.new_name(record)
        await replicas.limit(attached_volume.client, _rate(rate))
        place = await replicas.add(paths, attached_volume, new, to)
        report.emit("replica_added", f"replica {new} added: {place}", replica=new, directory=str(place))
        await _wait(attached_volume, new, report, output)
        old = await replicas.remove(paths, attached_volume, name, delete=True)
        report.emit(
            "replica_moved",
            f"replica {name} is now {new}, in {place}; {old} is deleted",
            replica=name,
            to=new,
            directory=str(place),
        )

    _run(paths, output, "before a replica is moved", work)


@app.command
def recreate(
    volume: VolumeName,
    name: ReplicaName,
    /,
    *,
    rate: Rate = None,
    wait: Wait = True,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: Steps = "text",
) -> None:
    """Replace a replica whose directory is lost or damaged by an empty one, and fill it.

    What is left of it is thrown away. One that is in sync is refused.

    For example:

    share-manager replica recreate vol1 r2
    """
    paths = find_volume(data_dir, units.parse_name(volume))

    async def work(attached_volume: Attached, report: Reporter) -> None:
        await replicas.limit(attached_volume.client, _rate(rate))
        place = await replicas.recreate(paths, attached_volume, name)
        report.emit("replica_recreated", f"replica {name} is empty now: {place}", replica=name, directory=str(place))
        if wait:
            await _wait(attached_volume, name, report, output)

    _run(paths, output, "before a replica is recreated", work)


@app.command
def serve(
    *,
    records: Records,
    secret_file: ClusterSecret,
    node: Node,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: Steps = "text",
) -> None:
    """Host the replicas that volumes have on this node, until Ctrl-C or SIGTERM.

    The record server says which those are. A replica of a new volume is made, one that a volume has written to is not,
    unless it is to be filled. While that server is away the replicas go on.

    For example:

    share-manager replica serve --node a --records 192.0.2.1:7420 --secret-file /etc/share-manager/secret
    """
    require_root("replica serve")
    client = open_client(units.parse_records(records), secret_file)
    host = ReplicaHost(units.parse_node(node), data_dir.resolve(), client, secret_file, reporter(output))
    trio.run(host.run)


def _rate(text: str | None) -> int | None:
    """Raises InvalidValueError."""
    return 0 if text == "0" else None if text is None else units.parse_size(text, "--rate")


def _run(paths: VolumePaths, output: Steps, wanted: str, work: Callable[[Attached, Reporter], Awaitable[None]]) -> None:
    async def run() -> None:
        report = reporter(output)
        async with attached(paths, report, wanted) as volume:
            await work(volume, report)

    trio.run(run)


async def _wait(volume: Attached, name: str, report: Reporter, output: Steps) -> None:
    with _shown(name, report, output) as show:
        await replicas.wait(volume.client, name, show)
    report.emit("replica_in_sync", f"replica {name} is in sync", replica=name)


@contextlib.contextmanager
def _shown(name: str, report: Reporter, output: Steps) -> Iterator[replicas.OnProgress]:
    """A bar on a terminal, else a line every now and then."""
    console = terminal() if output == "text" else None
    if console is None:
        yield lambda now: _tell(name, now, report)
        return
    with progress_bar(console, f"replica {name}") as show:
        assert show is not None
        yield show


def _tell(name: str, now: OperationProgress, report: Reporter) -> None:
    if not now.total:
        report.emit("waiting", f"replica {name} is not being filled yet: {now.message or 'connecting'}", replica=name)
        return
    rate = f", {speed(now)}" if now.rate else ""
    report.emit(
        "resync_progress",
        f"replica {name}: {now.message} {100 * now.done // now.total} %{rate}",
        replica=name,
        done_bytes=now.done,
        total_bytes=now.total,
        rate=now.rate,
        left=now.left,
        phase=now.message,
    )
