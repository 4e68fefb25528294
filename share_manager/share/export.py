"""The NFS server of a share: started, watched, started again in place, each time under a number never used before."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import msgspec
import trio

from ganesha import (
    EventKind,
    Export,
    Ganesha,
    GaneshaError,
    HealthError,
    NotReadyError,
    Reach,
    ServerConfig,
    Squash,
    StartError,
    StopError,
    consolidate,
    run_ganesha,
)
from share_manager.errors import GaveUpError, HandleError
from share_manager.events import Reporter
from share_manager.paths import VolumePaths
from share_manager.share.attachment import Attachment
from share_manager.share.connections import KeptConnections
from share_manager.share.filesystem import Mounted
from share_manager.share.lifeline import Lifeline
from share_manager.share.onvolume import on_volume
from share_manager.share.private import PrivateRoom
from share_manager.share.procfs import start_time
from share_manager.share.right import ServingRight
from share_manager.share.state import StateFile
from share_manager.share.supervise import Backoff, Decision, Observed, Policy, decide

READY_TIMEOUT = 30.0
STOP_TIMEOUT = 15.0
EXPORT_ID = 1
TOLD = (EventKind.GRACE_STARTED, EventKind.GRACE_ENDED, EventKind.CLIENT_EXPIRED, EventKind.RECORD_FAILED)


class ExportOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Times in seconds."""

    bind: str = "127.0.0.1"
    port: int = 2049
    allow: tuple[str, ...] = ()
    squash: Squash = "none"
    read_only: bool = False
    lease_lifetime: int = 20
    grace_period: int = 30


def server_config(options: ExportOptions, volume: str, identity: str, data: Path, recovery_root: Path) -> ServerConfig:
    export = Export(
        export_id=EXPORT_ID,
        path=data,
        pseudo=f"/{volume}",
        read_only=options.read_only,
        squash=options.squash,
        allow=options.allow,
    )
    return ServerConfig(
        identity=identity,
        bind=options.bind,
        port=options.port,
        lease_lifetime=options.lease_lifetime,
        grace_period=options.grace_period,
        recovery_root=recovery_root,
        exports=(export,),
    )


class Exporter:
    """`server` is the ganesha that serves now, None between two. `restarts` counts starts in place after the first
    of each attachment."""

    def __init__(
        self,
        config: ServerConfig,
        paths: VolumePaths,
        report: Reporter,
        state: StateFile,
        policy: Policy,
        right: ServingRight,
        kept: KeptConnections,
        silence: Callable[[], None] = lambda: None,
        drain: Callable[[int], Awaitable[None]] | None = None,
        lifeline: Lifeline | None = None,
    ) -> None:
        """`silence` is called before each end of a server that is foreseen: no client is to hear of it. Before that, of
        one that is healthy, `drain` with its pid: what clients have asked is to be answered."""
        self.server: Ganesha | None = None
        self.epoch = 0
        self.restarts = 0
        self._config = config
        self._right = right
        self._run_dir = paths.ganesha
        self._log_dir = paths.log
        self._report = report
        self._state = state
        self._policy = policy
        self._silence = silence
        self._drain = drain
        self._lifeline = lifeline
        self._kept = kept

    async def set_allowed(self, allow: Sequence[str]) -> None:
        """From now on, and in every later start. Raises GaneshaError."""
        exports = tuple(msgspec.structs.replace(export, allow=tuple(allow)) for export in self._config.exports)
        self._config = msgspec.structs.replace(self._config, exports=exports)
        if self.server is not None:
            await self.server.update_exports(exports)

    async def run(
        self,
        attachment: Attachment,
        mounted: Mounted,
        room: PrivateRoom,
        granted: trio.Event,
        on_ready: Callable[[], Awaitable[None]],
        on_lost: Callable[[], None],
    ) -> None:
        """Serve until cancelled, clients from when it is `granted`. What needs more than a new ganesha breaks the
        attachment off, which cancels this.

        Raises GaneshaError when the first start fails (when it hangs, the second), GaveUpError, OSError.
        """
        backoff = Backoff(stable_after=self._policy.stable_after)
        first, hung = True, False
        while True:
            try:
                reason = await self._serve_once(attachment, mounted, room, granted, on_ready)
                first = False
            except GaneshaError as error:
                if isinstance(error, StartError) and error.log is not None:
                    # it moves there when the runtime directory goes
                    error.log = self._log_dir / error.log.name
                # one that hangs may have met a machine that did; what is wrong with its configuration it would say
                hung = isinstance(error, NotReadyError) and not hung
                if first and not hung:
                    raise
                reason = str(error)
            finally:
                on_lost()
            pause = backoff.failed(trio.current_time())
            if backoff.quick_failures >= self._policy.give_up_after:
                raise GaveUpError(backoff.quick_failures, reason)
            again = f" in {pause:.1f} s" if pause else ""
            self._report.warn("ganesha_restarting", f"{reason}; starting ganesha again{again}", reason=reason)
            await trio.sleep(pause)
            self.restarts += 1

    async def _serve_once(
        self,
        attachment: Attachment,
        mounted: Mounted,
        room: PrivateRoom,
        granted: trio.Event,
        on_ready: Callable[[], Awaitable[None]],
    ) -> str:
        """One life of a ganesha; why it ended."""
        right = self._right
        # behind a shut gate it can start meanwhile
        early = right.network.gated and not granted.is_set()

        async def may_serve() -> None:
            await granted.wait()
            await right.regained()

        await on_volume(consolidate, room.recovery_root)
        self.epoch = await on_volume(room.take_ganesha_epoch)
        killers: list[Callable[[], None]] = []
        line = self._lifeline
        try:
            async with run_ganesha(
                self._config,
                run_dir=self._run_dir,
                epoch=self.epoch,
                keep_fds=(attachment.fuse.fd, *((line.server,) if line is not None else ())),
                stop_timeout=STOP_TIMEOUT,
                reach=Reach(right.network.namespace, right.network.mark),
                tied=line is not None,
                before_start=None if early else may_serve,
            ) as server:

                def kill() -> None:
                    self._fall_silent()
                    server.kill()

                right.kill = server.kill
                killers.append(kill)
                attachment.before_abort.append(kill)
                self._state.process("ganesha", server.pid)
                await server.wait_ready(READY_TIMEOUT)
                if not server.carries_uuid(EXPORT_ID, mounted.uuid):
                    raise HandleError(mounted.device)
                if line is not None:
                    line.require(server.pid)
                began = trio.current_time()
                await may_serve()
                if trio.current_time() - began > self._config.grace_period / 4:
                    server.kill()
                    return "its grace period went by while it could not be reached"
                self.server = server
                right.open()
                self._kept.reset()
                try:
                    await on_ready()
                    decision, reason = await self._watch(server, attachment, mounted, room)
                finally:
                    self.server = None
                    if trio.current_effective_deadline() == -math.inf and attachment.broken is None:
                        with trio.CancelScope(shield=True):
                            await self._let_finish(server)
                    self._fall_silent()
                if decision is Decision.REATTACH:
                    attachment.break_off(reason)
                    await trio.sleep_forever()
                if server.returncode is None:
                    # it hangs, so it would not listen to anything gentler
                    server.kill()
                return reason
        except StopError as error:
            await self._unhang(error, attachment)
            return str(error)
        finally:
            self.server = None
            self._kept.left()
            right.kill = None
            for kill in killers:
                with contextlib.suppress(ValueError):
                    attachment.before_abort.remove(kill)

    async def _let_finish(self, server: Ganesha) -> None:
        """One that is healthy, before it is silenced: what clients have asked is to be answered."""
        if server.returncode is not None:
            return
        if self._drain is not None:
            await self._drain(server.pid)
        await self._right.leave()

    def _fall_silent(self) -> None:
        """No client is to hear of the end. Does not wait or fail."""
        self._right.silence()
        self._silence()

    async def _unhang(self, error: StopError, attachment: Attachment) -> None:
        """Not even SIGKILL ends it: it waits for the disk. With its requests failed it dies before it can answer."""
        attachment.break_off(str(error))
        with trio.move_on_after(10, shield=True):
            while start_time(error.pid) is not None:  # noqa: ASYNC110 - its waiter has given up
                await trio.sleep(0.05)

    async def _watch(
        self, server: Ganesha, attachment: Attachment, mounted: Mounted, room: PrivateRoom
    ) -> tuple[Decision, str]:
        """Look until something has to be done."""
        policy = self._policy
        ended = trio.Event()
        misses = 0

        async def wait_for_exit() -> None:
            await server.wait()
            # before the kernel sends another word of it
            self._fall_silent()
            ended.set()

        async def follow_events() -> None:
            async for event in server.events:
                if event.kind in TOLD:
                    tell = self._report.warn if event.kind is EventKind.RECORD_FAILED else self._report.emit
                    tell(f"ganesha_{event.kind.value.replace('-', '_')}", f"ganesha: {event.message}")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_for_exit)
            nursery.start_soon(follow_events)
            nursery.start_soon(self._kept.follow, server.pid)
            while True:
                with trio.move_on_after(policy.null_interval):
                    await ended.wait()
                if server.returncode is None:
                    misses = 0 if await self._answers(server, ended) else misses + 1
                status = attachment.status
                if status is not None and status.state == "waiting":
                    # writes wait for the record store: a server that waits with them is not hung
                    misses = 0
                fault = mounted.fault() or room.fault()
                observed = Observed(
                    filesystem_fault=fault,
                    ganesha_exit=server.returncode,
                    missed_calls=misses,
                    right_lost_for=self._right.lost_for(),
                )
                decision, reason = decide(observed, policy)
                if decision is not Decision.NOTHING:
                    nursery.cancel_scope.cancel()
                    return decision, reason

    async def _answers(self, server: Ganesha, ended: trio.Event) -> bool:
        try:
            await server.null_call(self._policy.null_timeout)
        except HealthError:
            return ended.is_set()
        return True
