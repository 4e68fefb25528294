"""Where a share's record and replicas come from, and when it may serve: this machine alone, or several nodes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Protocol

from engine.record import ReplicaRecord, VolumeRecord
from share_manager.events import Reporter
from share_manager.paths import VolumePaths
from share_manager.share.lifeline import Lifeline
from share_manager.share.network import ShareNetwork
from share_manager.share.records import FileRecords, Records
from share_manager.share.replicas import run_replicas
from share_manager.share.session import VolumeOptions, open_or_create
from share_manager.share.state import StateFile
from share_manager.share.status import NodeInfo, ShareStatus
from share_manager.share.warm import WarmEngine


class Hosting(Protocol):
    """A replica as whoever uses it sees it. `pid`, `failure` and `restarts` of its process where that is ours; `known`:
    we would know if it did not run."""

    @property
    def name(self) -> str: ...

    @property
    def record(self) -> ReplicaRecord: ...

    @property
    def pid(self) -> int | None: ...

    @property
    def known(self) -> bool: ...

    @property
    def listening(self) -> bool: ...

    @property
    def failure(self) -> str: ...

    @property
    def restarts(self) -> int: ...


class Hostings(Protocol):
    """Those of a volume. Starting and stopping raise ShareManagerError."""

    def __iter__(self) -> Iterator[Hosting]: ...

    async def start(self, name: str, directory: Path) -> None: ...

    async def stop(self, name: str) -> None: ...


class Tenant(Protocol):
    """The share, for its home. `network` is there from before it is opened."""

    state: str
    network: ShareNetwork | None

    async def status(self) -> ShareStatus: ...

    def begin(self) -> None:
        """Another tenure: nothing of the one before counts."""

    async def header(self) -> bytes:
        """Of the LUKS device that is served, as much as it takes to open it; empty when there is none."""

    @property
    def needs_header(self) -> bool:
        """Whether what is known of an encrypted volume does not open it yet."""

    async def learn(self, header: bytes) -> None:
        """Derive the volume key, which takes seconds, from what another node has of the header."""


class Home(Protocol):
    """`kind` is what `status` calls it. All raise ShareManagerError, EngineError."""

    @property
    def kind(self) -> str: ...

    @property
    def records(self) -> Records: ...

    @property
    def node(self) -> NodeInfo | None: ...

    @property
    def lifeline(self) -> Lifeline | None:
        """With one, no NFS server outlives this process, and what it had is given up at once."""

    async def open(self, options: VolumeOptions, report: Reporter) -> tuple[VolumeRecord, bool]:
        """The volume's record, and whether the volume was made now."""

    def replicas(
        self, record: VolumeRecord, report: Reporter, state: StateFile
    ) -> AbstractAsyncContextManager[Hostings]: ...

    async def tenure(self, share: Tenant, state: StateFile, serve: Callable[[], Awaitable[None]]) -> None:
        """Serve while it is ours to serve. Cancelling `serve` leaves in order."""

    async def before_mount(self) -> None:
        """Attached: what is known of the volume on this node becomes what is known of it anywhere."""

    async def before_export(self, recovery_root: Path) -> None:
        """Before a server is started for the first time on this attachment. The records of its clients are in there."""

    async def may_export(self) -> None:
        """Mounted, with the right to serve; returns when clients may be served."""

    def take_warm(self) -> WarmEngine | None:
        """An engine for the next attachment, if one waits; it is the caller's from now on."""

    def exported(self, epoch: int) -> None:
        """Clients are served from here on, again after each repair."""

    async def drain(self, pid: int) -> None:
        """Before a healthy server is silenced: wait for what is under way in it."""

    def silence(self) -> None:
        """Before the server ends: no client is to hear that it goes. Must not fail or block; once more is harmless."""


class LocalHome:
    """One machine, which keeps the record and all replicas, and serves when it is told to."""

    kind = "serve"
    node = None
    lifeline = None

    def __init__(self, paths: VolumePaths) -> None:
        self.records: Records = FileRecords(paths)
        self._paths = paths

    async def open(self, options: VolumeOptions, report: Reporter) -> tuple[VolumeRecord, bool]:
        return open_or_create(self._paths, options, report)

    @asynccontextmanager
    async def replicas(self, record: VolumeRecord, report: Reporter, state: StateFile) -> AsyncIterator[Hostings]:
        async with run_replicas(record.replicas, self._paths, report, state) as servers:
            yield servers

    async def tenure(self, share: Tenant, state: StateFile, serve: Callable[[], Awaitable[None]]) -> None:
        await serve()

    async def before_mount(self) -> None:
        pass

    async def before_export(self, recovery_root: Path) -> None:
        pass

    async def may_export(self) -> None:
        pass

    def take_warm(self) -> WarmEngine | None:
        return None

    def exported(self, epoch: int) -> None:
        pass

    async def drain(self, pid: int) -> None:
        pass

    def silence(self) -> None:
        pass
