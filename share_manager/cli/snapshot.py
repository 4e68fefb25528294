"""`share-manager snapshot`: a volume as it was."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Annotated, TypeVar

import msgspec
import trio
from cyclopts import App, Parameter

from engine.client import EngineOperationError
from engine.durable import replace_file, sync_directory
from engine.operations import (
    Operation,
    OperationProgress,
    SnapshotCreate,
    SnapshotDelete,
    SnapshotDeleted,
    SnapshotList,
    SnapshotPurge,
    SnapshotPurged,
    SnapshotRevert,
    SnapshotReverted,
    SnapshotsListed,
)
from share_manager import units
from share_manager.cli.browse import browse, cp, mount, umount
from share_manager.cli.common import (
    DEFAULT_DATA_DIR,
    DataDir,
    Table,
    VolumeName,
    confirm,
    error_terminal,
    plain_table,
    print_json,
    progress_bar,
    quiet_reporter,
    table_console,
)
from share_manager.errors import DiskError, InvalidValueError
from share_manager.maintenance import engine_of
from share_manager.paths import VolumePaths
from share_manager.snapshots import take_snapshot
from share_manager.volumes import find_volume

app = App(name="snapshot", help="Take, list, read, delete and go back to snapshots.")
for command in (mount, browse, umount, cp):
    app.command(command)

SnapshotName = Annotated[str, Parameter(help="Name of the snapshot.")]
_R = TypeVar("_R", bound=msgspec.Struct)


def _run(
    paths: VolumePaths,
    wanted: str,
    request: Operation,
    result: type[_R],
    on_progress: Callable[[OperationProgress], None] | None = None,
) -> _R:
    async def ask() -> _R:
        async with engine_of(paths, quiet_reporter(), wanted) as client:
            return await client.run(request, result, on_progress)

    return trio.run(ask)


def default_name(now: float) -> str:
    return time.strftime("snap-%Y%m%d-%H%M%S", time.gmtime(now))


def parse_labels(texts: list[str]) -> dict[str, str]:
    """Raises InvalidValueError."""
    labels = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise InvalidValueError("--label", text, "expected KEY=VALUE")
        labels[key] = value
    return labels


@app.command
def create(
    volume: VolumeName,
    name: Annotated[
        str | None, Parameter(help="Name of the snapshot; by default the time, snap-YYYYMMDD-HHMMSS.")
    ] = None,
    /,
    *,
    label: Annotated[list[str] | None, Parameter(help="KEY=VALUE, kept with the snapshot; may be repeated.")] = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: Table = "table",
) -> None:
    """Keep the volume as it is now. Instant, whatever its size; clients go on.

    While the volume is served its filesystem is brought to rest for that moment, so what the snapshot holds is
    complete. Of an attached block file it holds what was written to it.

    For example:

    share-manager snapshot create vol1

    share-manager snapshot create vol1 before-upgrade --label ticket=42
    """
    paths = find_volume(data_dir, units.parse_name(volume))
    request = SnapshotCreate(name=name or default_name(time.time()), labels=parse_labels(label or []))
    made = trio.run(take_snapshot, paths, request, quiet_reporter())
    if output == "json":
        print_json(made)
    else:
        sys.stdout.write(f"snapshot {made.name} taken (clients waited {made.held * 1000:.0f} ms)\n")


@app.command(name="list")
def list_command(
    volume: VolumeName,
    /,
    *,
    everything: Annotated[
        bool, Parameter(name="--all", negative=(), help="Also those that are deleted and not merged away yet.")
    ] = False,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: Table = "table",
) -> None:
    """List snapshots, the oldest first, with the room that each takes on a replica.

    A snapshot holds what was written between the one before and itself; the last line is what was written since. One
    with "aside" is not below the present state, because the volume was reverted to an older one. JSON has all of them,
    deleted ones too.

    For example:

    share-manager snapshot list vol1

    share-manager snapshot list vol1 --output json
    """
    paths = find_volume(data_dir, units.parse_name(volume))
    found = _run(paths, "before its snapshots are listed", SnapshotList(), SnapshotsListed)
    if output == "json":
        print_json(found)
        return
    table = plain_table()
    for heading in ("SNAPSHOT", "CREATED", "SIZE", "STATE", "LABELS"):
        table.add_column(heading, overflow="fold", justify="right" if heading == "SIZE" else "left")
    hidden = 0
    for entry in found.snapshots:
        if entry.removed and not everything:
            hidden += 1
            continue
        states = [] if entry.live else ["aside"]
        states += ["deleted"] if entry.removed else []
        states += [] if entry.user_created else ["system"]
        labels = ", ".join(f"{key}={value}" for key, value in sorted(entry.labels.items()))
        created = entry.created.partition(".")[0].removesuffix("Z").replace("T", " ") + "Z"
        table.add_row(entry.name, created, _size(entry.allocated), " ".join(states), labels)
    table.add_row("(now)", "", _size(found.head_allocated), "", "")
    table_console().print(table)
    if found.purge.active:
        sys.stdout.write(
            f"merging deleted snapshots: {_size(found.purge.done)} of about {_size(found.purge.total)} are done\n"
        )
    elif hidden:
        sys.stdout.write(f"{hidden} deleted, not merged away yet: see --all, and `share-manager snapshot purge`\n")


def _size(count: int) -> str:
    return f"{count / (1 << 20):.1f} MiB"


@app.command
def delete(
    volume: VolumeName,
    name: SnapshotName,
    /,
    *,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: Table = "table",
) -> None:
    """Delete a snapshot. The room that only it needs comes back in the background, while the volume is in use.

    For example:

    share-manager snapshot delete vol1 before-upgrade
    """
    paths = find_volume(data_dir, units.parse_name(volume))
    done = _run(paths, "before a snapshot is deleted", SnapshotDelete(name=name), SnapshotDeleted)
    if output == "json":
        print_json(done)
    else:
        sys.stdout.write(f"snapshot {name} is deleted; its room comes back in the background, or with a purge\n")


@app.command
def revert(
    volume: VolumeName,
    name: SnapshotName,
    /,
    *,
    yes: Annotated[bool, Parameter(negative=(), help="Do not ask.")] = False,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: Table = "table",
) -> None:
    """Make a volume what it was at a snapshot. Asks first.

    What was written since is lost, unless a later snapshot has it; those stay, and can be reverted to. The volume must
    not be served or attached. Clients that had it mounted must unmount it and mount it again: none may reclaim its
    files and locks.

    For example:

    share-manager stop vol1

    share-manager snapshot revert vol1 before-upgrade
    """
    paths = find_volume(data_dir, units.parse_name(volume))
    # before anything is attached, so that nothing waits for the answer of a person
    if not yes:
        confirm(
            f"Revert volume {volume} to snapshot {name}? Everything written since is lost, unless a later snapshot has "
            "it, and no client keeps its locks.",
            f"snapshot revert asks before it throws away what was written to {volume} since, and nobody is there to "
            "answer: add --yes",
            f"volume {volume} stays as it is",
        )

    async def act() -> SnapshotReverted:
        async with engine_of(paths, quiet_reporter(), "before it is reverted") as client:
            with _marked(paths):
                return await client.run(SnapshotRevert(name=name), SnapshotReverted)

    done = trio.run(act)
    if output == "json":
        print_json(done)
    else:
        sys.stdout.write(f"volume {volume} is what it was at snapshot {name}\n")


@contextlib.contextmanager
def _marked(paths: VolumePaths) -> Iterator[None]:
    """The next `serve` forgets the clients. The mark comes before the revert; it goes when that changed nothing."""
    made = not paths.drop_recovery.exists()
    try:
        replace_file(paths.drop_recovery, b"", mode=0o600)
    except OSError as error:
        raise DiskError(paths.directory, error) from error
    try:
        yield
    except EngineOperationError:
        # the engine has answered, and what it refuses or fails at it has undone
        if made:
            with contextlib.suppress(OSError):
                os.unlink(paths.drop_recovery)
                sync_directory(paths.directory)
        raise


@app.command
def purge(
    volume: VolumeName,
    /,
    *,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: Table = "table",
) -> None:
    """Merge away what is deleted, now, and wait for it.

    This goes on in the background after every delete while the volume is served or attached, slower while clients work.
    What the present state builds on can go only when there is a snapshot between; purge takes one where it has to.
    Interrupted, it goes on in the background.

    For example:

    share-manager snapshot purge vol1
    """
    paths = find_volume(data_dir, units.parse_name(volume))
    with progress_bar(error_terminal(output), "merging") as show:
        done = _run(paths, "before it is purged", SnapshotPurge(), SnapshotPurged, show)
    if output == "json":
        print_json(done)
    else:
        names = ", ".join(done.merged) or "nothing"
        sys.stdout.write(f"merged away: {names} ({_size(done.copied)} copied)\n")
