"""`attach`: a volume as a block file and nothing on it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import trio

from engine.record import VolumeRecord
from share_manager.errors import NotReadyError, RuntimeProblem
from share_manager.events import Reporter
from share_manager.paths import VolumePaths
from share_manager.share import operations
from share_manager.share.attachment import Attachment, attach
from share_manager.share.background import background
from share_manager.share.control import Handlers, control_socket
from share_manager.share.luks import read_header
from share_manager.share.replicas import ReplicaServers, run_replicas
from share_manager.share.requests import EngineUpgraded, ResizeShare, ShareResized, UpgradeEngine
from share_manager.share.servers import server_handlers
from share_manager.share.session import (
    VolumeOptions,
    clear_leftovers,
    leave_on_signals,
    open_or_create,
    require_root,
    runtime,
    undo_creation,
)
from share_manager.share.snapshot import replica_infos
from share_manager.share.state import StateFile
from share_manager.share.status import ProcessInfo, Restarts, ShareStatus, engine_info
from share_manager.share.supervise import Policy
from share_manager.volumes import volume_lock


class BlockFile:
    """One attached volume. Replicas are supervised; an engine that dies ends it with an error, for whoever has the
    file open (a mount, a virtual machine) must see the failure and decide, and a new file would not be the old one."""

    def __init__(self, paths: VolumePaths, options: VolumeOptions, report: Reporter) -> None:
        self.paths = paths
        self.options = options
        self.report = report
        self.state = "starting"
        self.started_at = time.time()
        self.record: VolumeRecord | None = None
        self.attachment: Attachment | None = None
        self.replicas: ReplicaServers | None = None
        self._operating = trio.Lock()
        self._handlers: Handlers = {
            ResizeShare: self._resize,
            UpgradeEngine: self._upgrade,
            **server_handlers(paths.volume, lambda: self.replicas),
        }

    async def run(self, beside: Callable[[BlockFile], Awaitable[None]] | None = None) -> None:
        """Until SIGINT, SIGTERM or SIGHUP. Raises ShareManagerError, EngineError, OSError."""
        require_root("attach")
        with volume_lock(self.paths, "first"):
            async with leave_on_signals(self.report, self._leaving):
                await clear_leftovers(self.paths, self.report)
                self.record, made = open_or_create(self.paths, self.options, self.report)
                try:
                    async with (
                        runtime(self.paths, "attach") as state,
                        control_socket(self.paths.control, self.status, self._handlers) as answer,
                        background() as tasks,
                    ):
                        tasks.start_soon(answer)
                        if beside is not None:
                            tasks.start_soon(beside, self)
                        async with run_replicas(self.record.replicas, self.paths, self.report, state) as self.replicas:
                            await self._hold(state)
                except BaseException:
                    if made and self.state == "starting":
                        undo_creation(self.paths)
                    raise
            self.report.emit("stopped", "stopped", volume=self.paths.volume)

    def _leaving(self) -> None:
        self.state = "stopping"

    async def _hold(self, state: StateFile) -> None:
        async with attach(
            self.paths, self.report, state, Policy(), frontend=self.options.frontend, with_loop=False
        ) as attachment:
            self.attachment = attachment
            self.record = attachment.record
            self.state = "running"
            self.report.emit(
                "ready",
                f"ready: {self.paths.block_file}",
                volume=self.paths.volume,
                block_file=str(self.paths.block_file),
                epoch=attachment.epoch,
                size_bytes=self.record.size,
                pid=os.getpid(),
                engine_pid=attachment.engine.pid,
            )
            await trio.sleep_forever()
        self.attachment = None
        raise attachment.fenced or RuntimeProblem(f"{attachment.broken}; the block file is gone: attach again")

    @contextlib.asynccontextmanager
    async def _at_work(self) -> AsyncIterator[Attachment]:
        """For what an operator asks, one at a time. Raises NotReadyError."""
        async with self._operating:
            if self.state != "running" or self.attachment is None:
                raise NotReadyError(self.paths.volume, self.state)
            yield self.attachment

    async def _resize(self, request: ResizeShare) -> ShareResized:
        async with self._at_work() as attachment:
            try:
                return await operations.resize(attachment, None, self.paths, request.size, self.report)
            finally:
                self.record = attachment.record

    async def _upgrade(self, request: UpgradeEngine) -> EngineUpgraded:
        async with self._at_work() as attachment:
            done = await attachment.upgrade()
            operations.tell_upgraded(done, self.report)
            return done

    async def status(self) -> ShareStatus:
        record, attachment = self.record, self.attachment
        if attachment is not None:
            await attachment.refresh()
        engine = attachment.engine if attachment is not None and attachment.engine.returncode is None else None
        return ShareStatus(
            volume=self.paths.volume,
            state=self.state,
            kind="attach",
            uuid=record.uuid if record else "",
            epoch=record.epoch if record else 0,
            size_bytes=record.size if record else 0,
            encrypted=read_header(self.paths) is not None,
            share_manager=ProcessInfo(pid=os.getpid()),
            engine=engine_info(
                attachment.status if attachment else None, engine.pid if engine else None, str(self.paths.block_file)
            ),
            replicas=replica_infos(self.replicas, attachment),
            restarts=Restarts(replicas=sum(server.restarts for server in self.replicas or ())),
            started_at=self.started_at,
        )
