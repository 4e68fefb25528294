"""`share-manager snapshot mount`, `browse`, `umount` and `cp`: files as they were."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated

import trio
from cyclopts import Parameter

from engine.client import EngineClient
from share_manager import units
from share_manager.cli.common import DEFAULT_DATA_DIR, DataDir, Steps, VolumeName, reporter
from share_manager.errors import InterruptedProblem, RuntimeProblem
from share_manager.events import LineSink, Reporter
from share_manager.maintenance import engine_of
from share_manager.paths import VolumePaths
from share_manager.share import browse as browsing
from share_manager.share.browse import Browsed
from share_manager.share.session import leave_on_signals, require_root
from share_manager.share.treecopy import copy_out
from share_manager.volumes import find_volume

SnapshotName = Annotated[str, Parameter(help="Name of the snapshot.")]
Mountpoint = Annotated[Path, Parameter(help="An empty directory.")]


def mount(
    volume: VolumeName,
    name: SnapshotName,
    mountpoint: Annotated[
        Path | None, Parameter(help="An empty directory; by default one below /run/share-manager.")
    ] = None,
    /,
    *,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: Steps = "text",
) -> None:
    """Mount the filesystem of a snapshot, read-only, until Ctrl-C or SIGTERM. Clients of the volume go on.

    A snapshot that is mounted cannot be deleted.

    For example:

    share-manager snapshot mount vol1 before-upgrade

    share-manager snapshot mount vol1 before-upgrade /mnt/before --output json
    """
    paths = find_volume(data_dir, units.parse_name(volume))
    target = None if mountpoint is None else mountpoint.absolute()
    require_root("snapshot mount")
    report = reporter(output)

    def show(client: EngineClient) -> contextlib.AbstractAsyncContextManager[Browsed]:
        return browsing.filesystem_of(paths, client, name, target, report)

    trio.run(_hold, paths, show, report, f"snapshot {name} of {volume}", name)


def browse(
    volume: VolumeName,
    mountpoint: Mountpoint,
    /,
    *,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: Steps = "text",
) -> None:
    """Show all snapshots as read-only block images, NAME.img, in a directory until Ctrl-C or SIGTERM.

    For example:

    share-manager snapshot browse vol1 /mnt/images
    """
    paths = find_volume(data_dir, units.parse_name(volume))
    require_root("snapshot browse")
    report = reporter(output)

    def show(client: EngineClient) -> contextlib.AbstractAsyncContextManager[Browsed]:
        return browsing.images(paths, client, mountpoint.absolute(), report)

    trio.run(_hold, paths, show, report, f"the snapshots of {volume}", "")


async def _hold(paths: VolumePaths, show: browsing.Show, report: Reporter, what: str, snapshot: str) -> None:
    with contextlib.suppress(InterruptedProblem):  # of an attachment of ours, while that began
        async with engine_of(paths, report, "before a snapshot is looked at") as client, _until_signal(report):
            async with show(client) as found:
                report.emit(
                    "ready",
                    f"{what}: {found.data}",
                    volume=paths.volume,
                    snapshot=snapshot,
                    mountpoint=str(found.root),
                    data=str(found.data),
                    pid=os.getpid(),
                )
                await found.ended.wait()
            raise RuntimeProblem(
                f"{what}: not there any more, for the volume was stopped or the server of its snapshots ended"
            )
    report.emit("stopped", f"{what}: unmounted", volume=paths.volume, snapshot=snapshot)


@contextlib.asynccontextmanager
async def _until_signal(report: Reporter) -> AsyncIterator[None]:
    async with leave_on_signals(report, lambda: None):
        yield


def umount(
    volume: VolumeName,
    name: Annotated[str, Parameter(help="Name of the snapshot; all when not given.")] = "",
    /,
    *,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: Steps = "text",
) -> None:
    """End what `snapshot mount`, `browse` and `cp` of a volume do, and clear what killed ones left.

    For example:

    share-manager snapshot umount vol1 before-upgrade
    """
    paths = find_volume(data_dir, units.parse_name(volume))
    require_root("snapshot umount")
    count = trio.run(browsing.end, paths, name)
    reporter(output).emit("unmounted", f"{count} unmounted", volume=volume, snapshot=name, count=count)


def cp(
    volume: VolumeName,
    name: SnapshotName,
    path: Annotated[str, Parameter(help="File or directory in the snapshot, as clients see it; / for all.")],
    destination: Annotated[Path, Parameter(help="A directory to copy into, or a new name.")],
    /,
    *,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: Steps = "text",
) -> None:
    """Copy a file or a directory tree out of a snapshot, with owners, modes and times. Clients of the volume go on.

    Symbolic links are copied, never followed. Nothing at the destination is replaced.

    For example:

    share-manager snapshot cp vol1 before-upgrade etc/app.conf /root

    share-manager snapshot cp vol1 before-upgrade projects/alpha /srv/alpha-before
    """
    paths = find_volume(data_dir, units.parse_name(volume))
    require_root("snapshot cp")
    # the steps of an attachment that is only made for this are of no interest to a program
    trio.run(_copy, paths, name, path, destination.absolute(), reporter(output), Reporter(LineSink(sys.stderr)))


async def _copy(paths: VolumePaths, name: str, path: str, destination: Path, report: Reporter, steps: Reporter) -> None:
    done = False
    async with engine_of(paths, steps, "before a snapshot is looked at") as client, _until_signal(steps):
        async with browsing.filesystem_of(paths, client, name, None, report) as found:
            made, copied = await trio.to_thread.run_sync(
                copy_out, found.data, path, destination, abandon_on_cancel=True
            )
        done = True
    if not done:
        raise InterruptedProblem
    for one in copied.skipped:
        report.warn("skipped", f"not copied, for it is a socket or a device: {one}", path=one)
    report.emit(
        "copied",
        f"copied to {made}: {copied.files} files, {copied.bytes / (1 << 20):.1f} MiB",
        volume=paths.volume,
        snapshot=name,
        destination=str(made),
        files=copied.files,
        directories=copied.directories,
        links=copied.links,
        bytes=copied.bytes,
    )
