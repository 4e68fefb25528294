"""The agent of a node: says that the node is alive, what addresses and disks it has, and serves its replicas.

Which replicas those are the records of the volumes say, as without Kubernetes (share_manager/node/host.py does it). The
objects of replicas are told how theirs are, and of one that is deleted the data goes only when it says so itself.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import structlog
import trio

from engine.durable import replace_file
from engine.errors import EngineError, RecordError
from engine.record import VolumeRecord as EngineRecord
from engine.store import read_identity
from share_manager.controllers.conditions import told
from share_manager.controllers.placement import DISK
from share_manager.controllers.storage_node import RENEW
from share_manager.errors import DiskError, ShareManagerError
from share_manager.events import Reporter
from share_manager.kube.client import Client
from share_manager.kube.core import Lease, LeaseSpec
from share_manager.kube.errors import ConflictError, ExistsError, KubeError, NotFoundError
from share_manager.kube.events import seconds_timestamp
from share_manager.kube.informer import Informer
from share_manager.kube.leader import timestamp
from share_manager.kube.meta import ObjectMeta
from share_manager.kube.records import to_engine
from share_manager.kube.resources import (
    FINALIZER,
    Disk,
    DiskStatus,
    RecordedReplica,
    Replica,
    ReplicaStatus,
    StorageNode,
    StorageNodeSpec,
    Volume,
    VolumeRecord,
    node_lease,
)
from share_manager.node.addresses import of_this_host
from share_manager.node.host import ReplicaHost, ReplicaState
from share_manager.pods.orphans import ObjectsCopy, copy_of, find_orphans, keep

log = structlog.get_logger()

LOOK = 0.5
DISKS_EVERY = 30.0
MARKER = "disk-uuid"
_GRAIN = 1 << 30


class AgentOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`address`: where replicas listen, an address of this host that other nodes reach."""

    node: str
    address: str
    data_dir: Path
    cluster_secret: Path


class RecordsOfTheNode:
    """What `ReplicaHost` asks: the records, without the replicas that are to go."""

    def __init__(self, records: Informer[VolumeRecord], replicas: Informer[Replica]) -> None:
        self._records = records
        self._replicas = replicas

    def list_records(self) -> tuple[EngineRecord, ...]:
        """Raises RecordError while nothing was heard yet."""
        if not self._records.synced.is_set() or not self._replicas.synced.is_set():
            raise RecordError("the API server has not told yet which replicas there are")
        going = {(one.spec.volume, one.spec.replica) for one in self._replicas.store.all() if one.deleting}
        return tuple(_without(to_engine(one), going) for one in self._records.store.all())


def _without(record: EngineRecord, going: set[tuple[str, str]]) -> EngineRecord:
    left = tuple(one for one in record.replicas if (record.volume, one.name) not in going)
    return msgspec.structs.replace(record, replicas=left)


class Agent:
    """`run` is its life."""

    def __init__(self, client: Client, options: AgentOptions, report: Reporter) -> None:
        self._client = client
        self._options = options
        self._records = Informer(client, VolumeRecord)
        self._replicas = Informer(client, Replica)
        self._volumes = Informer(client, Volume)
        self._kept: dict[Path, ObjectsCopy] = {}
        self._claims: frozenset[tuple[str, str]] = frozenset()
        self._claims_changed = trio.Event()
        source = RecordsOfTheNode(self._records, self._replicas)
        self.host = ReplicaHost(options.node, options.data_dir, source, options.cluster_secret, report)

    async def run(self) -> None:
        """Until SIGINT or SIGTERM. Raises ShareManagerError, EngineError."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._records.run)
            nursery.start_soon(self._replicas.run)
            nursery.start_soon(self._volumes.run)
            nursery.start_soon(self._beat)
            nursery.start_soon(self._tell_node)
            nursery.start_soon(self._tell_replicas)
            await self.host.run()
            nursery.cancel_scope.cancel()

    async def _beat(self) -> None:
        name = node_lease(self._options.node)
        while True:
            began = trio.current_time()
            try:
                await self._client.patch(Lease, name, {"spec": {"renewTime": timestamp()}})
            except NotFoundError:
                with contextlib.suppress(KubeError):
                    spec = LeaseSpec(holder_identity=self._options.node, renew_time=timestamp())
                    await self._client.create(Lease(metadata=ObjectMeta(name=name), spec=spec))
            except KubeError as error:
                log.info("no sign of life given", reason=str(error))
                await trio.sleep(0.2)
                continue
            await trio.sleep_until(began + RENEW)

    async def _tell_node(self) -> None:
        while True:
            try:
                await self._register()
            except KubeError as error:
                log.warning("node not told of", reason=str(error))
                await trio.sleep(1.0)
                continue
            with trio.move_on_after(DISKS_EVERY):
                await self._claims_changed.wait()
            self._claims_changed = trio.Event()

    async def _register(self) -> None:
        name = self._options.node
        found = await self._client.find(StorageNode, name)
        if found is None:
            disks = {DISK: Disk(path=str(self._options.data_dir))}
            new = StorageNode(metadata=ObjectMeta(name=name), spec=StorageNodeSpec(disks=disks))
            with contextlib.suppress(ExistsError):
                await self._client.create(new)
            found = await self._client.get(StorageNode, name)
        disk = await trio.to_thread.run_sync(look_at_disk, self._options.data_dir)
        await self._replicas.synced.wait()
        await self._records.synced.wait()
        orphans = await trio.to_thread.run_sync(find_orphans, self._options.data_dir, self._claimed())
        status = msgspec.structs.replace(
            found.status,
            addresses=await addresses(),
            replica_address=self._options.address,
            disks={DISK: disk},
            orphans=orphans,
            observed_generation=found.metadata.generation,
        )
        # not the conditions, which are the controller's
        body = {
            "addresses": list(status.addresses),
            "replicaAddress": status.replica_address,
            "disks": {name: msgspec.to_builtins(one) for name, one in status.disks.items()},
            "orphans": msgspec.to_builtins(status.orphans),
        }
        if status != found.status:
            await self._client.patch(StorageNode, name, {"status": body}, subresource="status")

    def _claimed(self) -> frozenset[tuple[str, str]]:
        """Uuid of the volume and name, of replicas that an object and a record know."""
        return frozenset(
            (one.spec.volume_uuid, one.spec.replica)
            for one in self._replicas.store.all()
            if self._record(one) is not None
        )

    async def _tell_replicas(self) -> None:
        await self._replicas.synced.wait()
        await self._records.synced.wait()
        while True:
            states = self.host.states()
            if (claims := self._claimed()) != self._claims:
                self._claims = claims
                self._claims_changed.set()
            for one in self._replicas.store.all():
                if one.spec.node != self._options.node:
                    continue
                try:
                    await self._tell_replica(one, states.get((one.spec.volume, one.spec.replica)))
                except (ConflictError, NotFoundError):
                    # it changed meanwhile, and is looked at again
                    continue
                except (KubeError, DiskError, EngineError) as error:
                    log.warning("replica not told of", replica=one.name, reason=str(error))
            await trio.sleep(LOOK)

    async def _tell_replica(self, one: Replica, state: ReplicaState | None) -> None:
        if one.deleting:
            if state is None and FINALIZER in one.metadata.finalizers:
                await self._let_go(one)
            return
        record = self._record(one)
        if record is not None and state is not None and state.listening:
            await self._keep_copy(one, record)
        status = replica_status(one, record, state, now=seconds_timestamp())
        await self._client.update_status(one, msgspec.structs.replace(one, status=status))

    async def _keep_copy(self, one: Replica, record: VolumeRecord) -> None:
        volume = self._volumes.store.get(record.key)
        recorded = _recorded(one, record)
        if volume is None or recorded is None:
            return
        place, copy = self._options.data_dir / recorded.directory, copy_of(volume, record)
        if self._kept.get(place) == copy:
            return
        try:
            await trio.to_thread.run_sync(keep, place, copy)
        except OSError as error:
            log.warning("no copy of its objects is kept", replica=one.name, reason=str(error))
        # a full disk is not tried again at every look
        self._kept[place] = copy

    def _record(self, one: Replica) -> VolumeRecord | None:
        return self._records.store.get(f"{one.metadata.namespace}/{one.spec.volume}")

    async def _let_go(self, one: Replica) -> None:
        """Its server has ended."""
        recorded = _recorded(one, self._record(one))
        directory = recorded.directory if recorded is not None else one.status.directory
        if one.spec.erase and directory:
            place = self._options.data_dir / directory
            await trio.to_thread.run_sync(erase, place, self._options.data_dir, one.spec.volume_uuid)
        left = [name for name in one.metadata.finalizers if name != FINALIZER]
        await self._client.patch(
            Replica, one.name, {"metadata": {"finalizers": left or None}}, version=one.metadata.resource_version
        )


def _recorded(one: Replica, record: VolumeRecord | None) -> RecordedReplica | None:
    return next((each for each in record.spec.replicas if each.name == one.spec.replica), None) if record else None


def replica_status(one: Replica, record: VolumeRecord | None, state: ReplicaState | None, *, now: str) -> ReplicaStatus:
    recorded = _recorded(one, record)
    before = one.status
    if state is not None and state.listening:
        value, status, reason, message = "running", "True", "Serving", "its server answers"
    elif state is not None and state.failure:
        value, status, reason, message = "failed", "False", "Failed", state.failure
    else:
        value, status, reason, message = "pending", "False", "Starting", "its server has not come up yet"
    conditions = told(before.conditions, "Serving", status, reason, message, now=now)  # type: ignore[arg-type]
    changes: dict[str, Any] = {"state": value, "conditions": conditions, "restarts": state.restarts if state else 0}
    if recorded is not None:
        changes |= {"address": recorded.address, "directory": recorded.directory}
    return msgspec.structs.replace(before, **changes)


async def addresses() -> tuple[str, ...]:
    """All that other machines may see this one by; the node plugin of CSI says the same."""
    try:
        return await of_this_host()
    except (ShareManagerError, msgspec.DecodeError) as error:
        log.warning("addresses not known", reason=str(error))
        return ()


def look_at_disk(directory: Path) -> DiskStatus:
    """In whole GiB, as every other number would be another write."""
    try:
        marker = directory / MARKER
        if not marker.exists():
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            replace_file(marker, f"{uuid.uuid4()}\n".encode())
        found = os.statvfs(directory)
        total, available = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
        return DiskStatus(
            uuid=marker.read_text().strip()[:64],
            total=total // _GRAIN * _GRAIN,
            available=available // _GRAIN * _GRAIN,
        )
    except OSError as error:
        return DiskStatus(problem=error.strerror or str(error))


def erase(place: Path, data_dir: Path, volume_uuid: str) -> None:
    """Remove a replica's directory, if it is below `data_dir` and that volume's. Raises DiskError, EngineError."""
    if data_dir.resolve() not in place.resolve().parents:
        raise DiskError(place, OSError(0, f"it is not below {data_dir}, so it is not erased"))
    if not place.exists():
        return
    if any(place.iterdir()) and read_identity(place).uuid != volume_uuid:
        raise DiskError(place, OSError(0, "it holds another volume, so it is not erased"))
    try:
        shutil.rmtree(place)
    except OSError as error:
        raise DiskError(place, error) from error
    _remove_empty(place.parents, data_dir)


def _remove_empty(parents: Iterable[Path], data_dir: Path) -> None:
    for parent in parents:
        if parent == data_dir:
            return
        try:
            parent.rmdir()
        except OSError:
            return
