"""The replica servers of a volume on this machine: one process each, started again whenever it dies."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Protocol

import trio

from engine.launch import ReplicaConfig, replica_argv
from engine.record import ReplicaRecord
from share_manager.errors import NoReplicaAvailableError, ReplicaProcessError
from share_manager.events import Reporter
from share_manager.paths import VolumePaths
from share_manager.share.background import Background, background
from share_manager.share.child import Child, start_child
from share_manager.share.state import StateFile
from share_manager.share.supervise import Backoff

START_TIMEOUT = 15.0
STOP_TIMEOUT = 15.0


class Workplace(Protocol):
    """Where a replica's process has its configuration, secret and log: a volume's paths, or those of a node."""

    @property
    def run(self) -> Path: ...

    @property
    def secret(self) -> Path: ...

    @property
    def log(self) -> Path: ...


class Processes(Protocol):
    """Who takes note of processes, for those that clear up after a crash."""

    def process(self, name: str, pid: int | None) -> None: ...


class ReplicaServer:
    """One replica's process, over all its lives. `restarts` counts those after the first."""

    def __init__(self, record: ReplicaRecord, paths: Workplace) -> None:
        self.record = record
        self.restarts = 0
        self.failure = ""
        self.tried = trio.Event()
        self.listening = False
        self._paths = paths
        self._child: Child | None = None
        self._life = trio.CancelScope()

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def known(self) -> bool:
        return True

    @property
    def pid(self) -> int | None:
        return self._child.pid if self._child is not None and self._child.returncode is None else None

    async def supervise(self, report: Reporter, state: Processes) -> None:
        """Keep it running until it is stopped, or cancelled."""
        with self._life:
            await self._supervise(report, state)

    async def _supervise(self, report: Reporter, state: Processes) -> None:
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

    async def _live(self, report: Reporter, state: Processes) -> None:
        config = ReplicaConfig(
            directory=self.record.directory, listen=self.record.address, secret_file=str(self._paths.secret)
        )
        try:
            scheme, _, path = self.record.address.partition(":")
            if scheme == "unix":
                Path(path).unlink(missing_ok=True)
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
        """For good."""
        self._life.cancel()
        if self._child is not None:
            await self._child.stop(STOP_TIMEOUT)
            await self._child.aclose()


class ReplicaServers:
    """Those of one volume; more can be started, and some stopped, at any time."""

    def __init__(self, paths: VolumePaths, report: Reporter, state: StateFile, tasks: Background) -> None:
        self._paths = paths
        self._report = report
        self._state = state
        self._tasks = tasks
        self._servers: dict[str, ReplicaServer] = {}

    def __iter__(self) -> Iterator[ReplicaServer]:
        return iter(list(self._servers.values()))

    def begin(self, record: ReplicaRecord) -> ReplicaServer:
        server = self._servers[record.name] = ReplicaServer(record, self._paths)
        self._tasks.start_soon(server.supervise, self._report, self._state)
        return server

    async def start(self, name: str, directory: Path) -> None:
        """Serve a directory at the address of this replica. Raises ReplicaProcessError; then it is not kept."""
        if name in self._servers:
            raise ReplicaProcessError(name, "it has a server already")
        address = f"unix:{self._paths.replica_socket(name)}"
        server = self.begin(ReplicaRecord(name=name, address=address, directory=str(directory)))
        await server.tried.wait()
        if not server.listening:
            await self.stop(name)
            raise ReplicaProcessError(name, server.failure)
        self._report.emit("replica_started", f"replica {name} is up", replica=name, pid=server.pid)

    async def stop(self, name: str) -> None:
        """Harmless when there is none."""
        server = self._servers.pop(name, None)
        if server is not None:
            with trio.CancelScope(shield=True):
                await server.stop()
                self._state.process(name, None)

    async def stop_all(self) -> None:
        async with trio.open_nursery() as stopping:
            for server in self:
                stopping.start_soon(server.stop)


@contextlib.asynccontextmanager
async def run_replicas(
    replicas: tuple[ReplicaRecord, ...], paths: VolumePaths, report: Reporter, state: StateFile
) -> AsyncIterator[ReplicaServers]:
    """Start all; at least one must come up. Leaving the block asks them to close their directories.

    Raises NoReplicaAvailableError.
    """
    async with background() as tasks:
        servers = ReplicaServers(paths, report, state, tasks)
        try:
            for record in replicas:
                servers.begin(record)
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
                await servers.stop_all()
