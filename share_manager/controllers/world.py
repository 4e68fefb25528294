"""What is observed: every kind's objects, and for how long some of it has not changed, on our own clock."""

from __future__ import annotations

import secrets
from collections.abc import Callable

import msgspec
import structlog

from share_manager.controllers import replica, share_manager, storage_node, volume
from share_manager.controllers.conditions import find
from share_manager.controllers.pod import PodOptions
from share_manager.controllers.storage_node import SILENT, suspect
from share_manager.kube.client import Client
from share_manager.kube.core import Lease, Node, Pod, Service
from share_manager.kube.events import seconds_timestamp
from share_manager.kube.informer import Informer
from share_manager.kube.meta import Object
from share_manager.kube.resources import (
    COMPONENT_LABEL,
    REPORT_ANNOTATION,
    SHARE_COMPONENT,
    VOLUME_LABEL,
    Replica,
    ShareManager,
    ShareReport,
    StorageNode,
    Volume,
    VolumeRecord,
    node_lease,
    share_lease,
)
from share_manager.kube.wire import UNDECODABLE

log = structlog.get_logger()

_INSTANCE_LETTERS = "bcdfghjkmnpqrstvwxz23456789"


def new_instance() -> str:
    """A label that no other pod has: 50 bits of luck, and no word."""
    return "".join(secrets.choice(_INSTANCE_LETTERS) for _ in range(10))


class Ages:
    """Since when each thing is as it is, as far as we know. Nothing ages while the API server does not answer."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[object, float]] = {}

    def of(self, name: str, value: object, now: float) -> float:
        """Seconds since `name` has this value."""
        known = self._known.get(name)
        if known is None or known[0] != value:
            self._known[name] = value, now
            return 0.0
        return now - known[1]

    def restart(self, now: float) -> None:
        """What did not change may only not have been heard of."""
        self._known = {name: (value, now) for name, (value, _) in self._known.items()}

    def forget(self, name: str) -> None:
        self._known.pop(name, None)


def _volume_of(item: Object) -> str:
    return item.metadata.labels.get(VOLUME_LABEL, "")


class World:
    """`changed` is called with the kind and the name of what may have to be looked at: "volume", "share", "replica",
    "node"."""

    def __init__(self, client: Client, options: PodOptions, changed: Callable[[str, str], None]) -> None:
        self._options = options
        self._changed = changed
        self._namespace = client.namespace
        self.ages = Ages()
        self.suspects: dict[str, str] = {}
        self._first_versions: dict[str, str] = {}
        share_labels = f"{COMPONENT_LABEL}={SHARE_COMPONENT}"

        self.volumes = Informer(client, Volume, changed=self._volume_changed)
        self.records = Informer(client, VolumeRecord, changed=self._volume_changed)
        self.replicas = Informer(client, Replica, group=lambda one: one.spec.volume, changed=self._replica_changed)
        self.shares = Informer(client, ShareManager, changed=self._volume_changed)
        self.nodes = Informer(client, StorageNode, changed=self._node_changed)
        self.kube_nodes = Informer(client, Node, changed=lambda one: changed("node", one.name))
        self.pods = Informer(client, Pod, labels=share_labels, group=_volume_of, changed=self._labelled_changed)
        self.services = Informer(client, Service, labels=share_labels, changed=self._labelled_changed)
        self.leases = Informer(client, Lease, changed=self._lease_changed)
        self.informers: tuple[Informer[Object], ...] = (
            self.volumes,  # type: ignore[assignment]
            self.records,
            self.replicas,
            self.shares,
            self.nodes,
            self.kube_nodes,
            self.pods,
            self.services,
            self.leases,
        )

    def key(self, name: str) -> str:
        return f"{self._namespace}/{name}"

    # what concerns what

    def _volume_changed(self, item: Object) -> None:
        self._changed("volume", item.name)
        self._changed("share", item.name)

    def _labelled_changed(self, item: Object) -> None:
        if name := _volume_of(item):
            self._changed("volume", name)
            self._changed("share", name)

    def _replica_changed(self, item: Replica) -> None:
        self._changed("replica", item.name)
        self._changed("volume", item.spec.volume)

    def _node_changed(self, item: StorageNode) -> None:
        self._changed("node", item.name)
        for one in self.volumes.store.all():
            if self.records.store.get(one.key) is None:
                self._changed("volume", one.name)

    def _lease_changed(self, item: Lease) -> None:
        if REPORT_ANNOTATION in item.metadata.annotations:
            self._changed("share", item.name.removeprefix(share_lease("")))

    # suspects

    def node_age(self, node: str, now: float) -> float | None:
        lease = self.leases.store.get(self.key(node_lease(node)))
        if lease is None:
            return None
        version = lease.metadata.resource_version
        first = self._first_versions.setdefault(node, version)
        age = self.ages.of(f"node {node}", version, now)
        if version == first and self._was_suspect(node):
            # the leader before us waited for it already, and it has said nothing since
            return max(age, SILENT)
        return age

    def _was_suspect(self, node: str) -> bool:
        found = self.nodes.store.get(self.key(node))
        ready = find(found.status.conditions, "Ready") if found is not None else None
        return ready is not None and ready.reason == "Suspect"

    def kubernetes_says(self, node: str) -> str:
        found = self.kube_nodes.store.get(node)
        if found is None:
            return "gone"
        return "ready" if found.ready else "not ready"

    def why_suspect(self, node: str, now: float) -> str:
        return suspect(self.node_age(node, now), self.kubernetes_says(node))

    def set_suspects(self, found: dict[str, str]) -> None:
        """Whoever has to do with a node that became suspect, or is no more, is looked at."""
        differing = {node for node in {*found, *self.suspects} if (node in found) != (node in self.suspects)} | {
            node for node in found if found[node] != self.suspects.get(node)
        }
        self.suspects = found
        if not differing:
            return
        log.info("suspect nodes", nodes=found)
        for node in differing:
            self._changed("node", node)
        for one in self.replicas.store.all():
            if one.spec.node in differing:
                self._replica_changed(one)
        for pod in self.pods.store.all():
            if pod.spec.node_name in differing:
                self._labelled_changed(pod)

    # what the decisions are given

    def volume(self, name: str) -> volume.VolumeSeen | None:
        key = self.key(name)
        found = self.volumes.store.get(key)
        if found is None:
            return None
        return volume.VolumeSeen(
            volume=found,
            record=self.records.store.get(key),
            replicas=self.replicas.store.of(name),
            share=self.shares.store.get(key),
            service=self.services.store.get(key),
            nodes=self.nodes.store.all(),
            every=self.replicas.store.all(),
            suspects=frozenset(self.suspects),
            busy=bool(self.pods.store.of(name)),
            now=seconds_timestamp(),
        )

    def replica(self, name: str) -> replica.ReplicaSeen | None:
        found = self.replicas.store.get(self.key(name))
        if found is None:
            return None
        node = found.spec.node
        gone = self.kubernetes_says(node) == "gone" and self.nodes.store.get(self.key(node)) is None
        return replica.ReplicaSeen(
            replica=found, suspect=self.suspects.get(node, ""), node_gone=gone, now=seconds_timestamp()
        )

    def node(self, name: str) -> storage_node.NodeSeen | None:
        found = self.nodes.store.get(self.key(name))
        if found is None:
            return None
        return storage_node.NodeSeen(
            node=found,
            suspect=self.suspects.get(name, ""),
            gone=self.kubernetes_says(name) == "gone",
            now=seconds_timestamp(),
        )

    def share(self, name: str, now: float) -> share_manager.ShareSeen | None:
        key = self.key(name)
        found = self.shares.store.get(key)
        if found is None:
            self.ages.forget(f"share {name}")
            return None
        status = found.status
        lease = self.leases.store.get(self.key(share_lease(name)))
        said = _report(lease)
        version = lease.metadata.resource_version if lease is not None else ""
        pods = self.pods.store.of(name)
        return share_manager.ShareSeen(
            share=found,
            volume=self.volumes.store.get(key),
            record=self.records.store.get(key),
            pods=pods,
            service=self.services.store.get(key),
            report=said,
            report_age=self.ages.of(f"report {name}", version, now),
            report_state_age=self.ages.of(f"reported state {name}", (said.instance, said.state) if said else "", now),
            suspects=self.suspects,
            in_state=self.ages.of(f"share {name}", (status.state, status.instance, status.attempts), now),
            leaving={
                pod.metadata.uid: self.ages.of(f"leaving {pod.metadata.uid}", True, now) for pod in pods if pod.deleting
            },
            instance=new_instance(),
            options=self._options,
            now=seconds_timestamp(),
        )


def _report(lease: Lease | None) -> ShareReport | None:
    """What a pod said of itself; nothing when that makes no sense."""
    text = lease.metadata.annotations.get(REPORT_ANNOTATION) if lease is not None else None
    if not text:
        return None
    try:
        return msgspec.json.decode(text, type=ShareReport)
    except UNDECODABLE:
        return None
