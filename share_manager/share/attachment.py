"""A volume as a block device: FUSE file, engine process, loop device, each undone in reverse order.

An attachment is never repaired, only replaced: when its engine is lost, `break_off` kills what could still answer a
client, fails every request that hangs, and ends the block that uses it.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import trio

from engine.client import EngineClient, EngineEvent, EngineStatus, EngineUnreachableError
from engine.errors import FrontendError
from engine.frontend import DEFAULT_FRONTEND
from engine.frontend.fuse_device import FuseDevice
from engine.launch import EngineExit
from engine.record import VolumeRecord
from share_manager.errors import (
    CannotUpgradeError,
    CommandError,
    FencedOffError,
    NotReadyError,
    RuntimeProblem,
    ShareManagerError,
    TimeoutProblem,
)
from share_manager.events import Reporter
from share_manager.paths import VolumePaths
from share_manager.share.background import Background, background
from share_manager.share.child import Child
from share_manager.share.engine_process import STOP_TIMEOUT, EngineStarter, Successor, failure, wait_ready
from share_manager.share.loop import attach_loop, detach_loop
from share_manager.share.records import FileRecords, Records
from share_manager.share.requests import EngineUpgraded
from share_manager.share.state import StateFile
from share_manager.share.supervise import Decision, Observed, Policy, decide, may_resume
from share_manager.share.warm import WarmEngine
from share_manager.units import format_left, format_rate, format_size

_STATUS_INTERVAL = 1.0
_REFRESH_PATIENCE = 0.5


class Attachment:
    """One epoch of a volume. `broken` says why it ended before it was left, None while it works."""

    def __init__(
        self,
        record: VolumeRecord,
        device: FuseDevice,
        engine: Child,
        client: EngineClient,
        starter: EngineStarter,
    ) -> None:
        self.record = record
        self.starter = starter
        self.tasks: Background
        self.successor: Successor | None = None
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

    def may_replace(self, exit_status: int, *, asked: bool) -> bool:
        """Whether another engine may go on in place of the one that ended so; `asked` to by an upgrade."""
        resumable = self.status is not None and self.status.resumable
        if self.leaving or self.broken is not None:
            return False
        if asked and resumable and exit_status == EngineExit.CLEAN:
            return True
        return may_resume(exit_status, resumable, self.resumed, trio.current_time())

    async def refresh(self) -> None:
        """Have `status` say how things are now, unless the engine is too busy to tell."""
        with contextlib.suppress(EngineUnreachableError):
            self.status = await self.client.status(timeout=_REFRESH_PATIENCE)

    async def upgrade(self) -> EngineUpgraded:
        """Have the engine that is installed now take over from the one that runs, while the file stays open.

        Raises NotReadyError, CannotUpgradeError, EngineError, ShareManagerError: nothing has changed then, or the
        engine was replaced as after a crash.
        """
        volume, before, incarnation = self.record.volume, self.engine, self.incarnation
        if self.leaving or self.broken is not None or self.status is None or self.successor is not None:
            raise NotReadyError(volume, "being repaired or changed")
        if not self.status.resumable:
            raise CannotUpgradeError(volume, self.status.frontend)
        successor = await self.starter.prepare(self.incarnation + 1)
        try:
            self.tasks.start_soon(successor.child.follow_output)
            await successor.prepared()
            self.status = await self.client.status()
            if self.status.state not in ("ready", "equalising") or self.incarnation != incarnation or self.leaving:
                raise NotReadyError(volume, "being repaired or changed")
            if self.status.busy:
                raise NotReadyError(volume, f"busy with {self.status.busy}")
        except BaseException:
            await successor.abandon()
            raise
        # no await in between: whatever ends the engine from here on, the successor goes on
        self.successor = successor
        began = trio.current_time()
        before.make_way()
        with trio.move_on_after(STOP_TIMEOUT):
            await before.wait()
        before.kill()
        await successor.ended.wait()
        if self.engine is not successor.child or self.engine.returncode is not None:
            raise RuntimeProblem(f"the new engine did not come up and was replaced in its turn: {successor.why()}")
        return EngineUpgraded(
            pid=self.engine.pid,
            before=before.pid,
            incarnation=self.incarnation,
            pause=trio.current_time() - began,
        )

    def failure(self) -> ShareManagerError:
        """Why the engine ended, as an error."""
        return failure(self.engine, self.record.volume)


@contextlib.asynccontextmanager
async def attach(
    paths: VolumePaths,
    report: Reporter,
    state: StateFile,
    policy: Policy,
    *,
    frontend: str = DEFAULT_FRONTEND,
    with_loop: bool = True,
    records: Records | None = None,
    warm: WarmEngine | None = None,
    right_lasts: float = 0.0,
) -> AsyncIterator[Attachment]:
    """Claim the next epoch and attach. `records`: where the volume's record is, its directory when not given. `warm`:
    an engine that has been waiting for this.

    The block may end early, without an exception, when the attachment breaks off: look at `broken` afterwards.
    Raises EngineError, ShareManagerError.
    """
    place = records or FileRecords(paths)
    with _fuse_file(paths, warm) as fuse:
        record = await trio.to_thread.run_sync(place.claim)
        state.update(epoch=record.epoch)
        if warm is None:
            starter = EngineStarter(paths, record, fuse, state, frontend, place, right_lasts)
            engine = await starter.start(incarnation=1)
        else:
            starter = warm.starter
            engine = await warm.begin(record)
        attachment = Attachment(record, fuse, engine, EngineClient(paths.engine_control), starter)
        async with _stopped_engine(attachment, report), background() as tasks:
            attachment.tasks = tasks
            if warm is None:
                tasks.start_soon(engine.follow_output)
            await _wait_ready(attachment)
            tasks.start_soon(_watch_exit, attachment, report)
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
def _fuse_file(paths: VolumePaths, warm: WarmEngine | None) -> Iterator[FuseDevice]:
    device = FuseDevice.open(paths.block_file) if warm is None else warm.fuse
    try:
        device.mount_here()
        yield device
    finally:
        # the descriptor first: a lazily unmounted file ends with its last user
        device.close()
        device.unmount()
        with contextlib.suppress(OSError):
            paths.block_file.unlink(missing_ok=True)


@contextlib.asynccontextmanager
async def _stopped_engine(attachment: Attachment, report: Reporter) -> AsyncIterator[None]:
    try:
        yield
    finally:
        attachment.leaving = True
        with trio.CancelScope(shield=True):
            if attachment.broken is not None:
                attachment.engine.kill()
            if not await attachment.engine.stop(STOP_TIMEOUT):
                report.warn("engine_killed", "the engine did not leave in time and was killed")
            await attachment.engine.aclose()
            if attachment.successor is not None:
                await attachment.successor.abandon()


async def _wait_ready(attachment: Attachment) -> None:
    """Raises NoReplicaAvailableError, FencedOffError, ProcessDiedError, TimeoutProblem."""

    def answered(status: EngineStatus) -> None:
        attachment.status = status
        attachment.last_answer = trio.current_time()

    await wait_ready(attachment.engine, attachment.client, attachment.record.volume, answered)


async def _watch_exit(attachment: Attachment, report: Reporter) -> None:
    """An engine that ended is replaced in place while that is safe, else the attachment ends."""
    while True:
        status = await attachment.engine.wait()
        successor, attachment.successor = attachment.successor, None
        if not attachment.may_replace(status, asked=successor is not None):
            if successor is not None:
                await successor.abandon()
            break
        await attachment.engine.aclose()
        attachment.incarnation += 1
        if successor is None:
            report.warn("engine_restarting", f"{attachment.failure()}; another one takes over its file")
            attachment.resumed.append(trio.current_time())
            with trio.CancelScope(shield=True):
                # once started it must be known, or nobody would stop it
                attachment.engine = await attachment.starter.start(attachment.incarnation, attachment.status)
            attachment.tasks.start_soon(attachment.engine.follow_output)
        else:
            attachment.engine = await successor.take_over(attachment.status)
        try:
            await _wait_ready(attachment)
        except TimeoutProblem:
            attachment.engine.kill()
        except ShareManagerError:
            continue
        else:
            if successor is None:
                report.emit(
                    "engine_resumed",
                    "another engine took over; unanswered requests were sent to it",
                    pid=attachment.engine.pid,
                )
        finally:
            if successor is not None:
                successor.ended.set()
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
                    if event.phase:
                        fields |= {"rate": event.rate, "left": event.left, "phase": event.phase}
                    message = describe(event)
                    tell = report.warn if event.event in ("replica_left", "fenced", "faulted") else report.emit
                    tell(event.event, message, **fields)
        await trio.sleep(0.5)


def describe(told: EngineEvent) -> str:
    """An engine's event in words; its own message where it has one."""
    event, replica, message = told.event, told.replica, told.message
    if event == "resync_progress":
        share = f"{100 * told.done // told.total} %" if told.total else format_size(told.done)
        rate = f", {format_rate(told.rate)}{format_left(told.left)}" if told.rate else ""
        return f"replica {replica}: resynchronised {share}{rate}"
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
                    await detach_loop(attachment.device, below=paths.run)
                except (TimeoutProblem, CommandError) as error:
                    # it can no longer write: the requests of whoever holds it fail from here on
                    attachment.break_off(str(error))
                    report.warn("loop_busy", f"{attachment.device} stays attached until its last user is gone: {error}")
