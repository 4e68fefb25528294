"""From CreateVolume to DeleteVolume: the driver's two processes under their own rights, between the product's
controllers, replicas and share at a real API server, and two guests whose kernels mount what it says."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from share_manager.csi.protocol import csi_pb2 as pb
from tests.conftest import Progress
from tests.lab.control_plane import ControlPlane
from tests.lab.guest import Guest
from tests.lab.kube_cluster import KubeCluster
from tests.lab.network import SERVER, Lab
from tests.lab.nodes import PROGRAM
from tests.lab.plugin import NodePlugin
from tests.lab.stalls import Stalls, worst_after
from tests.lab.workloads import appender, names
from tests.share_manager.csi.caller import Caller, capability

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]


@pytest.fixture
def cluster(lab: Lab, control_plane: ControlPlane) -> Iterator[KubeCluster]:
    with KubeCluster(lab, control_plane, "csi") as cluster:
        yield cluster


@pytest.fixture
def controller(cluster: KubeCluster, control_plane: ControlPlane, tmp_path: Path) -> Iterator[Caller]:
    """external-provisioner's and external-attacher's way to the driver."""
    socket = tmp_path / "csi.sock"
    token = control_plane.token_of(cluster.namespace, "share-manager-csi-controller")
    access = ["--kubeconfig", str(control_plane.kubeconfig(token, cluster.namespace))]
    with (tmp_path / "log").open("wb") as log:
        argv = [PROGRAM, "csi", "controller", "--endpoint", f"unix://{socket}", *access]
        process = subprocess.Popen(argv, stderr=log, stdin=subprocess.DEVNULL)
    try:
        cluster.wait(socket.exists, "a driver")
        with Caller(socket) as caller:
            yield caller
    finally:
        process.terminate()
        status = process.wait(20)
        print((tmp_path / "log").read_text())
    assert status == 0


class Workload:
    """A volume of a pod on one node, through the driver's calls alone."""

    def __init__(self, cluster: KubeCluster, controller: Caller, plugin: NodePlugin, guest: Guest) -> None:
        self.controller = controller
        self.guest = guest
        self.plugin = plugin
        self.staged = "/run/kubelet/staged/globalmount"
        self.target = "/run/kubelet/pod"
        guest.run("mkdir", "-p", "/run/kubelet")
        guest.run("ip", "route", "replace", "10.96.0.0/16", "via", SERVER)
        cluster.call("POST", "/api/v1/nodes", {"metadata": {"name": plugin.name}})

    def up(self, volume: str) -> str:
        request = pb.ControllerPublishVolumeRequest(
            volume_id=volume, node_id=self.plugin.name, volume_capability=capability()
        )
        context = dict(self.controller.call("ControllerPublishVolume", request, 60).publish_context)
        common: dict[str, Any] = {
            "volume_id": volume,
            "staging_target_path": self.staged,
            "volume_capability": capability(),
            "publish_context": context,
        }
        with self.plugin.caller() as caller:
            caller.call("NodeStageVolume", pb.NodeStageVolumeRequest(**common), 120)
            caller.call("NodePublishVolume", pb.NodePublishVolumeRequest(target_path=self.target, **common), 60)
        return self.target

    def down(self, volume: str) -> None:
        with self.plugin.caller() as caller:
            unpublish = pb.NodeUnpublishVolumeRequest(volume_id=volume, target_path=self.target)
            caller.call("NodeUnpublishVolume", unpublish, 60)
            unstage = pb.NodeUnstageVolumeRequest(volume_id=volume, staging_target_path=self.staged)
            caller.call("NodeUnstageVolume", unstage, 60)
        request = pb.ControllerUnpublishVolumeRequest(volume_id=volume, node_id=self.plugin.name)
        self.controller.call("ControllerUnpublishVolume", request, 60)


def test_a_volume_is_made_mounted_by_two_nodes_failed_over_and_erased(
    cluster: KubeCluster,
    controller: Caller,
    control_plane: ControlPlane,
    one: Guest,
    two: Guest,
    stalls: Stalls,
    progress: Progress,
) -> None:
    began = time.monotonic()
    create = pb.CreateVolumeRequest(
        name="pvc-1",
        capacity_range=pb.CapacityRange(required_bytes=256 << 20),
        volume_capabilities=[capability()],
        parameters={"replicas": "2", "leaseLifetime": "10", "gracePeriod": "10"},
    )
    volume = controller.call("CreateVolume", create, 120).volume.volume_id
    progress(f"csi: volume made {time.monotonic() - began:.1f} s after it was asked for")
    assert cluster.wait_state(volume, "stopped"), "nobody mounts it"
    token = control_plane.token_of(cluster.namespace, "share-manager-csi-node")
    access = control_plane.kubeconfig(token, cluster.namespace, f"https://{SERVER}:{control_plane.port}")

    with contextlib.ExitStack() as stack:
        workloads = []
        for guest in (one, two):
            name = f"{guest.name}{cluster.lab.mark}"
            plugin = NodePlugin(guest, name=name, kubeconfig=access, namespace=cluster.namespace)
            stack.callback(plugin.close)
            stack.callback(plugin.tell)
            workloads.append(Workload(cluster, controller, plugin.start(), guest))
        began = time.monotonic()
        here = workloads[0].up(volume)
        progress(f"csi: mounted {time.monotonic() - began:.1f} s after it was asked for")
        there = workloads[1].up(volume)
        status = cluster.wait_state(volume, "running")
        assert status["endpoint"] == f"nfs://{status['serviceIP']}/{volume}"
        attached = cluster.call("GET", cluster.of("sharemanagers", volume))["spec"]["attachments"]
        assert set(attached) == {workload.plugin.name for workload in workloads}
        for workload in workloads:
            known = cluster.call("GET", cluster.of("storagenodes", workload.plugin.name))
            assert workload.guest.address in known["status"]["addresses"]
        one.call(names.write_text, path=f"{here}/greeting", text="hello")
        assert two.call(names.read_text, path=f"{there}/greeting") == "hello"

        job = one.spawn(appender.append, path=f"{here}/records")
        job.wait_event("running")
        killed = time.time()
        cluster.power_cut(next(name for name, node in cluster.nodes.items() if node.name == status["node"]))
        after = cluster.wait_state(volume, "running", but=status["pod"])
        assert after["endpoint"] == status["endpoint"]
        two.call(names.write_text, path=f"{there}/after", text="x")
        job.wait_event("progress", timeout=60, after=time.time())
        outcome = job.finish()
        stalls.add("csi: the share's node", worst_after(outcome["gaps"], killed, time.time()))
        assert outcome["errors"] == []
        assert two.call(appender.verify, path=f"{there}/records", acknowledged=outcome["acknowledged"]) == []
        assert any('"switched"' in workload.plugin.log for workload in workloads)

        for workload in workloads:
            workload.down(volume)
        cluster.wait_state(volume, "stopped")
        for name, node in cluster.nodes.items():
            if not node.alive:
                cluster.power_on(name)
        controller.call("DeleteVolume", pb.DeleteVolumeRequest(volume_id=volume), 90)
        assert cluster.find(cluster.of("volumes", volume)) is None
        assert cluster.find(cluster.of("sharemanagers", volume)) is None
        for node in cluster.nodes.values():
            assert list((node.data_dir / "replicas").glob("*")) == []
