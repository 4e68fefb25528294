"""The controllers as processes of their own, at a real API server, under their own service account's rights."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from share_manager.controllers.manager import LEADER_LEASE
from share_manager.controllers.pod import CLUSTER_SECRET
from share_manager.controllers.storage_node import RENEW
from share_manager.kube.client import Client
from share_manager.kube.core import Event, Lease, Node, Pod, Secret, Service
from share_manager.kube.errors import ExistsError, KubeError
from share_manager.kube.informer import Informer
from share_manager.kube.leader import timestamp
from share_manager.kube.meta import Object, ObjectMeta
from share_manager.kube.resources import (
    ERASE_ANNOTATION,
    FINALIZER,
    INSTANCE_LABEL,
    REPORT_ANNOTATION,
    Replica,
    ShareManager,
    ShareReport,
    StorageNode,
    Volume,
    VolumeRecord,
    VolumeSpec,
    node_lease,
    share_lease,
)
from share_manager.pods.home import REPORT_AGAIN
from tests.lab.control_plane import ControlPlane

pytestmark = pytest.mark.system


class Nodes:
    """Agents, kubelets and scheduler of nodes, by way of the API: what they would write, without anything behind it."""

    def __init__(self, kube: Client, prefix: str, count: int = 3) -> None:
        self.kube = kube
        self.names = [f"{prefix}-{number}" for number in range(1, count + 1)]
        self.dead: set[str] = set()
        self._leases: set[str] = set()

    async def make(self) -> None:
        for number, name in enumerate(self.names, 1):
            await self.kube.create_json(Node, {"metadata": {"name": name}})
            ready = {"status": {"conditions": [{"type": "Ready", "status": "True"}]}}
            await self.kube.patch(Node, name, ready, subresource="status")
            await self.kube.create(StorageNode(metadata=ObjectMeta(name=name)))
            disks = {"default": {"total": 1 << 40, "available": 1 << 40}}
            status = {"replicaAddress": f"10.0.0.{number}", "disks": disks}
            await self.kube.patch(StorageNode, name, {"status": status}, subresource="status")

    async def beat(self) -> None:
        while True:
            for name in self.names:
                if name not in self.dead:
                    with contextlib.suppress(KubeError):
                        await self._renew(node_lease(name), {})
            await trio.sleep(RENEW)

    async def act(self) -> None:
        while True:
            with contextlib.suppress(KubeError):
                for replica in (await self.kube.list(Replica)).items:
                    await self._replica(replica)
                for pod in (await self.kube.list(Pod)).items:
                    await self._pod(pod)
            await trio.sleep(0.3)

    async def report_again(self, volumes: list[str], every: float) -> None:
        """As pods do when there is nothing new."""
        while True:
            for volume in volumes:
                with contextlib.suppress(KubeError):
                    await self._renew(share_lease(volume), {})
                await trio.sleep(every / len(volumes))

    async def _replica(self, one: Replica) -> None:
        if one.spec.node in self.dead:
            return
        if one.deleting:
            left = [name for name in one.metadata.finalizers if name != FINALIZER]
            await self.kube.patch(Replica, one.name, {"metadata": {"finalizers": left or None}})
        elif one.status.state != "running" and await self.kube.find(VolumeRecord, one.spec.volume):
            await self.kube.patch(Replica, one.name, {"status": {"state": "running"}}, subresource="status")

    async def _pod(self, pod: Pod) -> None:
        if pod.spec.node_name in self.dead:
            return
        if pod.deleting:
            await self.kube.delete(Pod, pod.name, grace=0)
            return
        if not pod.spec.node_name:
            alive = [name for name in self.names if name not in self.dead]
            body = {"metadata": {"name": pod.name}, "target": {"kind": "Node", "name": alive[0]}}
            await self.kube._send(_binding(self.kube.namespace, pod.name, body))
            return
        instance = pod.metadata.labels[INSTANCE_LABEL]
        volume = pod.name.removeprefix("sm-").rpartition("-")[0]
        record = await self.kube.get(VolumeRecord, volume)
        if record.spec.holder == instance and pod.status.phase != "Running":
            await self.kube.patch(Pod, pod.name, {"status": {"phase": "Running"}}, subresource="status")
            said = ShareReport(instance=instance, state="running", epoch=record.spec.epoch, clients=2)
            await self._renew(share_lease(volume), {REPORT_ANNOTATION: msgspec.json.encode(said).decode()})

    async def _renew(self, name: str, annotations: dict[str, str]) -> None:
        if name not in self._leases:
            with contextlib.suppress(ExistsError):
                await self.kube.create(Lease(metadata=ObjectMeta(name=name)))
            self._leases.add(name)
        body = {"metadata": {"annotations": annotations}, "spec": {"renewTime": timestamp()}}
        await self.kube.patch(Lease, name, body)


def _binding(namespace: str, pod: str, body: Any) -> Any:
    from share_manager.kube.wire import Request

    return Request(
        method="POST",
        path=f"/api/v1/namespaces/{namespace}/pods/{pod}/binding",
        what="bind",
        body=msgspec.json.encode({"apiVersion": "v1", "kind": "Binding", **body}),
    )


class Controllers:
    """Processes of `share-manager controller`."""

    def __init__(self, kubeconfig: Path, namespace: str, directory: Path) -> None:
        self._kubeconfig = kubeconfig
        self._namespace = namespace
        self._directory = directory
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, identity: str) -> None:
        argv = [sys.executable, "-m", "share_manager", "controller", "--identity", identity]
        argv += ["--kubeconfig", str(self._kubeconfig), "--namespace", self._namespace]
        with (self._directory / f"{identity}.log").open("ab") as log:
            self.running[identity] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *argv], stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )

    def kill(self, identity: str, number: signal.Signals = signal.SIGKILL) -> int:
        process = self.running.pop(identity)
        process.send_signal(number)
        return process.wait(20)

    def log(self, last: int = 3000) -> str:
        """The end of what each said; with 0, all of it."""
        return "\n".join(path.read_text()[-last:] for path in self._directory.glob("*.log"))


@pytest.fixture
def controllers(control_plane: ControlPlane, kube_namespace: str, tmp_path: Path) -> Iterator[Controllers]:
    control_plane.apply_roles(kube_namespace)
    token = control_plane.token_of(kube_namespace, "share-manager-controller")
    made = Controllers(control_plane.kubeconfig(token, kube_namespace), kube_namespace, tmp_path)
    yield made
    for identity in list(made.running):
        made.kill(identity)


@pytest.fixture
async def nodes(kube: Client, kube_namespace: str, nursery: trio.Nursery) -> AsyncIterator[Nodes]:
    made = Nodes(kube, kube_namespace)
    await made.make()
    nursery.start_soon(made.beat)
    nursery.start_soon(made.act)
    yield made
    nursery.cancel_scope.cancel()


async def until(what: Callable[[], Any], controllers: Controllers, seconds: float = 60.0) -> Any:
    end = trio.current_time() + seconds
    while True:
        with contextlib.suppress(KubeError):
            if found := await what():
                return found
        assert trio.current_time() < end, f"not within {seconds:g} s\n{controllers.log()}"
        await trio.sleep(0.1)


def state_is(kube: Client, state: str, but: str = "") -> Callable[[], Any]:
    async def look() -> ShareManager | None:
        share = await kube.find(ShareManager, "vol1")
        if share is None or share.status.state != state or (but and share.status.pod == but):
            return None
        return share

    return look


OF_A_VOLUME = (Volume, VolumeRecord, Replica, ShareManager, Service, Pod)


def nothing_is_left(kube: Client) -> Callable[[], Any]:
    async def look() -> bool:
        return not any([(await kube.list(kind)).items for kind in OF_A_VOLUME])

    return look


REFUSED = re.compile(
    r'(?:"(?P<name>[^"]+)" )?is forbidden: User "(?P<user>[^"]+)" cannot (?P<verb>\w+) resource '
    r'"(?P<resource>[^"/]+)/?(?P<subresource>[^"]*)" in API group "(?P<group>[^"]*)" '
    r'in the namespace "(?P<namespace>[^"]+)"'
)


def is_allowed(control_plane: ControlPlane, line: str) -> bool:
    """What was refused: an API server that has just started may not have read the roles yet."""
    found = REFUSED.search(line.replace('\\"', '"'))
    assert found is not None, line
    asked = {key: value for key, value in found.groupdict(default="").items() if key != "user"}
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {"user": found["user"], "resourceAttributes": asked},
    }
    answer = control_plane.call("POST", "/apis/authorization.k8s.io/v1/subjectaccessreviews", review)
    allowed: bool = answer["status"]["allowed"]
    return allowed


async def test_a_right_that_is_missing_is_told_from_one_that_was_not_read_yet(
    control_plane: ControlPlane, kube_namespace: str
) -> None:
    control_plane.apply_roles(kube_namespace)
    line = (
        r'{"reason": "get leases/x/y: leases.coordination.k8s.io \"share-manager-controller\" is forbidden: '
        rf"User \"system:serviceaccount:{kube_namespace}:share-manager-controller\" cannot get resource \"leases\" "
        rf'in API group \"coordination.k8s.io\" in the namespace \"{kube_namespace}\""}}'
    )

    async def read() -> bool:
        return is_allowed(control_plane, line)

    with trio.fail_after(30):
        while not await read():
            await trio.sleep(0.1)
    assert not is_allowed(control_plane, line.replace("cannot get", "cannot deletecollection"))
    assert not is_allowed(control_plane, line.replace(r"resource \"leases", r"resource \"nodes/proxy"))


async def test_a_volume_from_its_making_to_its_end(
    kube: Client, nodes: Nodes, controllers: Controllers, control_plane: ControlPlane
) -> None:
    controllers.start("one")
    await kube.create(Volume(metadata=ObjectMeta(name="vol1"), spec=VolumeSpec(size=1 << 30, replicas=2)))
    await until(state_is(kube, "stopped"), controllers)
    assert (await kube.get(Secret, CLUSTER_SECRET)).immutable
    await kube.patch(ShareManager, "vol1", {"spec": {"attachments": {nodes.names[0]: {}}}})
    share = await until(state_is(kube, "running"), controllers)
    service = await kube.get(Service, "vol1")
    assert share.status.endpoint == f"nfs://{service.spec.cluster_ip}/vol1"
    assert service.spec.selector[INSTANCE_LABEL] == share.status.instance
    assert (share.status.clients, share.status.epoch) == (2, 1)

    # the leader is killed, and the node with it: the other one takes over both
    controllers.start("two")
    nodes.dead.add(share.status.node)
    controllers.kill("one")
    after = await until(state_is(kube, "running", but=share.status.pod), controllers)
    assert after.status.node != share.status.node
    assert after.status.endpoint == share.status.endpoint
    assert after.status.last_failover.before == share.status.node
    assert (await kube.get(Service, "vol1")).spec.cluster_ip == service.spec.cluster_ip

    # the API server is killed and comes back: nothing is lost, and nobody is late
    control_plane.compact()
    with control_plane.away():
        await trio.sleep(3)
    for _ in range(30):
        await trio.sleep(0.2)
        assert (await kube.get(ShareManager, "vol1")).status.pod == after.status.pod
    await kube.patch(ShareManager, "vol1", {"spec": {"attachments": None}})
    await until(state_is(kube, "stopped"), controllers)

    await kube.patch(Volume, "vol1", {"metadata": {"annotations": {ERASE_ANNOTATION: "vol1"}}})
    nodes.dead.clear()
    await kube.delete(Volume, "vol1")
    await until(nothing_is_left(kube), controllers)
    reasons = {event.reason for event in (await kube.list(Event)).items}
    assert {"Created", "Healthy", "Starting", "Running", "FailingOver", "FailedOver", "Stopping", "Stopped"} <= reasons
    assert controllers.kill("two", signal.SIGTERM) == 0
    refused = [line for line in controllers.log(0).splitlines() if "forbidden" in line]
    assert [line for line in refused if not is_allowed(control_plane, line)] == []
    assert (await kube.get(Lease, LEADER_LEASE)).spec.holder_identity == ""


async def test_a_hung_leader_is_deposed_and_does_nothing_more(
    kube: Client, nodes: Nodes, controllers: Controllers
) -> None:
    controllers.start("one")

    async def led_by(name: str) -> bool:
        lease = await kube.find(Lease, LEADER_LEASE)
        return lease is not None and lease.spec.holder_identity == name

    await until(lambda: led_by("one"), controllers)
    controllers.start("two")
    os.kill(controllers.running["one"].pid, signal.SIGSTOP)
    await until(lambda: led_by("two"), controllers)
    os.kill(controllers.running["one"].pid, signal.SIGCONT)
    await kube.create(Volume(metadata=ObjectMeta(name="vol1"), spec=VolumeSpec(size=1 << 30, replicas=2)))
    await until(state_is(kube, "stopped"), controllers)

    async def placed() -> bool:
        return len((await kube.list(Replica)).items) == 2

    await until(placed, controllers)
    assert await led_by("two")


class Killer:
    """Kills the leader whenever an object was changed: after each of its writes, and before it sees those of others."""

    def __init__(self, kube: Client, controllers: Controllers) -> None:
        self.kube = kube
        self.controllers = controllers
        self.kills: list[str] = []
        self._started = 0
        self._changed = trio.Event()
        self._last = ""

    def start(self) -> None:
        self._started += 1
        self.controllers.start(f"c{self._started}")

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            for kind in OF_A_VOLUME:
                informer = Informer(self.kube, kind, changed=self._saw)
                nursery.start_soon(informer.run)
                await informer.synced.wait()
            for _ in range(2):
                self.start()
            task_status.started()
            while True:
                await self._changed.wait()
                self._changed = trio.Event()
                with contextlib.suppress(KubeError):
                    await self._kill()

    def _saw(self, item: Object) -> None:
        self._last = f"{item.PLURAL}/{item.name}"
        self._changed.set()

    async def _kill(self) -> None:
        lease = await self.kube.find(Lease, LEADER_LEASE)
        if lease is None or lease.spec.holder_identity not in self.controllers.running:
            return
        self.controllers.kill(lease.spec.holder_identity)
        self.kills.append(self._last)
        self.start()
        # that a lease runs out is shown elsewhere
        await self.kube.patch(Lease, LEADER_LEASE, {"spec": {"holderIdentity": ""}})


async def test_the_leader_is_killed_at_every_step(
    kube: Client, nodes: Nodes, controllers: Controllers, nursery: trio.Nursery
) -> None:
    killer = Killer(kube, controllers)
    await nursery.start(killer.run)
    await kube.create(Volume(metadata=ObjectMeta(name="vol1"), spec=VolumeSpec(size=1 << 30, replicas=2)))
    await until(state_is(kube, "stopped"), controllers, 120)
    await kube.patch(ShareManager, "vol1", {"spec": {"attachments": {nodes.names[0]: {}}}})
    share = await until(state_is(kube, "running"), controllers, 120)
    nodes.dead.add(share.status.node)
    after = await until(state_is(kube, "running", but=share.status.pod), controllers, 120)
    assert after.status.endpoint == share.status.endpoint
    assert after.status.node != share.status.node
    assert after.status.epoch > share.status.epoch
    await kube.patch(ShareManager, "vol1", {"spec": {"attachments": None}})
    await until(state_is(kube, "stopped"), controllers, 120)
    assert len((await kube.list(Replica)).items) == 2
    await kube.patch(Volume, "vol1", {"metadata": {"annotations": {ERASE_ANNOTATION: "vol1"}}})
    nodes.dead.clear()
    await kube.delete(Volume, "vol1")
    await until(nothing_is_left(kube), controllers, 120)
    print(f"{len(killer.kills)} leaders killed, after changes of: {', '.join(killer.kills)}")
    assert len(killer.kills) >= 15


async def test_what_a_hundred_idle_shares_write(
    kube: Client, controllers: Controllers, control_plane: ControlPlane, nursery: trio.Nursery
) -> None:
    """With what ten agents write, and two controllers, below fifteen writes a second (docs/kubernetes.md)."""
    nodes = Nodes(kube, kube.namespace, 10)
    await nodes.make()
    nursery.start_soon(nodes.beat)
    nursery.start_soon(nodes.act)
    for identity in ("one", "two"):
        controllers.start(identity)
    names = [f"vol{number}" for number in range(100)]
    for name in names:
        await kube.create(Volume(metadata=ObjectMeta(name=name), spec=VolumeSpec(size=1 << 30, replicas=2)))

    async def all_are(state: str) -> bool:
        return sum(one.status.state == state for one in (await kube.list(ShareManager)).items) == len(names)

    async def settled() -> bool:
        volumes = (await kube.list(Volume)).items
        return await all_are("stopped") and all(one.status.state == "ready" for one in volumes)

    await until(settled, controllers, 200)
    for name in names:
        await kube.patch(ShareManager, name, {"spec": {"attachments": {"client": {}}}})
    await until(lambda: all_are("running"), controllers, 200)
    nursery.start_soon(nodes.report_again, names, REPORT_AGAIN)
    rates: list[float] = []
    # on a busy machine the last of them may not have come to rest
    while len(rates) < 3 and (not rates or rates[-1] >= 15):
        await trio.sleep(5)
        began, before = trio.current_time(), control_plane.revision()
        await trio.sleep(30)
        rates.append((control_plane.revision() - before) / (trio.current_time() - began))
        print(f"{rates[-1]:.1f} writes a second")
    nursery.cancel_scope.cancel()
    assert rates[-1] < 15
