"""`share-manager replica serve`: all replicas that a node holds, one process each, started again whenever it dies.

The record server says which those are. What it said last is kept on the node, so that replicas come up after a power
cut while it is away. Replica processes outlive this one when it is killed: the next one waits for their end before it
starts others in their place.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import msgspec
import trio

from engine.durable import replace_file
from engine.errors import EngineError, RecordError
from engine.record import VolumeRecord
from engine.secret import read_secret, volume_secret, write_secret
from engine.store import create_replica, read_identity
from share_manager.errors import ConflictError, DiskError, ReplicaProcessError
from share_manager.events import Reporter
from share_manager.node.hosted import Directory, Hosted, Preparation, changes, hosted_by, prepare
from share_manager.paths import RUN_ROOT
from share_manager.share import leftovers
from share_manager.share.background import Background, background
from share_manager.share.procfs import identify, processes_naming
from share_manager.share.replicas import STOP_TIMEOUT, ReplicaServer
from share_manager.share.session import leave_on_signals

POLL = 1.0
KNOWN = "replicas.json"


class RecordSource(Protocol):
    """Where the records of all volumes are."""

    def list_records(self) -> tuple[VolumeRecord, ...]:
        """Raises RecordError."""


class ReplicaState(msgspec.Struct, frozen=True, kw_only=True):
    """Of one that is hosted, or should be: `failure` says why it does not listen."""

    listening: bool = False
    failure: str = ""
    restarts: int = 0


class HostBusyError(ConflictError):
    def __init__(self, data_dir: Path) -> None:
        super().__init__(data_dir)
        self.data_dir = data_dir

    def __str__(self) -> str:
        return f"another `share-manager replica serve` runs for {self.data_dir}: stop it first"


class Workshop:
    """Where the process of one replica has its things."""

    def __init__(self, run: Path, log: Path) -> None:
        self.run = run
        self.log = log
        self.secret = run / "secret"

    def process(self, name: str, pid: int | None) -> None:
        """Nothing is noted: they are found by their arguments, which name `run`."""


class HostedServer:
    """A replica's process, or the one that an earlier run of ours left."""

    def __init__(self, one: Hosted, shop: Workshop) -> None:
        self.one = one
        self._shop = shop
        self._server = ReplicaServer(one.replica, shop)
        self._orphans = tuple(found for pid in processes_naming(shop.run) if (found := identify(pid)) is not None)
        self._life = trio.CancelScope()

    async def run(self, report: Reporter) -> None:
        with self._life:
            if self._orphans:
                report.emit("replica_found", f"replica {self._server.name} of an earlier run goes on", **self.told)
                await leftovers.gone(self._orphans, float("inf"))
                self._orphans = ()
            await self._server.supervise(report, self._shop)

    @property
    def state(self) -> ReplicaState:
        server = self._server
        return ReplicaState(
            listening=bool(self._orphans) or server.listening, failure=server.failure, restarts=server.restarts
        )

    @property
    def told(self) -> dict[str, Any]:
        return {"volume": self.one.volume, "replica": self.one.name, "address": self.one.address}

    async def started(self) -> str:
        """Why it does not run, or nothing."""
        with trio.move_on_after(STOP_TIMEOUT):
            if not self._orphans:
                await self._server.tried.wait()
        return "" if self._orphans or self._server.listening else self._server.failure

    async def stop(self) -> None:
        with trio.CancelScope(shield=True):
            self._life.cancel()
            await leftovers.ask(self._orphans, STOP_TIMEOUT)
            await self._server.stop()


class ReplicaHost:
    """`run` is its life."""

    def __init__(self, node: str, data_dir: Path, client: RecordSource, secret_file: Path, report: Reporter) -> None:
        self._node = node
        self._data_dir = data_dir
        self._client = client
        self._secret_file = secret_file
        self._report = report
        self._servers: dict[str, HostedServer] = {}
        self._refused: dict[str, str] = {}
        self._refused_states: dict[tuple[str, str], ReplicaState] = {}
        self._away = False
        token = hashlib.sha256(f"{data_dir}\0{node}".encode()).hexdigest()[:8]
        self._run_dir = RUN_ROOT / f"node-{node}-{token}"

    async def run(self) -> None:
        """Until SIGINT, SIGTERM or SIGHUP. Raises ShareManagerError, EngineError."""
        with self._lock():
            async with leave_on_signals(self._report, lambda: None), background() as tasks:
                try:
                    await self._follow(tasks)
                finally:
                    tasks.stop()
                    with trio.CancelScope(shield=True):
                        await self._stop(list(self._servers))
            shutil.rmtree(self._run_dir, ignore_errors=True)
            self._report.emit("stopped", "stopped", node=self._node)

    def states(self) -> dict[tuple[str, str], ReplicaState]:
        """By volume and name, how those are that were asked for."""
        hosted = {(one.one.volume, one.one.name): one.state for one in self._servers.values()}
        return self._refused_states | hosted

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        try:
            self._data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            fd = os.open(self._data_dir / ".lock-replicas", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DiskError(self._data_dir, error) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise HostBusyError(self._data_dir) from None
        finally:
            os.close(fd)

    async def _follow(self, tasks: Background) -> None:
        key = read_secret(self._secret_file)
        known = self._known()
        await self._host(known, key, tasks, certain=False)
        told = False
        while True:
            try:
                records = await trio.to_thread.run_sync(self._client.list_records, abandon_on_cancel=True)
            except RecordError as error:
                if not self._away:
                    self._report.warn("records_away", f"{error}; the replicas here go on", reason=str(error))
                self._away = True
            else:
                if self._away:
                    self._report.emit("records_back", "the record server answers again")
                self._away = False
                wanted = hosted_by(self._node, records, self._data_dir)
                await self._host(wanted, key, tasks, certain=True)
                if wanted != known:
                    await trio.to_thread.run_sync(self._remember, wanted)
                    known = wanted
            if not told and (known or not self._away):
                told = True
                names = [server.one.volume for server in self._servers.values()]
                self._report.emit("ready", f"replicas hosted: {len(names)}", node=self._node, volumes=names)
            await trio.sleep(POLL)

    def _known(self) -> dict[str, Hosted]:
        with contextlib.suppress(OSError, msgspec.DecodeError):
            return msgspec.json.decode((self._data_dir / KNOWN).read_bytes(), type=dict[str, Hosted])
        return {}

    def _remember(self, wanted: dict[str, Hosted]) -> None:
        try:
            replace_file(self._data_dir / KNOWN, msgspec.json.encode(wanted), mode=0o600)
        except OSError as error:
            raise DiskError(self._data_dir, error) from error

    async def _host(self, wanted: dict[str, Hosted], key: bytes, tasks: Background, *, certain: bool) -> None:
        """Run these and no others. What is not `certain` is from before a power cut: no directory is made on it."""
        stop, start = changes(wanted, {name: server.one for name, server in self._servers.items()})
        await self._stop(stop)
        names = {(one.volume, one.name) for one in wanted.values()}
        self._refused_states = {name: state for name, state in self._refused_states.items() if name in names}
        begun = []
        for name in start:
            one = wanted[name]
            try:
                found = await trio.to_thread.run_sync(self._look, one)
                chosen = prepare(one, found)
                if not certain and chosen is not Preparation.SERVE:
                    continue
                await trio.to_thread.run_sync(self._carry_out, one, chosen, key)
            except (EngineError, DiskError, ReplicaProcessError) as error:
                self._refused_states[one.volume, one.name] = ReplicaState(failure=str(error))
                if self._refused.get(name) != str(error):
                    self._refused[name] = str(error)
                    self._report.warn("replica_refused", str(error), volume=one.volume, replica=one.name)
                continue
            self._refused.pop(name, None)
            self._refused_states.pop((one.volume, one.name), None)
            server = self._servers[name] = HostedServer(one, self._shop(one))
            tasks.start_soon(server.run, self._report)
            begun.append(server)
        for server in begun:
            if problem := await server.started():
                self._report.warn("replica_refused", problem, **server.told)
            else:
                what = f"replica {server.one.name} of volume {server.one.volume} is up"
                self._report.emit("replica_started", what, **server.told)

    async def _stop(self, keys: list[str]) -> None:
        async with trio.open_nursery() as nursery:
            for key in keys:
                server = self._servers.pop(key)
                self._report.emit("replica_stopping", f"replica {server.one.name} stops", **server.told)
                nursery.start_soon(server.stop)

    def _shop(self, one: Hosted) -> Workshop:
        log = self._data_dir / "log" / one.volume
        return Workshop(self._run_dir / f"{one.volume}-{one.name}", log)

    def _look(self, one: Hosted) -> Directory:
        """Raises EngineError for a replica directory that cannot be read."""
        place = Path(one.directory)
        if not place.is_dir() or not any(place.iterdir()):
            return Directory.ABSENT
        identity = read_identity(place)
        return Directory.OURS if (identity.uuid, identity.replica) == (one.uuid, one.name) else Directory.FOREIGN

    def _carry_out(self, one: Hosted, chosen: Preparation, key: bytes) -> None:
        """Raises EngineError, DiskError, ReplicaProcessError."""
        place = Path(one.directory)
        if chosen is Preparation.REFUSE:
            raise ReplicaProcessError(
                one.name,
                f"{place} is not there, although the replica is in sync: mount its disk, or remove the replica"
                if not place.exists()
                else f"{place} does not hold this replica of volume {one.volume}",
            )
        if chosen in (Preparation.CREATE, Preparation.CREATE_REBUILDING):
            rebuilding = chosen is Preparation.CREATE_REBUILDING
            create_replica(
                place, volume=one.volume, uuid=one.uuid, replica=one.name, size=one.size, rebuilding=rebuilding
            )
        shop = self._shop(one)
        try:
            shop.run.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_secret(shop.secret, volume_secret(key, one.uuid))
        except OSError as error:
            raise DiskError(shop.run, error) from error
