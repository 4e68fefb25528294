"""The controllers: informers, queues and workers, while this process is the leader."""

from __future__ import annotations

import base64
import os

import structlog
import trio

from share_manager.controllers import replica, share_manager, storage_node, volume
from share_manager.controllers.actions import Action, apply
from share_manager.controllers.pod import CLUSTER_SECRET, PodOptions
from share_manager.controllers.storage_node import SILENT
from share_manager.controllers.world import World
from share_manager.kube.client import Client
from share_manager.kube.core import Lease, Secret
from share_manager.kube.errors import ConflictError, ExistsError, KubeError, NotFoundError
from share_manager.kube.events import EventRecorder
from share_manager.kube.leader import LeaderTiming, lead
from share_manager.kube.queue import WorkQueue
from share_manager.kube.resources import node_lease

log = structlog.get_logger()

LEADER_LEASE = "share-manager-controller"
WORKERS = 4
LOOK_AT_NODES = 0.5
SYNC_AGAIN = 60.0
"""Seconds after which everything is looked at once more, should a decision have depended on what nobody told."""
_GAP = 2.5
"""Seconds without an answer of the API server after which nothing counts as silent that was so before."""


class Manager:
    """`run` is its life: it waits for its turn to lead, and leads, again and again."""

    def __init__(self, client: Client, options: PodOptions, identity: str, timing: LeaderTiming | None = None) -> None:
        self._client = client
        self._options = options
        self._identity = identity
        self._timing = timing or LeaderTiming()
        self._answered = 0.0
        self.leading = False

    async def run(self) -> None:
        while True:
            await lead(
                self._client,
                LEADER_LEASE,
                self._identity,
                self._lead,
                self._timing,
                taken=self._taken,
                renewed=self._renewed,
            )
            self.leading = False

    def _taken(self) -> None:
        self.leading = True
        self._answered = trio.current_time()

    def _renewed(self) -> None:
        now = trio.current_time()
        if now - self._answered > _GAP:
            self._world.ages.restart(now)
        self._answered = now

    _world: World

    async def _lead(self) -> None:
        queues = {kind: WorkQueue() for kind in ("volume", "replica", "node", "share")}

        def changed(kind: str, name: str) -> None:
            queues[kind].add(name)

        self._world = world = World(self._client, self._options, changed)
        events = EventRecorder(self._client, "share-manager-controller")
        async with trio.open_nursery() as nursery:
            for informer in world.informers:
                nursery.start_soon(informer.run)
            nursery.start_soon(events.run)
            nursery.start_soon(self._keep_secret)
            for informer in world.informers:
                await informer.synced.wait()
            # the suspects before anybody decides anything
            world.set_suspects(await self._suspects(world))
            nursery.start_soon(self._watch_nodes, world)
            nursery.start_soon(self._look_at_all, world, queues)
            for kind, queue in queues.items():
                for _ in range(WORKERS if kind in ("volume", "share") else 1):
                    nursery.start_soon(self._work, world, kind, queue, events)

    async def _work(self, world: World, kind: str, queue: WorkQueue, events: EventRecorder) -> None:
        while True:
            name = await queue.take()
            try:
                again = await apply(decide(world, kind, name, trio.current_time()), self._client, events)
            except (ConflictError, NotFoundError) as error:
                # somebody was faster, or we have not heard of ourselves yet
                log.debug("decided on what was not so any more", name=name, reason=str(error))
                queue.done(name, failed=True)
            except KubeError as error:
                log.warning("not done", name=name, reason=str(error))
                queue.done(name, failed=True)
            else:
                queue.done(name)
                if again is not None:
                    queue.add_after(name, again)

    async def _watch_nodes(self, world: World) -> None:
        while True:
            await trio.sleep(LOOK_AT_NODES)
            world.set_suspects(await self._suspects(world))

    async def _suspects(self, world: World) -> dict[str, str]:
        """A node whose Lease did not change is asked for itself: only what we hear of changes may be late."""
        found = {}
        names = {node.name for node in world.nodes.store.all()} | {
            pod.spec.node_name for pod in world.pods.store.all() if pod.spec.node_name
        }
        for name in sorted(names):
            why = world.why_suspect(name, trio.current_time())
            if not why:
                continue
            age = world.node_age(name, trio.current_time())
            if name not in world.suspects and age is not None and age >= SILENT and await self._alive(world, name):
                continue
            found[name] = why
        return found

    async def _alive(self, world: World, node: str) -> bool:
        try:
            lease = await self._client.find(Lease, node_lease(node))
        except KubeError:
            # it is not known, so it is not decided
            return True
        if lease is None:
            return False
        known = world.leases.store.get(world.key(node_lease(node)))
        return known is None or lease.metadata.resource_version != known.metadata.resource_version

    async def _look_at_all(self, world: World, queues: dict[str, WorkQueue]) -> None:
        while True:
            for one in world.volumes.store.all():
                queues["volume"].add(one.name)
            for share in world.shares.store.all():
                queues["share"].add(share.name)
            for copy in world.replicas.store.all():
                queues["replica"].add(copy.name)
            for node in world.nodes.store.all():
                queues["node"].add(node.name)
            await trio.sleep(SYNC_AGAIN)

    async def _keep_secret(self) -> None:
        """From which the keys of volumes are derived; made once, never replaced."""
        while True:
            try:
                body = {
                    "metadata": {"name": CLUSTER_SECRET},
                    "immutable": True,
                    "data": {"secret": base64.b64encode(os.urandom(32).hex().encode()).decode()},
                }
                await self._client.create_json(Secret, body)
            except ExistsError:
                return
            except KubeError as error:
                log.warning("no cluster secret", reason=str(error))
                await trio.sleep(2.0)
            else:
                log.info("cluster secret made", name=CLUSTER_SECRET)
                return


def decide(world: World, kind: str, name: str, now: float) -> list[Action]:
    match kind:
        case "volume":
            volume_seen = world.volume(name)
            return volume.decide(volume_seen) if volume_seen is not None else []
        case "replica":
            replica_seen = world.replica(name)
            return replica.decide(replica_seen) if replica_seen is not None else []
        case "node":
            node_seen = world.node(name)
            return storage_node.decide(node_seen) if node_seen is not None else []
    share_seen = world.share(name, now)
    return share_manager.decide(share_seen) if share_seen is not None else []
