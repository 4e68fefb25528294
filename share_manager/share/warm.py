"""An engine that has loaded everything before there is an epoch for it, with the file that it will serve.

It is for a share that stands by, and for one that serves where the kernel cannot hand a dead engine's requests to the
next one: there an attachment ends with its engine, and what costs most of the next one is the start of Python.
"""

from __future__ import annotations

from engine.frontend.fuse_device import FuseDevice
from engine.record import VolumeRecord
from share_manager.errors import ShareManagerError
from share_manager.events import Reporter
from share_manager.paths import VolumePaths
from share_manager.share.background import Background
from share_manager.share.child import Child
from share_manager.share.engine_process import EngineStarter, Successor
from share_manager.share.records import Records
from share_manager.share.state import StateFile


class WarmEngine:
    """Made by `warm_up`. Either an attachment takes it, with its file, or it is abandoned. `doubted`: replicas that it
    is not to wait for as long as for others."""

    def __init__(self, fuse: FuseDevice, starter: EngineStarter, engine: Successor) -> None:
        self.fuse = fuse
        self.starter = starter
        self.begun = False
        self.doubted: tuple[str, ...] = ()
        self._engine = engine

    @property
    def usable(self) -> bool:
        return self._engine.child.returncode is None

    async def begin(self, record: VolumeRecord) -> Child:
        """Have it attach the epoch that was claimed; whoever called owns it and its file from now on."""
        self.begun = True
        self.starter.claimed(record)
        return await self._engine.begin(record.epoch, self.doubted)

    async def abandon(self) -> None:
        """Does nothing when it has begun."""
        if self.begun:
            return
        try:
            await self._engine.abandon()
        finally:
            self.fuse.close()


async def warm_up(
    paths: VolumePaths,
    records: Records,
    record: VolumeRecord,
    report: Reporter,
    state: StateFile,
    frontend: str,
    right_lasts: float,
    tasks: Background,
) -> WarmEngine | None:
    """None, told to `report`, when it cannot be: then the attachment starts an engine of its own, later."""
    fuse = FuseDevice.open(paths.block_file)
    starter = EngineStarter(paths, record, fuse, state, frontend, records, right_lasts)
    try:
        engine = await starter.prepare(1, resume=False)
    except BaseException:
        fuse.close()
        raise
    warm = WarmEngine(fuse, starter, engine)
    tasks.start_soon(engine.child.follow_output)
    try:
        await engine.prepared()
    except ShareManagerError as error:
        report.warn("not_warm", f"the engine that was to stand by did not start: {error}")
        await warm.abandon()
        return None
    except BaseException:
        await warm.abandon()
        raise
    return warm
