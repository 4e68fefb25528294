"""A share in a pod: its record is an object of the API, and it says of itself how it is.

The controller gave the volume to this instance before the pod existed. Whoever was given it since has another one, and
this share ends for good. The API server alone never stops it: while that is away it serves, and reports later.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path

import msgspec
import structlog
import trio

from engine.record import RecordStore, VolumeRecord
from engine.secret import read_secret, volume_secret, write_secret
from share_manager.errors import DiskError, FencedOffError
from share_manager.events import Reporter
from share_manager.kube.client import Client
from share_manager.kube.core import Lease, LeaseSpec
from share_manager.kube.errors import ExistsError, KubeError, NotFoundError
from share_manager.kube.leader import timestamp
from share_manager.kube.meta import ObjectMeta
from share_manager.kube.records import KubeRecords, LostHolderError, StorePlace
from share_manager.kube.resources import REPORT_ANNOTATION, VOLUME_LABEL, ShareReport, share_lease
from share_manager.paths import VolumePaths
from share_manager.share.background import background
from share_manager.share.drain import Door, door, drain
from share_manager.share.home import Hostings, Tenant
from share_manager.share.node import RemoteReplicas
from share_manager.share.records import Records, once_there
from share_manager.share.session import VolumeOptions
from share_manager.share.state import StateFile
from share_manager.share.status import NodeInfo, ShareStatus
from share_manager.share.warm import WarmEngine

log = structlog.get_logger()

LOOK = 0.5
REPORT_AGAIN = 20.0
"""Seconds between reports that say the same: 100 idle shares are 5 writes a second."""
REPORT_LEAST = 1.0
SECRET_NAME = "secret"
Beside = Callable[[Tenant], Awaitable[None]]


class PodOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`cluster_secret`: file with the secret that all nodes share. `port`: of the NFS server."""

    instance: str
    node: str
    place: StorePlace
    cluster_secret: Path
    port: int = 2049


class _HolderStore:
    """The volume's record; that it is another one's is final here."""

    def __init__(self, store: RecordStore, volume: str) -> None:
        self._store = store
        self._volume = volume

    def read(self) -> VolumeRecord:
        try:
            return self._store.read()
        except LostHolderError as error:
            raise FencedOffError(self._volume, str(error)) from error

    def swap(self, expected_version: int, new: VolumeRecord) -> None:
        try:
            self._store.swap(expected_version, new)
        except LostHolderError as error:
            raise FencedOffError(self._volume, str(error)) from error


class PodHome:
    """`client` is for reports. `beside` runs along with the share."""

    kind = "pod"
    node: NodeInfo | None = None
    lifeline = None

    def __init__(self, paths: VolumePaths, client: Client, options: PodOptions, beside: Beside) -> None:
        """Raises AccessError."""
        self._paths = paths
        self._client = client
        self._options = options
        self._beside = beside
        self._kube_records = KubeRecords(paths.volume, options.place)
        self._kube_records.store = _HolderStore(self._kube_records.marks, paths.volume)
        self.records: Records = self._kube_records
        self._unformatted = False
        self._door = Door(paths.volume, options.port, None)
        self._exported = trio.Event()
        self._reported: ShareReport | None = None
        self._reported_at = -REPORT_AGAIN

    async def open(self, options: VolumeOptions, report: Reporter) -> tuple[VolumeRecord, bool]:
        """The record exists, and is ours. Waits for an API server that is away. Raises FencedOffError."""
        record = await once_there(partial(trio.to_thread.run_sync, self.records.store.read), report)
        try:
            self._paths.log.mkdir(parents=True, exist_ok=True, mode=0o700)
            key = volume_secret(read_secret(self._options.cluster_secret), record.uuid)
            write_secret(self._paths.secret, key)
        except OSError as error:
            raise DiskError(self._paths.directory, error) from error
        return record, False

    @contextlib.asynccontextmanager
    async def replicas(self, record: VolumeRecord, report: Reporter, state: StateFile) -> AsyncIterator[Hostings]:
        yield RemoteReplicas(record.replicas)

    async def tenure(self, share: Tenant, state: StateFile, serve: Callable[[], Awaitable[None]]) -> None:
        assert share.network is not None
        with door(self._paths.volume, self._options.port, share.network.namespace) as self._door:
            async with background() as tasks:
                tasks.start_soon(self._report, share)
                tasks.start_soon(self._beside, share)
                await serve()

    async def before_mount(self) -> None:
        self._unformatted = await trio.to_thread.run_sync(self._kube_records.marks.unformatted)
        if self._unformatted:
            self._paths.formatting.write_text("")
        else:
            self._paths.formatting.unlink(missing_ok=True)

    async def before_export(self, recovery_root: Path) -> None:
        pass

    async def may_export(self) -> None:
        self._door.open()
        if self._unformatted:
            # before any client can write
            await trio.to_thread.run_sync(self._kube_records.marks.formatted)

    def take_warm(self) -> WarmEngine | None:
        return None

    def exported(self, epoch: int) -> None:
        self._exported.set()

    async def drain(self, pid: int) -> None:
        if not await drain(self._door, self._options.port, pid):
            log.warning("requests were under way when the server was stopped", pid=pid)

    def silence(self) -> None:
        pass

    # reports

    async def _report(self, share: Tenant) -> None:
        while True:
            said = report_of(await share.status(), self._options)
            now = trio.current_time()
            urgent = self._reported is None or said.state != self._reported.state
            changed = said != self._reported and now - self._reported_at >= REPORT_LEAST
            if urgent or changed or now - self._reported_at >= REPORT_AGAIN:
                try:
                    await self._write(said)
                except KubeError as error:
                    log.info("not reported", reason=str(error))
                else:
                    self._reported, self._reported_at = said, now
            self._exported = trio.Event()
            with trio.move_on_after(LOOK):
                await self._exported.wait()

    async def _write(self, said: ShareReport) -> None:
        name = share_lease(self._paths.volume)
        text = msgspec.json.encode(said).decode()
        meta = {"annotations": {REPORT_ANNOTATION: text}, "labels": {VOLUME_LABEL: self._paths.volume}}
        spec = {"holderIdentity": said.instance, "renewTime": timestamp()}
        found: Lease | None = None
        try:
            found = await self._client.get(Lease, name)
        except NotFoundError:
            made = ObjectMeta(
                name=name, labels={VOLUME_LABEL: self._paths.volume}, annotations={REPORT_ANNOTATION: text}
            )
            with contextlib.suppress(ExistsError):
                await self._client.create(
                    Lease(metadata=made, spec=LeaseSpec(holder_identity=said.instance, renew_time=timestamp()))
                )
                return
        # the report of a newer instance is not overwritten by one that does not know yet that it was replaced
        if found is not None and found.spec.holder_identity not in ("", said.instance) and self._reported is not None:
            return
        await self._client.patch(Lease, name, {"metadata": meta, "spec": spec})


def report_of(status: ShareStatus, options: PodOptions) -> ShareReport:
    return ShareReport(
        instance=options.instance,
        node=options.node,
        state=status.state,
        epoch=status.epoch,
        clients=len(status.clients),
        grace_ends=_time(status.grace_ends_at) if status.in_grace else "",
        phases=status.phases,
        failure=status.last_failure[:500] if status.state != "running" else "",
    )


def _time(seconds: float | None) -> str:
    if not seconds:
        return ""
    return datetime.datetime.fromtimestamp(int(seconds), datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
