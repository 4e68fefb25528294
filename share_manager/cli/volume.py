"""`share-manager volume`: what can be done to a volume that nobody serves."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import msgspec
import trio
from cyclopts import App, Parameter

from engine.errors import EngineError
from engine.store import ReplicaInfo, inspect_replica
from share_manager import units
from share_manager.cli.common import (
    DEFAULT_DATA_DIR,
    DataDir,
    Steps,
    Table,
    VolumeName,
    plain_grid,
    plain_table,
    print_json,
    reporter,
    table_console,
)
from share_manager.errors import UsageError, VolumeBusyError
from share_manager.paths import VolumePaths
from share_manager.share.leftovers import clear, observe
from share_manager.volumes import (
    allocated_bytes,
    delete_volume,
    find_volume,
    list_volumes,
    read_record,
    resize_volume,
    volume_lock,
)

app = App(name="volume", help="List, show, resize and delete volumes.")


class VolumeSummary(msgspec.Struct, frozen=True, kw_only=True):
    volume: str
    size_bytes: int = 0
    allocated_bytes: int = 0
    epoch: int = 0
    replicas: int = 0
    in_sync: tuple[str, ...] = ()
    error: str = ""


class ReplicaDetail(msgspec.Struct, frozen=True, kw_only=True):
    """`store` is what the replica's own directory says; None, with `error`, when it cannot be read."""

    name: str
    directory: str
    in_sync: bool
    allocated_bytes: int
    store: ReplicaInfo | None = None
    error: str = ""


class VolumeDetail(msgspec.Struct, frozen=True, kw_only=True):
    volume: str
    uuid: str
    size_bytes: int
    allocated_bytes: int
    epoch: int
    directory: str
    replicas: tuple[ReplicaDetail, ...]


def summarise(paths: VolumePaths) -> VolumeSummary:
    try:
        record = read_record(paths)
    except EngineError as error:
        return VolumeSummary(volume=paths.volume, error=str(error))
    return VolumeSummary(
        volume=paths.volume,
        size_bytes=record.size,
        allocated_bytes=allocated_bytes(paths.directory),
        epoch=record.epoch,
        replicas=len(record.replicas),
        in_sync=record.in_sync,
    )


@app.command(name="list")
def list_command(*, data_dir: DataDir = DEFAULT_DATA_DIR, output: Table = "table") -> None:
    """List volumes with the disk space that they take.

    For example:

    share-manager volume list
    """
    found = [summarise(VolumePaths(data_dir.resolve(), name)) for name in list_volumes(data_dir)]
    if output == "json":
        print_json(found)
        return
    table = plain_table()
    for heading in ("VOLUME", "SIZE", "ON DISK", "REPLICAS", "EPOCH"):
        table.add_column(heading, overflow="fold")
    for one in found:
        if one.error:
            table.add_row(one.volume, one.error, "", "", "")
        else:
            in_sync = f"{len(one.in_sync)}/{one.replicas} in sync"
            on_disk = f"{one.allocated_bytes / (1 << 20):.1f} MiB"
            table.add_row(one.volume, units.format_size(one.size_bytes), on_disk, in_sync, str(one.epoch))
    table_console().print(table)


@app.command
def show(volume: VolumeName, /, *, data_dir: DataDir = DEFAULT_DATA_DIR, output: Table = "table") -> None:
    """Show a volume's record and its replica directories.

    For example:

    share-manager volume show vol1 --output json
    """
    paths = find_volume(data_dir, units.parse_name(volume))
    record = read_record(paths)
    replicas = tuple(
        _replica(paths.replica(replica.name), replica.name, replica.name in record.in_sync)
        for replica in record.replicas
    )
    detail = VolumeDetail(
        volume=record.volume,
        uuid=record.uuid,
        size_bytes=record.size,
        allocated_bytes=sum(replica.allocated_bytes for replica in replicas),
        epoch=record.epoch,
        directory=str(paths.directory),
        replicas=replicas,
    )
    if output == "json":
        print_json(detail)
        return
    grid = plain_grid()
    grid.add_row("volume", detail.volume)
    grid.add_row("uuid", detail.uuid)
    grid.add_row("size", units.format_size(detail.size_bytes))
    grid.add_row("on disk", f"{detail.allocated_bytes / (1 << 20):.1f} MiB")
    grid.add_row("epoch", str(detail.epoch))
    grid.add_row("directory", detail.directory)
    for replica in detail.replicas:
        state = "in sync" if replica.in_sync else "out"
        grid.add_row(
            "replica", f"{replica.name}  {state}  {replica.directory}{'  ' + replica.error if replica.error else ''}"
        )
    table_console().print(grid)


def _replica(directory: Path, name: str, in_sync: bool) -> ReplicaDetail:
    found: ReplicaInfo | None = None
    failure = ""
    try:
        found = inspect_replica(directory)
    except EngineError as error:
        failure = str(error)
    return ReplicaDetail(
        name=name,
        directory=str(directory),
        in_sync=in_sync,
        allocated_bytes=allocated_bytes(directory),
        store=found,
        error=failure,
    )


@app.command
def resize(
    volume: VolumeName,
    size: Annotated[str, Parameter(help="New size, in Ki, Mi, Gi or Ti; not less than it has.")],
    /,
    *,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: Steps = "text",
) -> None:
    """Grow a volume that is not served; its filesystem grows at the next `serve`.

    For example:

    share-manager volume resize vol1 20Gi
    """
    paths = find_volume(data_dir, units.parse_name(volume))
    wanted = units.parse_size(size)
    with volume_lock(paths, "before it is resized"):
        _refuse_orphan(paths, "before it is resized")
        record = resize_volume(paths, wanted)
    reporter(output).emit(
        "resized", f"volume {volume} has {units.format_size(record.size)}", volume=volume, size_bytes=record.size
    )


@app.command
def delete(
    volume: VolumeName,
    /,
    *,
    yes: Annotated[bool, Parameter(negative=(), help="Do not ask.")] = False,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: Steps = "text",
) -> None:
    """Delete a volume that is not served, with all its data. Asks first.

    For example:

    share-manager volume delete vol1 --yes
    """
    paths = find_volume(data_dir, units.parse_name(volume))
    with volume_lock(paths, "before it is deleted"):
        _refuse_orphan(paths, "before it is deleted")
        if not yes:
            _ask(volume)
        trio.run(clear, paths)
        delete_volume(paths)
    reporter(output).emit("deleted", f"volume {volume} is deleted", volume=volume)


def _refuse_orphan(paths: VolumePaths, wanted: str) -> None:
    found = observe(paths)
    if found.alive or found.mounts:
        processes = found.ganesha + found.engine + found.replicas
        raise VolumeBusyError(paths.volume, processes[0].pid if processes else None, wanted)


def _ask(volume: str) -> None:
    """Raises UsageError unless a person says the volume's name or yes."""
    if not sys.stdin.isatty():
        raise UsageError(f"volume delete asks before it deletes {volume}, and nobody is there to answer: add --yes")
    sys.stdout.write(f"Delete volume {volume} and all its data? [y/N] ")
    sys.stdout.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UsageError(f"volume {volume} is kept")
