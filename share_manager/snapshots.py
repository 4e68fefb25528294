"""Snapshots of a volume, whether somebody serves it or not."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator

from engine.errors import EngineError
from engine.operations import SnapshotCreate, SnapshotCreated, SnapshotDelete, SnapshotDeleted
from share_manager.errors import ShareManagerError
from share_manager.events import Reporter
from share_manager.maintenance import engine_of
from share_manager.paths import VolumePaths
from share_manager.share.control import ask
from share_manager.share.requests import SnapshotShare
from share_manager.share.state import read_state
from share_manager.volumes import lock_holder


def is_served(paths: VolumePaths) -> bool:
    state = read_state(paths.state)
    return lock_holder(paths) is not None and state is not None and state.kind == "serve"


async def take_snapshot(paths: VolumePaths, request: SnapshotCreate, report: Reporter) -> SnapshotCreated:
    """Of a served volume with its filesystem at rest, which the share manager knows how to do.

    Raises VolumeBusyError, EngineError, ShareManagerError.
    """
    if is_served(paths):
        return await ask(paths, SnapshotShare(name=request.name, labels=request.labels), SnapshotCreated)
    async with engine_of(paths, report, "before a snapshot is taken") as client:
        return await client.run(request, SnapshotCreated)


@contextlib.asynccontextmanager
async def temporary_snapshot(paths: VolumePaths, purpose: str, report: Reporter) -> AsyncIterator[str]:
    """The name of a snapshot of the volume as it is now, deleted at the end. Raises as `take_snapshot` does."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    request = SnapshotCreate(name=f"{purpose}-{stamp}", labels={"for": purpose})
    async with engine_of(paths, report, "before a snapshot is taken") as client:
        # of a volume that is not served this is the engine that we have
        name = (await take_snapshot(paths, request, report)).name
        try:
            yield name
        finally:
            try:
                await client.run(SnapshotDelete(name=name), SnapshotDeleted)
            except (EngineError, ShareManagerError) as error:
                report.warn("snapshot_left", f"snapshot {name} of {paths.volume} is left: {error}", name=name)
