"""`share-manager volume`: what can be done to a volume."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import trio
from cyclopts import App, Parameter

from engine.errors import EngineError
from engine.store import ReplicaInfo, inspect_replica
from share_manager import units
from share_manager.cli.adopt import adopt
from share_manager.cli.clone import clone, flatten
from share_manager.cli.common import (
    DEFAULT_DATA_DIR,
    DataDir,
    Steps,
    Table,
    VolumeName,
    confirm,
    plain_grid,
    plain_table,
    print_json,
    reporter,
    table_console,
)
from share_manager.cli.luks import header, passphrase
from share_manager.cli.salvage import salvage
from share_manager.cli.scrub import scrub
from share_manager.clones import Link, link_of
from share_manager.paths import VolumePaths
from share_manager.share.control import ask
from share_manager.share.leftovers import clear, refuse_orphan
from share_manager.share.requests import ResizeShare, ShareResized, ShareTrimmed, TrimShare
from share_manager.volumes import (
    allocated_bytes,
    delete_volume,
    find_volume,
    import_volume,
    list_volumes,
    lock_holder,
    make_data_dir,
    read_record,
    replica_directory,
    resize_volume,
    volume_lock,
)

app = App(
    name="volume", help="List, show, clone, resize, trim, import, adopt, salvage, scrub, re-key and delete volumes."
)
for command in (adopt, clone, flatten, passphrase, salvage, scrub):
    app.command(command)
app.command(header)


_FILESYSTEM = {
    "grown": ", and so has its filesystem",
    "full size already": ", and so has its filesystem",
    "later": "; its filesystem grows at the next serve, since a mounted ext4 can only be grown with CAP_SYS_RESOURCE",
}


class VolumeSummary(msgspec.Struct, frozen=True, kw_only=True):
    volume: str
    size_bytes: int = 0
    allocated_bytes: int = 0
    epoch: int = 0
    replicas: int = 0
    in_sync: tuple[str, ...] = ()
    error: str = ""


class ReplicaDetail(msgspec.Struct, frozen=True, kw_only=True):
    """`store` is what the replica's own directory says; None, with `error`, when it cannot be read. `link` is what a
    clone still shares with its source."""

    name: str
    directory: str
    in_sync: bool
    allocated_bytes: int
    store: ReplicaInfo | None = None
    link: Link | None = None
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
        _replica(replica_directory(paths, replica), replica.name, replica.name in record.in_sync)
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
        link = replica.link
        share = f"  {100 * link.done // link.total if link.total else 0} % copied of {link.origin}" if link else ""
        error = f"  {replica.error}" if replica.error else ""
        grid.add_row("replica", f"{replica.name}  {state}  {replica.directory}{share}{error}")
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
        link=link_of(directory),
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
    """Grow a volume and its filesystem, also while it is served or attached and clients write.

    The filesystem of one that is not served grows at the next `serve`. Cut off, give the same command again.

    For example:

    share-manager volume resize vol1 20Gi
    """
    paths = find_volume(data_dir, units.parse_name(volume))
    wanted = units.parse_size(size)
    if lock_holder(paths) is not None and paths.control.exists():
        done = trio.run(ask, paths, ResizeShare(size=wanted), ShareResized)
        reporter(output).emit(
            "resized",
            f"volume {volume} has {units.format_size(done.size)}{_FILESYSTEM.get(done.filesystem, '')}",
            volume=volume,
            size_bytes=done.size,
            filesystem=done.filesystem,
        )
        return
    with volume_lock(paths, "before it is resized"):
        refuse_orphan(paths, "before it is resized")
        record = resize_volume(paths, wanted)
    reporter(output).emit(
        "resized", f"volume {volume} has {units.format_size(record.size)}", volume=volume, size_bytes=record.size
    )


@app.command
def trim(volume: VolumeName, /, *, data_dir: DataDir = DEFAULT_DATA_DIR, output: Steps = "text") -> None:
    """Give the space that a served filesystem does not use back to the disks of its replicas (fstrim).

    Space that a snapshot still holds stays taken.

    For example:

    share-manager volume trim vol1
    """
    paths = find_volume(data_dir, units.parse_name(volume))
    done = trio.run(ask, paths, TrimShare(), ShareTrimmed)
    reporter(output).emit(
        "trimmed",
        f"volume {volume}: {done.discarded / (1 << 20):.1f} MiB were unused; "
        f"the replicas gave back {done.freed / (1 << 20):.1f} MiB",
        volume=volume,
        discarded_bytes=done.discarded,
        freed_bytes=done.freed,
    )


@app.command(name="import")
def import_command(
    volume: VolumeName,
    directory: Annotated[Path, Parameter(help="A replica directory of Longhorn's v1 engine, which nobody uses.")],
    /,
    *,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: Steps = "text",
) -> None:
    """Make a volume of a replica directory of Longhorn, with its snapshots. The directory moves below the volume.

    Take a replica that was healthy when the volume was detached. More replicas: `share-manager replica add`.

    For example:

    share-manager volume import vol1 /var/lib/longhorn/replicas/pvc-4f1c-1b2d
    """
    paths = VolumePaths(make_data_dir(data_dir), units.parse_name(volume))
    with volume_lock(paths, "before it is imported"):
        record = import_volume(paths, directory.resolve())
    size = units.format_size(record.size)
    reporter(output).emit(
        "imported", f"volume {volume} is imported: {size}, one replica", volume=volume, size_bytes=record.size
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
        refuse_orphan(paths, "before it is deleted")
        if not yes:
            confirm(
                f"Delete volume {volume} and all its data?",
                f"volume delete asks before it deletes {volume}, and nobody is there to answer: add --yes",
                f"volume {volume} is kept",
            )
        trio.run(clear, paths)
        delete_volume(paths)
    reporter(output).emit("deleted", f"volume {volume} is deleted", volume=volume)
