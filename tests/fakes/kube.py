"""A cluster in memory: an API server's rules about versions, finalizers and owners, kubelets, agents and a scheduler.

Time is a number. Whoever tests decides when anybody acts, when a node dies, and at which write the controller does.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from share_manager.controllers.pod import PodOptions
from share_manager.controllers.world import World
from share_manager.kube.core import Lease, Node, Pod, Service
from share_manager.kube.errors import ConflictError, ExistsError, NotFoundError
from share_manager.kube.meta import Object
from share_manager.kube.patch import applied, part_changes
from share_manager.kube.resources import (
    FINALIZER,
    INSTANCE_LABEL,
    REPORT_ANNOTATION,
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

Json = dict[str, Any]
KINDS: dict[str, type[Object]] = {
    kind.__name__: kind
    for kind in (Volume, VolumeRecord, Replica, ShareManager, StorageNode, Node, Pod, Service, Lease)
}
NAMESPACE = "sm"


class Killed(BaseException):
    """The controller's process is gone."""


class FakeCluster:
    """The API server, and what is written to it. `on_write` sees every write before it is done."""

    namespace = NAMESPACE

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], Json] = {}
        self.events: list[tuple[str, str]] = []
        self.on_write: Callable[[str, str, str], None] = lambda verb, kind, name: None
        self.after_write: Callable[[], None] = lambda: None
        self.log: list[str] = []
        self._versions = itertools.count(1)
        self._uids = itertools.count(1)

    # as `kube.client.Client`

    async def create_json(self, kind: type[Object], body: Json) -> Any:
        name = body["metadata"]["name"]
        self._writes("create", kind, name)
        if (kind.__name__, name) in self.objects:
            raise ExistsError("create", name, 409)
        made = self.put(kind, body)
        self.after_write()
        return made

    async def patch(self, kind: type[Object], name: str, body: Json, *, version: str = "") -> Any:
        self._writes("patch", kind, name)
        found = self._found(kind, name)
        if version and found["metadata"]["resourceVersion"] != version:
            raise ConflictError("patch", name, 409)
        changed = applied(found, body)
        self._store(kind, name, changed)
        self.after_write()
        return self.get(kind, name)

    async def update_status(self, before: Any, after: Any) -> Any:
        body = {"status": part_changes(before.status, after.status)}
        return await self.patch(type(before), before.name, body, version=before.metadata.resource_version)

    async def delete(self, kind: type[Object], name: str, *, uid: str = "", grace: int | None = None) -> None:
        self._writes("delete", kind, name)
        found = self.objects.get((kind.__name__, name))
        if found is None:
            return
        if uid and found["metadata"]["uid"] != uid:
            raise ConflictError("delete", name, 409)
        self.mark_deleted(kind, name, grace)
        self.after_write()

    # as `events.EventRecorder`

    def tell(self, about: Object, kind: Literal["Normal", "Warning"], reason: str, message: str) -> None:
        self.events.append((reason, message))

    # what everybody does

    def get(self, kind: type[Object], name: str) -> Any:
        return msgspec.convert(self._found(kind, name), kind)

    def find(self, kind: type[Object], name: str) -> Any:
        return self.get(kind, name) if (kind.__name__, name) in self.objects else None

    def all(self, kind: type[Object]) -> list[Any]:
        return [msgspec.convert(body, kind) for (of, _), body in self.objects.items() if of == kind.__name__]

    def put(self, kind: type[Object], body: Json) -> Any:
        body = copy.deepcopy(body)
        meta = body["metadata"]
        number = next(self._uids)
        meta.setdefault("uid", f"{number:08x}-0000-4000-8000-000000000000")
        if kind.NAMESPACED:
            meta["namespace"] = NAMESPACE
        if kind is Service:
            body["spec"].setdefault("clusterIP", f"10.96.0.{number % 250 + 1}")
        self._store(kind, meta["name"], body)
        return self.get(kind, meta["name"])

    def change(self, kind: type[Object], name: str, patch: Json) -> None:
        self._store(kind, name, applied(self._found(kind, name), patch))

    def mark_deleted(self, kind: type[Object], name: str, grace: int | None = None) -> None:
        found = self._found(kind, name)
        meta = found["metadata"]
        if (kind is Pod and grace != 0) or meta.get("finalizers"):
            meta.setdefault("deletionTimestamp", "2026-01-01T00:00:00Z")
            meta["deletionGracePeriodSeconds"] = 30 if grace is None else grace
            self._store(kind, name, found)
        else:
            self.remove(kind, name)

    def remove(self, kind: type[Object], name: str) -> None:
        gone = self.objects.pop((kind.__name__, name))
        self.log.append(f"gone {kind.__name__}/{name}")
        for (of, other), body in list(self.objects.items()):
            owners = body["metadata"].get("ownerReferences", ())
            if any(owner["uid"] == gone["metadata"]["uid"] for owner in owners):
                self.mark_deleted(KINDS[of], other)

    def _found(self, kind: type[Object], name: str) -> Json:
        try:
            return copy.deepcopy(self.objects[kind.__name__, name])
        except KeyError:
            raise NotFoundError("get", name, 404) from None

    def _store(self, kind: type[Object], name: str, body: Json) -> None:
        before = self.objects.get((kind.__name__, name))
        body["metadata"].pop("resourceVersion", None)
        if before is not None:
            same = copy.deepcopy(before)
            same["metadata"].pop("resourceVersion", None)
            if same == body:
                return
        body["metadata"]["resourceVersion"] = str(next(self._versions))
        msgspec.convert(body, kind)
        self.objects[kind.__name__, name] = body
        if body["metadata"].get("deletionTimestamp") and not body["metadata"].get("finalizers") and kind is not Pod:
            self.remove(kind, name)

    def _writes(self, verb: str, kind: type[Object], name: str) -> None:
        self.on_write(verb, kind.__name__, name)
        self.log.append(f"{verb} {kind.__name__}/{name}")

    def world(self, options: PodOptions | None = None) -> World:
        """What a controller that is started now observes."""
        world = World(self, options or PodOptions(), lambda kind, name: None)  # type: ignore[arg-type]
        self.observe(world)
        return world

    def observe(self, world: World) -> None:
        for informer in world.informers:
            kind = informer._kind
            there = {one.key: one for one in self.all(kind)}
            for one in informer.store.all():
                if one.key not in there:
                    informer.store.remove(one.key)
            for item in there.values():
                informer.store.put(item)


class Machines:
    """Nodes with their kubelets and agents, and the scheduler. `dead` nodes do nothing any more."""

    def __init__(self, cluster: FakeCluster, names: tuple[str, ...]) -> None:
        self.cluster = cluster
        self.dead: set[str] = set()
        self.broken: set[str] = set()
        """Instances whose pod never serves."""
        self._beats = itertools.count(1)
        for number, name in enumerate(names, 1):
            ready = {"conditions": [{"type": "Ready", "status": "True"}]}
            cluster.put(Node, {"metadata": {"name": name}, "status": ready})
            disks = {"default": {"total": 1 << 40, "available": 1 << 40}}
            status = {"replicaAddress": f"10.0.0.{number}", "disks": disks}
            cluster.put(StorageNode, {"metadata": {"name": name}, "status": status})
            cluster.put(Lease, {"metadata": {"name": node_lease(name)}, "spec": {}})

    def act(self) -> None:
        """Everybody who is alive, once."""
        cluster = self.cluster
        for node in cluster.all(StorageNode):
            if node.name not in self.dead:
                beat = {"spec": {"renewTime": f"beat {next(self._beats)}"}}
                cluster.change(Lease, node_lease(node.name), beat)
        for replica in cluster.all(Replica):
            if replica.spec.node in self.dead:
                continue
            if replica.deleting:
                left = [one for one in replica.metadata.finalizers if one != FINALIZER]
                cluster.log.append(f"{'erased' if replica.spec.erase else 'kept'} {replica.name}")
                cluster.change(Replica, replica.name, {"metadata": {"finalizers": left or None}})
            elif cluster.find(VolumeRecord, replica.spec.volume) is not None:
                cluster.change(Replica, replica.name, {"status": {"state": "running"}})
        for pod in cluster.all(Pod):
            self._pod(pod)

    def _pod(self, pod: Pod) -> None:
        cluster = self.cluster
        if not pod.spec.node_name:
            body = cluster.objects["Pod", pod.name]
            terms = body["spec"]["affinity"]["nodeAffinity"].get("requiredDuringSchedulingIgnoredDuringExecution")
            fields = terms["nodeSelectorTerms"][0]["matchFields"] if terms else []
            avoid = {value for one in fields if one["operator"] == "NotIn" for value in one["values"]}
            only = {value for one in fields if one["operator"] == "In" for value in one["values"]}
            # whom it may not know to be dead, it may choose
            fit = [one.name for one in cluster.all(Node) if one.name not in avoid and (not only or one.name in only)]
            if fit:
                cluster.change(Pod, pod.name, {"spec": {"nodeName": fit[0]}})
            return
        if pod.spec.node_name in self.dead:
            return
        if pod.deleting:
            cluster.remove(Pod, pod.name)
            return
        instance, volume = pod.metadata.labels[INSTANCE_LABEL], pod.metadata.labels[VOLUME_LABEL]
        record = cluster.find(VolumeRecord, volume)
        if record is None or record.spec.holder != instance or instance in self.broken:
            return
        cluster.change(Pod, pod.name, {"status": {"phase": "Running"}})
        lease = share_lease(volume)
        if cluster.find(Lease, lease) is None:
            cluster.put(Lease, {"metadata": {"name": lease}, "spec": {}})
        said = ShareReport(instance=instance, state="running", epoch=record.spec.epoch, node=pod.spec.node_name)
        text = msgspec.json.encode(said).decode()
        cluster.change(Lease, lease, {"metadata": {"annotations": {REPORT_ANNOTATION: text}}})
