"""The engine of a volume, for work on its snapshots and replicas, whether somebody serves it or not.

A volume that nobody uses is attached for that work alone: replicas and an engine without a file, under an epoch of its
own, gone at the end.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import msgspec
import trio

from engine.client import EngineClient, EngineUnreachableError
from engine.frontend import NO_FRONTEND
from engine.launch import EngineConfig, engine_argv
from engine.record import FileRecordStore, bump_epoch
from share_manager.errors import InterruptedProblem, RuntimeProblem, VolumeBusyError
from share_manager.events import Reporter
from share_manager.paths import VolumePaths
from share_manager.share.attachment import attach
from share_manager.share.background import background
from share_manager.share.child import start_child
from share_manager.share.engine_process import STOP_TIMEOUT, wait_ready
from share_manager.share.replicas import ReplicaServers, run_replicas
from share_manager.share.servers import RemoteServers, Servers
from share_manager.share.session import clear_leftovers, leave_on_signals, require_root, runtime
from share_manager.share.state import StateFile
from share_manager.share.supervise import Policy
from share_manager.volumes import lock_holder, open_volume, volume_lock


class Attached(msgspec.Struct, frozen=True):
    """An attached volume: its engine, and whoever runs its replicas' servers. `ours` ends with the block."""

    client: EngineClient
    servers: Servers
    ours: bool


@contextlib.asynccontextmanager
async def engine_of(paths: VolumePaths, report: Reporter, wanted: str) -> AsyncIterator[EngineClient]:
    """The engine that a share or an attachment of the volume runs, else one of our own inside the block.

    `wanted` ends the error of a volume that is busy with something else ("before ..."). Raises VolumeBusyError,
    InterruptedProblem, EngineError, ShareManagerError.
    """
    async with attached(paths, report, wanted) as volume:
        yield volume.client


@contextlib.asynccontextmanager
async def attached(paths: VolumePaths, report: Reporter, wanted: str) -> AsyncIterator[Attached]:
    """The same, with whoever starts and stops replica servers."""
    holder = lock_holder(paths)
    if holder is None:
        async with maintained(paths, report, wanted) as volume:
            yield volume
        return
    client = EngineClient(paths.engine_control)
    try:
        await client.status()
    except EngineUnreachableError:
        raise VolumeBusyError(paths.volume, holder, wanted) from None
    yield Attached(client, RemoteServers(paths), False)


@contextlib.asynccontextmanager
async def maintained(paths: VolumePaths, report: Reporter, wanted: str) -> AsyncIterator[Attached]:
    """Attach a volume that nobody uses, without a file. SIGINT, SIGTERM and SIGHUP cancel the block.

    Raises VolumeBusyError, InterruptedProblem, EngineError, ShareManagerError.
    """
    async with _held(paths, report, wanted) as (state, servers), _engine(paths, state) as client:
        yield Attached(client, servers, True)


@contextlib.asynccontextmanager
async def _held(paths: VolumePaths, report: Reporter, wanted: str) -> AsyncIterator[tuple[StateFile, ReplicaServers]]:
    """A volume that nobody uses and its replicas, as long as the block runs."""
    require_root("this")
    interrupted = False

    def leaving() -> None:
        nonlocal interrupted
        interrupted = True

    with volume_lock(paths, wanted):
        async with leave_on_signals(report, leaving):
            await clear_leftovers(paths, report)
            record = open_volume(paths, size=None, replicas=None)
            async with (
                runtime(paths, "maintenance") as state,
                run_replicas(record.replicas, paths, report, state) as servers,
            ):
                yield state, servers
    if interrupted:
        raise InterruptedProblem


@contextlib.asynccontextmanager
async def _engine(paths: VolumePaths, state: StateFile) -> AsyncIterator[EngineClient]:
    record = bump_epoch(FileRecordStore(paths.record))
    state.update(epoch=record.epoch)
    config = EngineConfig(
        record=str(paths.record),
        secret_file=str(paths.secret),
        epoch=record.epoch,
        frontend=NO_FRONTEND,
        control=str(paths.engine_control),
    )
    engine = await start_child("the engine", engine_argv(config, paths.run / "engine.json"), paths.log / "engine.log")
    state.process("engine", engine.pid)
    async with background() as tasks:
        tasks.start_soon(engine.follow_output)
        try:
            client = EngineClient(paths.engine_control)
            await wait_ready(engine, client, paths.volume)
            yield client
        finally:
            with trio.CancelScope(shield=True):
                await engine.stop(STOP_TIMEOUT)
                await engine.aclose()


@contextlib.asynccontextmanager
async def block_device(paths: VolumePaths, report: Reporter, wanted: str) -> AsyncIterator[str]:
    """Attach a volume that nobody uses as a loop device. SIGINT, SIGTERM and SIGHUP cancel the block.

    Raises VolumeBusyError, InterruptedProblem, EngineError, ShareManagerError.
    """
    async with _held(paths, report, wanted) as (state, _):
        async with attach(paths, report, state, Policy()) as attachment:
            yield attachment.device
        if attachment.broken is not None:
            raise attachment.fenced or RuntimeProblem(attachment.broken)
