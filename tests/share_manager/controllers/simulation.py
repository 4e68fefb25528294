"""The real decisions over a cluster in memory, where the controller may be killed before or after any of its writes."""

from __future__ import annotations

from typing import Any, Literal

from share_manager.controllers.actions import apply
from share_manager.controllers.manager import decide
from share_manager.kube.core import Pod, Service
from share_manager.kube.errors import KubeError
from share_manager.kube.resources import INSTANCE_LABEL, Replica, ShareManager, Volume, VolumeRecord
from tests.fakes.kube import FakeCluster, Killed, Machines

STEP = 0.5


class Simulation:
    def __init__(self, nodes: tuple[str, ...] = ("a", "b", "c")) -> None:
        self.cluster = FakeCluster()
        self.machines = Machines(self.cluster, nodes)
        self.now = 0.0
        self.writes = 0
        self.kill_at: int | None = None
        self.kill_when: Literal["before", "after"] = "before"
        self.kills = 0
        self.world = self.cluster.world()
        self.cluster.on_write = self._on_write
        self.cluster.after_write = self._after_write
        self._epochs: dict[str, tuple[int, str]] = {}

    # the controller

    async def step(self) -> None:
        """Half a second: everybody acts, then the controller looks at everything once."""
        self.now += STEP
        self.machines.act()
        try:
            await self._look()
        except Killed:
            self.kills += 1
            self.kill_at = None
            # another one leads, and knows nothing but what is written
            self.world = self.cluster.world()
        self._check()

    async def _look(self) -> None:
        cluster, world = self.cluster, self.world
        cluster.observe(world)
        names = {node.name for node in world.nodes.store.all()}
        names |= {pod.spec.node_name for pod in world.pods.store.all() if pod.spec.node_name}
        world.set_suspects({name: why for name in names if (why := world.why_suspect(name, self.now))})
        things = [("node", one.name) for one in world.nodes.store.all()]
        things += [("replica", one.name) for one in world.replicas.store.all()]
        things += [("volume", one.name) for one in world.volumes.store.all()]
        things += [("share", one.name) for one in world.shares.store.all()]
        for kind, name in things:
            cluster.observe(world)
            try:
                await apply(decide(world, kind, name, self.now), cluster, cluster)  # type: ignore[arg-type]
            except KubeError:
                continue

    def _on_write(self, verb: str, kind: str, name: str) -> None:
        self.writes += 1
        if self.kill_when == "before" and self.writes == self.kill_at:
            raise Killed
        if (verb, kind) == ("create", "Pod"):
            # the epoch is bumped, and given to it, before there is a pod
            instance = name.rpartition("-")[2]
            volume = name.removeprefix("sm-").rpartition("-")[0]
            assert self.cluster.get(VolumeRecord, volume).spec.holder == instance

    def _after_write(self) -> None:
        self._check()
        if self.kill_when == "after" and self.writes == self.kill_at:
            raise Killed

    # what must always be so

    def _check(self) -> None:
        cluster = self.cluster
        for record in cluster.all(VolumeRecord):
            epoch, holder = self._epochs.get(record.name, (0, ""))
            assert record.spec.epoch >= epoch
            if record.spec.holder not in (holder, ""):
                assert record.spec.epoch > epoch, "another holder with the same epoch"
            assert record.spec.in_sync
            self._epochs[record.name] = record.spec.epoch, record.spec.holder
            nodes = [one.node for one in record.spec.replicas]
            assert len(nodes) == len(set(nodes)), "two replicas on one node"
        ports = [(one.spec.node, one.spec.port) for one in cluster.all(Replica)]
        assert len(ports) == len(set(ports))
        for share in cluster.all(ShareManager):
            if share.status.state == "running":
                assert share.status.endpoint.endswith(f"/{share.name}")
                assert share.status.instance

    # what people do

    def make_volume(self, name: str = "v", **spec: Any) -> None:
        self.cluster.put(Volume, {"metadata": {"name": name}, "spec": {"size": 1 << 30, "replicas": 2, **spec}})

    def attach(self, node: str, volume: str = "v") -> None:
        self.cluster.change(ShareManager, volume, {"spec": {"attachments": {node: {}}}})

    def detach(self, volume: str = "v") -> None:
        self.cluster.change(ShareManager, volume, {"spec": {"attachments": None}})

    def share(self, volume: str = "v") -> ShareManager:
        found: ShareManager = self.cluster.get(ShareManager, volume)
        return found

    def state(self, volume: str = "v") -> str:
        found = self.cluster.find(ShareManager, volume)
        return "" if found is None else str(found.status.state)

    def leads_to(self, volume: str = "v") -> str:
        """Instance that the Service selects."""
        service: Service = self.cluster.get(Service, volume)
        return service.spec.selector[INSTANCE_LABEL]

    def pods(self) -> list[Pod]:
        return self.cluster.all(Pod)

    async def until(self, what: Any, seconds: float = 120.0) -> None:
        end = self.now + seconds
        while not what():
            assert self.now < end, f"not within {seconds:g} s; {self.state()}\n" + "\n".join(self.cluster.log[-30:])
            await self.step()
