"""Volume: its replicas, its record, its share and its address; and their end, data never before its owner."""

from __future__ import annotations

from typing import Any

import msgspec

from share_manager.controllers.actions import Action, Again, Change, Create, Remove, SetStatus, Tell
from share_manager.controllers.conditions import find, told
from share_manager.controllers.placement import place
from share_manager.controllers.service import service
from share_manager.kube.core import Service
from share_manager.kube.resources import (
    COMPONENT_LABEL,
    ERASE_ANNOTATION,
    FINALIZER,
    NODE_LABEL,
    SALVAGE_ANNOTATION,
    SHARE_COMPONENT,
    VOLUME_LABEL,
    Replica,
    ShareManager,
    StorageNode,
    Volume,
    VolumeRecord,
)


class VolumeSeen(msgspec.Struct, frozen=True, kw_only=True):
    """`replicas` are the volume's, `every` those of all volumes. `suspects`: nodes that may be dead. `busy`: a pod of
    its share exists."""

    volume: Volume
    record: VolumeRecord | None
    replicas: tuple[Replica, ...]
    share: ShareManager | None
    service: Service | None
    nodes: tuple[StorageNode, ...]
    every: tuple[Replica, ...]
    suspects: frozenset[str]
    busy: bool
    now: str


def decide(seen: VolumeSeen) -> list[Action]:
    if seen.volume.deleting:
        return _delete(seen)
    volume = seen.volume
    if FINALIZER not in volume.metadata.finalizers:
        return [Change(of=volume, patch={"metadata": {"finalizers": [*volume.metadata.finalizers, FINALIZER]}})]
    actions: list[Action] = []
    if seen.record is None and volume.status.size:
        # a new one would say that its replicas are empty, and all equal
        return _status(seen)
    if seen.record is None:
        actions += _begin(seen)
    else:
        actions += _keep_replicas(seen, seen.record)
        actions += _salvage(seen, seen.record)
    if seen.service is None:
        actions.append(Create(kind=Service, body=service(volume)))
    if seen.share is None:
        actions.append(Create(kind=ShareManager, body=_share(volume)))
    return [*actions, *_status(seen)]


def _labels(volume: Volume, **more: str) -> dict[str, str]:
    return {VOLUME_LABEL: volume.name, **more}


def _share(volume: Volume) -> dict[str, Any]:
    labels = _labels(volume) | {COMPONENT_LABEL: SHARE_COMPONENT}
    owner = msgspec.to_builtins(volume.reference(controller=True))
    return {
        "metadata": {
            "name": volume.name,
            "labels": labels,
            "finalizers": [FINALIZER],
            "ownerReferences": [owner],
        },
        "spec": {},
    }


def _begin(seen: VolumeSeen) -> list[Action]:
    """Replicas first, the record when all are placed: from then on it is the record that counts."""
    volume = seen.volume
    there = sorted((one for one in seen.replicas if not one.deleting), key=lambda one: one.spec.replica)
    missing = volume.spec.replicas - len(there)
    if missing > 0:
        taken = {one.spec.node for one in seen.replicas}
        found = place(missing, volume.spec.size, seen.nodes, seen.every, taken)
        if len(found.places) < missing:
            return []
        names = (f"r{number}" for number in range(1, 100))
        used = {one.spec.replica for one in seen.replicas}
        free = (name for name in names if name not in used)
        return [
            Create(
                kind=Replica,
                body=_replica(volume, next(free), where.node, where.disk, where.port, uuid=volume.metadata.uid),
            )
            for where in found.places
        ]
    addresses = {node.name: node.status.replica_address for node in seen.nodes}
    if any(not addresses.get(one.spec.node) for one in there):
        return [Again(after=1.0)]
    replicas = [
        {
            "name": one.spec.replica,
            "node": one.spec.node,
            "address": f"tcp:{addresses[one.spec.node]}:{one.spec.port}",
            "directory": f"replicas/{volume.name}-{volume.metadata.uid[:8]}/{one.spec.replica}",
        }
        for one in there
    ]
    body = {
        "metadata": {"name": volume.name, "labels": _labels(volume), "finalizers": [FINALIZER]},
        "spec": {
            "uuid": volume.metadata.uid,
            "size": volume.spec.size,
            "replicas": replicas,
            "inSync": [one["name"] for one in replicas],
            "unformatted": True,
        },
    }
    return [
        Create(kind=VolumeRecord, body=body),
        Tell(
            about=volume,
            type="Normal",
            reason="Created",
            message=f"replicas on {', '.join(str(one['node']) for one in replicas)}",
        ),
    ]


def _replica(volume: Volume, name: str, node: str, disk: str, port: int, *, uuid: str) -> dict[str, Any]:
    return {
        "metadata": {
            "name": f"{volume.name}-{name}",
            "labels": _labels(volume) | {NODE_LABEL: node[:63]},
            "finalizers": [FINALIZER],
        },
        "spec": {
            "volume": volume.name,
            "replica": name,
            "node": node,
            "disk": disk,
            "port": port,
            "size": volume.spec.size,
            "volumeUuid": uuid,
        },
    }


def _keep_replicas(seen: VolumeSeen, record: VolumeRecord) -> list[Action]:
    """A Replica whose object was deleted by mistake is there again: the record says that it exists."""
    there = {one.spec.replica for one in seen.replicas}
    return [
        Create(
            kind=Replica,
            body=_replica(
                seen.volume, one.name, one.node, "default", int(one.address.rpartition(":")[2]), uuid=record.spec.uuid
            ),
        )
        for one in record.spec.replicas
        if one.name not in there
    ]


def _salvage(seen: VolumeSeen, record: VolumeRecord) -> list[Action]:
    """Go on from the replica that an operator named, whatever the others may have had."""
    volume = seen.volume
    name = volume.metadata.annotations.get(SALVAGE_ANNOTATION)
    if not name:
        return []
    if name not in {one.name for one in record.spec.replicas}:
        names = ", ".join(one.name for one in record.spec.replicas)
        message = f"there is no replica {name!r}: name one of {names} in the annotation {SALVAGE_ANNOTATION}"
        return [Tell(about=volume, type="Warning", reason="SalvageRefused", message=message)]
    if seen.busy:
        message = "its share has a pod: it is salvaged when that is gone"
        return [Tell(about=volume, type="Warning", reason="SalvageWaits", message=message), Again(after=5.0)]
    done: list[Action] = []
    if record.spec.in_sync != (name,):
        spec = {"inSync": [name], "epoch": record.spec.epoch + 1, "version": record.spec.version + 1, "holder": None}
        done.append(Change(of=record, patch={"spec": spec}))
    # when we die in between, the same is decided again
    return [
        *done,
        Change(of=volume, patch={"metadata": {"annotations": {SALVAGE_ANNOTATION: None}}}),
        Tell(
            about=volume,
            type="Warning",
            reason="Salvaged",
            message=f"goes on from replica {name}; what only others had is lost",
        ),
    ]


def _status(seen: VolumeSeen) -> list[Action]:
    volume, record = seen.volume, seen.record
    before = volume.status
    conditions = before.conditions

    def tell(type_: str, status: bool | None, reason: str, message: str) -> None:
        nonlocal conditions
        value = "Unknown" if status is None else "True" if status else "False"
        conditions = told(
            conditions,
            type_,
            value,  # type: ignore[arg-type]
            reason,
            message,
            now=seen.now,
            generation=volume.metadata.generation,
        )

    if record is None and before.size:
        message = (
            f"there is no VolumeRecord {volume.name} any more, so nobody knows which replicas hold all of it. "
            f"`share-manager volume adopt {volume.name}` makes it anew, from the copies beside the replicas."
        )
        tell("Healthy", False, "RecordLost", message)
        lost = msgspec.structs.replace(before, state="faulted", robustness="faulted", conditions=conditions)
        told_so = Tell(about=volume, type="Warning", reason="RecordLost", message=message)
        return [*_set(volume, lost), *([told_so] if before.state != "faulted" else [])]
    if record is None:
        there = [one for one in seen.replicas if not one.deleting]
        missing = volume.spec.replicas - len(there)
        found = place(missing, volume.spec.size, seen.nodes, seen.every, {one.spec.node for one in seen.replicas})
        if len(found.places) < missing:
            why = "; ".join(f"{node}: {reason}" for node, reason in sorted(found.refused.items()))
            tell(
                "Scheduled",
                False,
                "TooFewNodes",
                f"{volume.spec.replicas} replicas need as many nodes, {len(found.places) + len(there)} can be used"
                + (f" ({why})" if why else "")
                + ". Add nodes, or ask for fewer replicas.",
            )
        status = msgspec.structs.replace(before, state="creating", conditions=conditions)
        return _set(volume, status)
    tell("Scheduled", True, "Placed", f"{len(record.spec.replicas)} replicas, each on another node")
    members = [one for one in record.spec.replicas if one.name in record.spec.in_sync]
    running = {one.spec.replica for one in seen.replicas if one.status.state == "running"}
    up = [one for one in members if one.name in running and one.node not in seen.suspects]
    state = before.state
    if not up and record.spec.epoch > 0:
        robustness, state = "faulted", "faulted"
        where = ", ".join(f"{one.name} on {one.node}" for one in members)
        tell(
            "Healthy",
            False,
            "NoReplica",
            f"none of the replicas that hold all of it runs ({where}). Bring one of these nodes back. If none will "
            f"ever come back, and only then: kubectl annotate volume {volume.name} {SALVAGE_ANNOTATION}=REPLICA",
        )
    elif record.spec.epoch == 0 and len(up) < len(members):
        robustness, state = "unknown", "creating"
        waits = ", ".join(f"{one.name} on {one.node}" for one in members if one not in up)
        tell("Healthy", None, "Creating", f"waiting for {waits}")
    elif len(up) < volume.spec.replicas:
        robustness, state = "degraded", "ready"
        lacks = [one for one in record.spec.replicas if one not in up]
        where = ", ".join(f"{one.name} on {one.node}" for one in lacks) or "more replicas"
        tell(
            "Healthy",
            False,
            "Degraded",
            f"{len(up)} of {volume.spec.replicas} replicas are in sync and run; not: {where}. It is used meanwhile; "
            "they catch up when they are back and a pod mounts it.",
        )
    else:
        robustness, state = "healthy", "ready"
        tell("Healthy", True, "InSync", "all replicas are in sync and run")
    status = msgspec.structs.replace(
        before,
        state=state,
        robustness=robustness,
        size=record.spec.size,
        in_sync=len(members),
        observed_generation=volume.metadata.generation,
        conditions=conditions,
    )
    actions = _set(volume, status)
    if status.state != before.state or status.robustness != before.robustness:
        healthy = find(conditions, "Healthy")
        kind = "Warning" if robustness in ("faulted", "degraded") else "Normal"
        reason = {"faulted": "Faulted", "degraded": "Degraded", "healthy": "Healthy"}.get(robustness, "Creating")
        actions.append(
            Tell(about=volume, type=kind, reason=reason, message=healthy.message if healthy else "")  # type: ignore[arg-type]
        )
    return actions


def _set(volume: Volume, status: Any) -> list[Action]:
    if status == volume.status:
        return []
    return [SetStatus(before=volume, after=msgspec.structs.replace(volume, status=status))]


def _delete(seen: VolumeSeen) -> list[Action]:
    """Share, replicas, record, volume: each when the one before is gone."""
    volume = seen.volume
    if FINALIZER not in volume.metadata.finalizers:
        return []
    deleting = _set(volume, msgspec.structs.replace(volume.status, state="deleting"))
    if seen.share is not None:
        gone: list[Action] = [] if seen.share.deleting else [Remove(of=seen.share)]
        return [*gone, *deleting]
    if seen.busy:
        return [*deleting, Again(after=1.0)]
    if seen.replicas:
        erase = volume.metadata.annotations.get(ERASE_ANNOTATION) == volume.name
        actions: list[Action] = []
        for one in seen.replicas:
            if erase and not one.spec.erase:
                actions.append(Change(of=one, patch={"spec": {"erase": True}}))
            elif not one.deleting:
                actions.append(Remove(of=one))
        return [*actions, *deleting]
    record = seen.record
    if record is not None:
        actions = [] if record.deleting else [Remove(of=record)]
        if FINALIZER in record.metadata.finalizers:
            others = [one for one in record.metadata.finalizers if one != FINALIZER]
            actions = [Change(of=record, patch={"metadata": {"finalizers": others or None}}), *actions]
        return actions
    left = [one for one in volume.metadata.finalizers if one != FINALIZER]
    erased = volume.metadata.annotations.get(ERASE_ANNOTATION) == volume.name
    what = "and its data is erased" if erased else "; its replica directories stay where they are"
    return [
        Tell(about=volume, type="Normal", reason="Deleted", message=f"the volume is gone {what}"),
        Change(of=volume, patch={"metadata": {"finalizers": left or None}}),
    ]
