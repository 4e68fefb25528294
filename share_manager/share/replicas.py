"""The replica servers of a volume on this machine: one process each, started again whenever it dies."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import trio

from engine.launch import ReplicaConfig, replica_argv
from engine.record import ReplicaRecord
from share_manager.errors import NoReplicaAvailableError
from share_manager.events import Reporter
from share_manager.paths import VolumePaths
from share_manager.share.background import background
from share_manager.share.child import Child, start_child
from share_manager.share.state import StateFile
from share_manager.share.supervise import Backoff

START_TIMEOUT = 15.0
STOP_TIMEOUT = 15.0


class ReplicaServer:
    """One replica's process, over all its lives. `restarts` counts those after the first."""

    def __init__(self, record: ReplicaRecord, paths: VolumePaths) -> None:
        self.record = record
        self.restarts = 0
        self.failure = ""
        self.tried = trio.Event()
        self.listening = False
        self._paths = paths
        self._child: Child | None = None

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def pid(self) -> int | None:
        return self._child.pid if self._child is not None and self._child.returncode is None else None

    async def supervise(self, report: Reporter, state: StateFile) -> None:
        """Keep it running until cancelled."""
        backoff = Backoff()
        while True:
            await self._live(report, state)
            pause = backoff.failed(trio.current_time())
            # said for the first failures, then once a minute or so: a directory that is broken stays broken
            if backoff.quick_failures < 3 or backoff.quick_failures % 4 == 0:
                again = f" again in {pause:.1f} s" if pause else " again"
                report.warn(
                    "replica_died", f"{self.failure}; starting it{again}", replica=self.name, reason=self.failure
                )
            await trio.sleep(pause)
            self.restarts += 1

    async def _live(self, report: Reporter, state: StateFile) -> None:
        socket = self._paths.replica_socket(self.name)
        config = ReplicaConfig(
            directory=self.record.directory, listen=self.record.address, secret_file=str(self._paths.secret)
        )
        try:
            socket.unlink(missing_ok=True)
            argv = replica_argv(config, self._paths.run / f"{self.name}.json")
            child = self._child = await start_child(f"replica {self.name}", argv, self._paths.log / f"{self.name}.log")
            state.process(self.name, child.pid)
        except OSError as error:
            self.failure = f"replica {self.name} cannot be started: {error}"
            self.tried.set()
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(child.follow_output)
            with trio.move_on_after(START_TIMEOUT):
                await child.spoke.wait()
            if child.said_event("listening") is not None:
                self.listening = True
                self.tried.set()
                if self.restarts:
                    report.emit("replica_started", f"replica {self.name} is up again", replica=self.name, pid=child.pid)
            elif child.returncode is None:
                # silent, or its output is closed and it is ending
                await child.stop(2.0)
            await child.wait()
            self.listening = False
            # what it printed last may still be in the pipe
            with trio.move_on_after(0.2):
                await child.closed.wait()
            self.failure = str(child.died())
            self.tried.set()
            await child.aclose()
            nursery.cancel_scope.cancel()

    async def stop(self) -> None:
        if self._child is not None:
            await self._child.stop(STOP_TIMEOUT)
            await self._child.aclose()


@contextlib.asynccontextmanager
async def run_replicas(
    replicas: tuple[ReplicaRecord, ...], paths: VolumePaths, report: Reporter, state: StateFile
) -> AsyncIterator[tuple[ReplicaServer, ...]]:
    """Start all; at least one must come up. Leaving the block asks them to close their directories.

    Raises NoReplicaAvailableError.
    """
    servers = tuple(ReplicaServer(record, paths) for record in replicas)
    async with background() as tasks:
        try:
            for server in servers:
                tasks.start_soon(server.supervise, report, state)
            for server in servers:
                await server.tried.wait()
            up = [server.name for server in servers if server.listening]
            if not up:
                reasons = "; ".join(server.failure for server in servers)
                raise NoReplicaAvailableError(paths.volume, f"no replica of volume {paths.volume} starts: {reasons}")
            report.emit("replicas_up", f"replicas up: {', '.join(up)}", replicas=up)
            yield servers
        finally:
            # before they are stopped, or the supervision would start them again
            tasks.stop()
            with trio.CancelScope(shield=True):
                async with trio.open_nursery() as stopping:
                    for server in servers:
                        stopping.start_soon(server.stop)
