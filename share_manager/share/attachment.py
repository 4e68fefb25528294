"""A volume as a block device: FUSE file, engine process, loop device, each undone in reverse order.

An attachment is never repaired, only replaced: when its engine is lost, `break_off` kills what could still answer a
client, fails every request that hangs, and ends the block that uses it.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import trio

from engine.client import EngineClient, EngineStatus, EngineUnreachableError
from engine.errors import FrontendError
from engine.frontend import DEFAULT_FRONTEND
from engine.frontend.fuse_device import FuseDevice
from engine.launch import EngineConfig, EngineExit, engine_argv
from engine.record import FileRecordStore, VolumeRecord, bump_epoch
from share_manager.errors import (
    CommandError,
    FencedOffError,
    NoReplicaAvailableError,
    ShareManagerError,
    TimeoutProblem,
)
from share_manager.events import Reporter
from share_manager.paths import VolumePaths
from share_manager.share.background import Background, background
from share_manager.share.child import Child, start_child
from share_manager.share.loop import attach_loop, detach_loop
from share_manager.share.state import StateFile
from share_manager.share.supervise import Decision, Observed, Policy, decide, may_resume

ENGINE_START_TIMEOUT = 60.0
ENGINE_STOP_TIMEOUT = 20.0
_STATUS_INTERVAL = 1.0
READY_STATES = ("ready", "equalising", "waiting")


class Attachment:
    """One epoch of a volume. `broken` says why it ended before it was left, None while it works."""

    def __init__(self, record: VolumeRecord, device: FuseDevice, engine: Child, client: EngineClient) -> None:
        self.record = record
        self.fuse = device
        self.engine = engine
        self.client = client
        self.device = ""
        self.broken: str | None = None
        self.fenced: FencedOffError | None = None
        self.before_abort: list[Callable[[], None]] = []
        """What must be dead before hanging requests are failed."""
        self.status: EngineStatus | None = None
        self.incarnation = 1
        self.resumed: list[float] = []
        self.last_answer = trio.current_time()
        self.leaving = False
        self._body = trio.CancelScope()

    @property
    def epoch(self) -> int:
        return self.record.epoch

    def break_off(self, reason: str) -> None:
        if self.broken is not None:
            return
        self.broken = reason
        for kill in self.before_abort:
            kill()
        with contextlib.suppress(FrontendError):
            self.fuse.abort()
        self._body.cancel()

    def failure(self) -> ShareManagerError:
        """Why the engine ended, as an error."""
        status = self.engine.returncode
        if status == EngineExit.FENCED:
            return FencedOffError(self.record.volume, self.engine.reason())
        if status == EngineExit.NO_REPLICA:
            return NoReplicaAvailableError(self.record.volume, self.engine.reason())
        return self.engine.died()


@contextlib.asynccontextmanager
async def attach(
    paths: VolumePaths,
    report: Reporter,
    state: StateFile,
    policy: Policy,
    *,
    frontend: str = DEFAULT_FRONTEND,
    with_loop: bool = True,
) -> AsyncIterator[Attachment]:
    """Claim the next epoch and attach.

    The block may end early, without an exception, when the attachment breaks off: look at `broken` afterwards.
    Raises EngineError, ShareManagerError.
    """
    record = bump_epoch(FileRecordStore(paths.record))
    state.update(epoch=record.epoch)
    with _fuse_file(paths) as fuse:
        starter = _EngineStarter(paths, record, fuse, state, frontend)
        engine = await starter.start(incarnation=1)
        attachment = Attachment(record, fuse, engine, EngineClient(paths.engine_control))
        async with _stopped_engine(attachment, report), background() as tasks:
            tasks.start_soon(engine.follow_output)
            await _wait_ready(attachment)
            tasks.start_soon(_watch_exit, attachment, starter, report, tasks)
            tasks.start_soon(_follow_status, attachment, policy)
            tasks.start_soon(_forward_events, attachment, report)
            with attachment._body:
                if with_loop:
                    async with _loop_device(paths, attachment, report, state):
                        yield attachment
                else:
                    yield attachment
            attachment.leaving = True
    state.update(device="")


@contextlib.contextmanager
def _fuse_file(paths: VolumePaths) -> Iterator[FuseDevice]:
    device = FuseDevice.mount(paths.block_file)
    try:
        yield device
    finally:
        # the descriptor first: a lazily unmounted file ends with its last user
        device.close()
        device.unmount()
        with contextlib.suppress(OSError):
            paths.block_file.unlink(missing_ok=True)


class _EngineStarter:
    """Starts the engines of one attachment, one after the other, on the same file."""

    def __init__(
        self, paths: VolumePaths, record: VolumeRecord, fuse: FuseDevice, state: StateFile, frontend: str
    ) -> None:
        self._paths = paths
        self._record = record
        self._fuse = fuse
        self._state = state
        self._frontend = frontend

    async def start(self, incarnation: int, before: EngineStatus | None = None) -> Child:
        """The first engine, or the one that takes over where `before` was the last known of its predecessor."""
        paths = self._paths
        paths.engine_control.unlink(missing_ok=True)
        config = EngineConfig(
            record=str(paths.record),
            secret_file=str(paths.secret),
            epoch=self._record.epoch,
            incarnation=incarnation,
            resume=before is not None,
            instances={replica.name: replica.instance for replica in before.replicas} if before else {},
            frontend=self._frontend,
            fuse_fd=self._fuse.fd,
            block_file=str(paths.block_file),
            control=str(paths.engine_control),
        )
        argv = engine_argv(config, paths.run / "engine.json")
        engine = await start_child("the engine", argv, paths.log / "engine.log", pass_fds=(self._fuse.fd,))
        self._state.process("engine", engine.pid)
        return engine


@contextlib.asynccontextmanager
async def _stopped_engine(attachment: Attachment, report: Reporter) -> AsyncIterator[None]:
    try:
        yield
    finally:
        attachment.leaving = True
        with trio.CancelScope(shield=True):
            if attachment.broken is not None:
                attachment.engine.kill()
            if not await attachment.engine.stop(ENGINE_STOP_TIMEOUT):
                report.warn("engine_killed", "the engine did not leave in time and was killed")
            await attachment.engine.aclose()


async def _wait_ready(attachment: Attachment) -> None:
    """Raises NoReplicaAvailableError, FencedOffError, ProcessDiedError, TimeoutProblem."""
    pause = 0.01
    with trio.move_on_after(ENGINE_START_TIMEOUT):
        while attachment.engine.returncode is None:
            with contextlib.suppress(EngineUnreachableError):
                attachment.status = await attachment.client.status(timeout=1.0)
                attachment.last_answer = trio.current_time()
                if attachment.status.state in READY_STATES:
                    return
            await trio.sleep(pause)
            pause = min(pause * 1.5, 0.1)
        # what it printed last may still be on its way
        with trio.move_on_after(1.0):
            await attachment.engine.closed.wait()
        raise attachment.failure()
    raise TimeoutProblem("attaching the volume", ENGINE_START_TIMEOUT)


async def _watch_exit(attachment: Attachment, starter: _EngineStarter, report: Reporter, tasks: Background) -> None:
    """An engine that ended is replaced in place while that is safe, else the attachment ends."""
    while True:
        status = await attachment.engine.wait()
        resumable = attachment.status is not None and attachment.status.resumable
        if (
            attachment.leaving
            or attachment.broken is not None
            or not may_resume(status, resumable, attachment.resumed, trio.current_time())
        ):
            break
        report.warn("engine_restarting", f"{attachment.failure()}; another one takes over its file")
        attachment.resumed.append(trio.current_time())
        attachment.incarnation += 1
        await attachment.engine.aclose()
        with trio.CancelScope(shield=True):
            # once started it must be known, or nobody would stop it
            attachment.engine = await starter.start(attachment.incarnation, attachment.status)
        tasks.start_soon(attachment.engine.follow_output)
        try:
            await _wait_ready(attachment)
        except TimeoutProblem:
            attachment.engine.kill()
        except ShareManagerError:
            continue
        else:
            report.emit(
                "engine_resumed",
                "another engine took over; unanswered requests were sent to it",
                pid=attachment.engine.pid,
            )
    with trio.move_on_after(0.2):
        await attachment.engine.closed.wait()
    if not attachment.leaving:
        failure = attachment.failure()
        if isinstance(failure, FencedOffError):
            attachment.fenced = failure
        attachment.break_off(str(failure))


async def _follow_status(attachment: Attachment, policy: Policy) -> None:
    """Also while leaving, which an engine that hangs would stop."""
    while True:
        with contextlib.suppress(EngineUnreachableError):
            attachment.status = await attachment.client.status()
            attachment.last_answer = trio.current_time()
        silence = trio.current_time() - attachment.last_answer
        decision, reason = decide(Observed(engine_silent_for=silence), policy)
        if decision is Decision.REATTACH:
            attachment.break_off(reason)
        await trio.sleep(_STATUS_INTERVAL)


async def _forward_events(attachment: Attachment, report: Reporter) -> None:
    """What the engine tells of its replicas. `ready` is not repeated: the engine said so before the loop came."""
    known: dict[str, str] = {}
    while True:
        with contextlib.suppress(EngineUnreachableError, trio.BrokenResourceError):
            async with attachment.client.events() as events:
                async for event in events:
                    if event.event == "ready" or (
                        event.event == "replica_in_sync" and known.get(event.replica, event.event) == event.event
                    ):
                        known[event.replica] = event.event
                        continue
                    if event.replica:
                        known[event.replica] = event.event
                    fields: dict[str, Any] = {"replica": event.replica} if event.replica else {}
                    if event.total:
                        fields |= {"done_bytes": event.done, "total_bytes": event.total}
                    message = describe(event.event, event.replica, event.message, event.done, event.total)
                    tell = report.warn if event.event in ("replica_left", "fenced", "faulted") else report.emit
                    tell(event.event, message, **fields)
        await trio.sleep(0.5)


def describe(event: str, replica: str, message: str, done: int, total: int) -> str:
    """An engine's event in words; its own message where it has one."""
    if event == "resync_progress":
        share = f"{100 * done // total} %" if total else f"{done} bytes"
        return f"replica {replica}: resynchronised {share}"
    words = {
        "replica_left": "left the in-sync set",
        "replica_resyncing": "is being brought up to date",
        "replica_in_sync": "is in sync",
    }
    what = message if len(message.split()) > 1 else words.get(event, event.replace("_", " "))
    return f"replica {replica}: {what}" if replica else what


@contextlib.asynccontextmanager
async def _loop_device(
    paths: VolumePaths, attachment: Attachment, report: Reporter, state: StateFile
) -> AsyncIterator[None]:
    try:
        attachment.device = await attach_loop(paths.block_file, lambda device: state.update(device=device))
        yield
    finally:
        with trio.CancelScope(shield=True):
            if attachment.device:
                try:
                    await detach_loop(attachment.device)
                except (TimeoutProblem, CommandError) as error:
                    # it can no longer write: the requests of whoever holds it fail from here on
                    attachment.break_off(str(error))
                    report.warn("loop_busy", f"{attachment.device} stays attached until its last user is gone: {error}")
