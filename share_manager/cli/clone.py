"""`share-manager volume clone` and `volume flatten`."""

from __future__ import annotations

from typing import Annotated

import trio
from cyclopts import Parameter

from engine.operations import CloneFinish, CloneFinished
from share_manager import units
from share_manager.cli.common import (
    DEFAULT_DATA_DIR,
    DataDir,
    Steps,
    VolumeName,
    error_terminal,
    progress_bar,
    reporter,
)
from share_manager.clones import clone_volume, link_of
from share_manager.errors import InvalidValueError, VolumeExistsError
from share_manager.events import Reporter
from share_manager.maintenance import engine_of
from share_manager.paths import VolumePaths
from share_manager.share.session import require_root
from share_manager.snapshots import temporary_snapshot
from share_manager.volumes import find_volume, read_record, volume_lock

WaitRate = Annotated[
    str | None, Parameter(help="Bytes a second to copy at most, in Ki, Mi or Gi; as fast as the disk when not given.")
]


def clone(
    source: Annotated[str, Parameter(help="VOLUME@SNAPSHOT, or VOLUME as it is now.")],
    new: Annotated[str, Parameter(help="Name of the new volume.")],
    /,
    *,
    replicas: Annotated[int | None, Parameter(help="Copies of the new volume; as many as the source's.")] = None,
    wait: Annotated[
        bool, Parameter(negative=(), help="Come back when the new volume shares nothing with the source any more.")
    ] = False,
    rate: WaitRate = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: Steps = "text",
) -> None:
    """Make a new volume that begins as a snapshot of another one, served or not.

    It can be served at once. It shares the source's data until it has copied it, which goes on whenever it is served;
    `volume flatten` does it at once. Source and clone may be changed, and deleted, at any time.

    For example:

    share-manager volume clone vol1@daily vol2

    share-manager volume clone vol1 vol2 --replicas 1 --wait
    """
    volume, _, snapshot = source.partition("@")
    if "@" in source and not snapshot:
        raise InvalidValueError("source", source, "write VOLUME@SNAPSHOT, or VOLUME alone for what it holds now")
    units.check_replicas(replicas)
    bound = _rate(rate)
    paths = find_volume(data_dir, units.parse_name(volume))
    made = VolumePaths(data_dir.resolve(), units.parse_name(new))
    if made.directory.exists():
        raise VolumeExistsError(made.volume)
    require_root("volume clone")
    trio.run(_clone, paths, snapshot, made, replicas, bound if wait else None, reporter(output), output)


async def _clone(
    source: VolumePaths,
    snapshot: str,
    paths: VolumePaths,
    replicas: int | None,
    rate: int | None,
    report: Reporter,
    output: str,
) -> None:
    with volume_lock(paths, "first"):
        if snapshot:
            record = await trio.to_thread.run_sync(clone_volume, source, snapshot, paths, replicas)
        else:
            async with temporary_snapshot(source, f"clone-{paths.volume}", report) as snapshot:
                record = await trio.to_thread.run_sync(clone_volume, source, snapshot, paths, replicas)
    report.emit(
        "cloned",
        f"volume {paths.volume} is a clone of {source.volume}@{snapshot}: {units.format_size(record.size)}, "
        f"{len(record.replicas)} replicas; it can be served now",
        volume=paths.volume,
        uuid=record.uuid,
        origin=f"{source.volume}@{snapshot}",
        size_bytes=record.size,
        replicas=len(record.replicas),
    )
    if rate is not None:
        await _flatten(paths, rate, report, output)


def flatten(
    volume: VolumeName,
    /,
    *,
    rate: WaitRate = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: Steps = "text",
) -> None:
    """Make a clone independent: copy what it still shares with its source, whether it is served or not.

    Interrupted, it goes on where it was.

    For example:

    share-manager volume flatten vol2 --rate 100Mi
    """
    bound = _rate(rate)
    paths = find_volume(data_dir, units.parse_name(volume))
    require_root("volume flatten")
    trio.run(_flatten, paths, bound, reporter(output), output)


async def _flatten(paths: VolumePaths, rate: int, report: Reporter, output: str) -> None:
    found = CloneFinished(origin="")
    if any(link_of(paths.replica(replica.name)) for replica in read_record(paths).replicas):
        async with engine_of(paths, report, "before it is made independent") as client:
            with progress_bar(error_terminal(output), "copying") as show:
                found = await client.run(CloneFinish(rate=rate), CloneFinished, show)
    what = f"shares nothing with {found.origin} any more" if found.origin else "shares nothing with another volume"
    report.emit("independent", f"volume {paths.volume} {what}", volume=paths.volume, origin=found.origin)


def _rate(text: str | None) -> int:
    return 0 if text is None else units.parse_size(text, "--rate")
