"""`share-manager volume adopt`: a volume whose objects, or whose record, were deleted, from its replicas' directories.

Which replicas hold everything only the last record knew. Each directory has a copy of it, which may be behind; the
newest copy is believed when all replicas that it names in sync are there, and none of those that are there has served
an attachment that it does not know. Otherwise somebody has to say that what is missing is lost.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import trio

from share_manager.errors import AdoptionError, VolumeExistsError
from share_manager.kube.access import find_access
from share_manager.kube.client import Client
from share_manager.kube.resources import (
    FINALIZER,
    VOLUME_LABEL,
    OrphanedReplica,
    RecordedReplica,
    StorageNode,
    Volume,
    VolumeRecord,
    VolumeRecordSpec,
    VolumeSpec,
)
from share_manager.pods.orphans import FORMAT, ObjectsCopy

_T = TypeVar("_T")


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """A replica that nobody claims, on a node."""

    node: str
    orphan: OrphanedReplica


class Adoptable(msgspec.Struct, frozen=True, kw_only=True):
    """A volume of which there are replicas that nobody claims. `doubts`: why what they have may not be all."""

    volume: str
    uuid: str
    size_bytes: int
    epoch: int
    in_sync: tuple[str, ...]
    present: tuple[str, ...]
    doubts: tuple[str, ...]


class Adoption(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be made."""

    spec: VolumeSpec
    record: VolumeRecordSpec
    adoptable: Adoptable


def all_found(nodes: Sequence[StorageNode]) -> list[Found]:
    return [Found(node=node.name, orphan=orphan) for node in nodes for orphan in node.status.orphans]


def plan(uuid: str, found: Sequence[Found], addresses: Mapping[str, str]) -> Adoption:
    """Of the volume `uuid`; `addresses` are those of the nodes' replica servers. Raises AdoptionError."""
    here = [one for one in found if one.orphan.uuid == uuid]
    name = here[0].orphan.volume
    copies = [_read(name, one.orphan) for one in here]
    newest = max(copies, key=lambda copy: (copy.record.epoch, copy.record.version))
    record = newest.record
    present = {one.orphan.replica: one for one in here}
    recorded = {one.name: one for one in record.replicas}
    doubts = []
    for member in record.in_sync:
        where = recorded[member].node if member in recorded else "nobody knows where"
        if member not in present:
            doubts.append(f"replica {member} on {where} is not there, and may have been the last one in sync")
        elif present[member].orphan.rebuilding:
            doubts.append(f"replica {member} on {where} is incomplete")
    latest = max(one.orphan.epoch for one in here)
    if latest > record.epoch:
        doubts.append(
            f"a replica has seen epoch {latest}, the newest copy of the record is of epoch {record.epoch}: who was in "
            "sync may have changed since"
        )
    usable = tuple(member for member in record.in_sync if member in present and not present[member].orphan.rebuilding)
    adoptable = Adoptable(
        volume=name,
        uuid=uuid,
        size_bytes=record.size,
        epoch=max(latest, record.epoch),
        in_sync=usable,
        present=tuple(sorted(present)),
        doubts=tuple(doubts),
    )
    if not usable:
        raise AdoptionError(name, "none of its replicas that are there was in sync: bring a node back that has one")
    replicas = tuple(_moved(one, present.get(one.name), addresses) for one in record.replicas)
    changed = msgspec.structs.replace(
        record,
        epoch=adoptable.epoch + 1,
        version=record.version + 1,
        holder="",
        replicas=replicas,
        in_sync=usable,
    )
    return Adoption(spec=newest.spec, record=changed, adoptable=adoptable)


def _read(volume: str, orphan: OrphanedReplica) -> ObjectsCopy:
    try:
        copy = msgspec.json.decode(orphan.copy.encode(), type=ObjectsCopy)
    except msgspec.DecodeError as error:
        raise AdoptionError(volume, f"the copy of its record in {orphan.directory} is damaged: {error}") from error
    if copy.format > FORMAT:
        raise AdoptionError(
            volume, f"{orphan.directory} was written in format {copy.format}, this release knows up to {FORMAT}"
        )
    return copy


def _moved(recorded: RecordedReplica, found: Found | None, addresses: Mapping[str, str]) -> RecordedReplica:
    """Where it is now: a disk may have gone to another machine, a node may have another address."""
    node = found.node if found is not None else recorded.node
    directory = found.orphan.directory if found is not None else recorded.directory
    port = recorded.address.rpartition(":")[2]
    host = addresses.get(node)
    address = f"tcp:{host}:{port}" if host else recorded.address
    return RecordedReplica(name=recorded.name, node=node, address=address, directory=directory)


def bodies(adoption: Adoption) -> tuple[dict[str, Any], dict[str, Any]]:
    """The record and the volume. The record is made first: a volume that has one gets no new replicas."""
    name = adoption.adoptable.volume
    record = {
        "metadata": {"name": name, "labels": {VOLUME_LABEL: name}, "finalizers": [FINALIZER]},
        "spec": msgspec.to_builtins(adoption.record),
    }
    return record, {"metadata": {"name": name}, "spec": msgspec.to_builtins(adoption.spec)}


async def survey(client: Client) -> list[Adoptable]:
    """Raises KubeError, AdoptionError."""
    nodes = (await client.list(StorageNode)).items
    found = all_found(nodes)
    addresses = {node.name: node.status.replica_address for node in nodes}
    recorded = {one.spec.uuid for one in (await client.list(VolumeRecord)).items}
    taken = {one.name for one in (await client.list(Volume)).items}
    told = []
    for uuid in sorted({one.orphan.uuid for one in found}, key=lambda uuid: (_name(found, uuid), uuid)):
        if uuid in recorded and _name(found, uuid) in taken:
            continue
        try:
            one = plan(uuid, found, addresses).adoptable
            if one.volume in taken:
                doubts = (*one.doubts, f"there is another volume {one.volume} now")
                one = msgspec.structs.replace(one, doubts=doubts)
            told.append(one)
        except AdoptionError as error:
            here = [one.orphan for one in found if one.orphan.uuid == uuid]
            told.append(
                Adoptable(
                    volume=here[0].volume,
                    uuid=uuid,
                    size_bytes=here[0].size,
                    epoch=max(one.epoch for one in here),
                    in_sync=(),
                    present=tuple(sorted(one.replica for one in here)),
                    doubts=(error.reason,),
                )
            )
    return told


def _name(found: Sequence[Found], uuid: str) -> str:
    return next(one.orphan.volume for one in found if one.orphan.uuid == uuid)


async def adopt(client: Client, volume: str, *, uuid: str = "", accept_loss: bool = False) -> Adoption:
    """Raises KubeError, AdoptionError, VolumeExistsError."""
    existing, left = await client.find(Volume, volume), await client.find(VolumeRecord, volume)
    if existing is not None and (left is not None or existing.deleting or not existing.status.size):
        raise VolumeExistsError(volume)
    nodes = (await client.list(StorageNode)).items
    found = [one for one in all_found(nodes) if one.orphan.volume == volume]
    known = sorted({one.orphan.uuid for one in found if uuid in ("", one.orphan.uuid)})
    if not known:
        which = f" with the uuid {uuid}" if uuid else ""
        raise AdoptionError(volume, f"no node has a replica of it{which} that nobody claims (nodes look every 30 s)")
    if len(known) > 1:
        raise AdoptionError(volume, f"there were several of that name: choose with --uuid one of {', '.join(known)}")
    adoption = plan(known[0], found, {node.name: node.status.replica_address for node in nodes})
    record, body = bodies(adoption)
    if left is not None and (left.deleting or left.spec.uuid != known[0]):
        state = "is being deleted" if left.deleting else f"is another volume's, {left.spec.uuid}"
        raise AdoptionError(volume, f"there is a VolumeRecord of that name, which {state}")
    if left is None:
        if adoption.adoptable.doubts and not accept_loss:
            doubts = "; ".join(adoption.adoptable.doubts)
            raise AdoptionError(volume, f"{doubts}. If that is lost for good: --accept-loss")
        await client.create_json(VolumeRecord, record)
    if existing is None:
        await client.create_json(Volume, body)
    return adoption


def run_survey(kubeconfig: Path | None, namespace: str) -> list[Adoptable]:
    """Raises AccessError, KubeError, AdoptionError."""
    return trio.run(_with_client, kubeconfig, namespace, survey)


def run_adopt(kubeconfig: Path | None, namespace: str, volume: str, *, uuid: str, accept_loss: bool) -> Adoption:
    """Raises AccessError, KubeError, AdoptionError, VolumeExistsError."""
    return trio.run(
        _with_client, kubeconfig, namespace, partial(adopt, volume=volume, uuid=uuid, accept_loss=accept_loss)
    )


async def _with_client(kubeconfig: Path | None, namespace: str, work: Callable[[Client], Awaitable[_T]]) -> _T:
    async with Client(find_access(kubeconfig), namespace=namespace) as client:
        return await work(client)
