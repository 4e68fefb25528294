"""Shares in Kubernetes under a kernel client that appends and syncs.

A real API server; controllers, agents and pods as processes under their own rights. After each fault: no error at the
client, every acknowledged record in the file.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from share_manager.kube.resources import StorageNode, Volume
from tests.conftest import Progress
from tests.lab.control_plane import ControlPlane
from tests.lab.guest import Guest
from tests.lab.kube_cluster import KubeCluster
from tests.lab.mounts import Export, mounted
from tests.lab.network import Lab
from tests.lab.nodes import PROGRAM
from tests.lab.stalls import Stalls, worst_after
from tests.lab.workloads import appender

AWAY = float(os.environ.get("KUBE_AWAY", "12"))
"""Seconds for which the API server is away."""

pytestmark = [pytest.mark.system, pytest.mark.timeout(600 + AWAY)]

VOLUME = "vol1"


@pytest.fixture
def cluster(lab: Lab, control_plane: ControlPlane) -> Iterator[KubeCluster]:
    with KubeCluster(lab, control_plane, "one") as cluster:
        yield cluster


def serve(cluster: KubeCluster, guest: Guest) -> Export:
    """A volume that is published to the guest, as a node of its own."""
    export = {"leaseLifetime": 10, "gracePeriod": 10}
    body = {"metadata": {"name": VOLUME}, "spec": {"size": 256 << 20, "replicas": 2, "export": export}}
    cluster.make(Volume, body)
    cluster.wait_state(VOLUME, "stopped")
    cluster.make(StorageNode, {"metadata": {"name": "client"}, "spec": {"schedulable": False}})
    cluster.merge(cluster.of("storagenodes", "client/status"), {"status": {"addresses": [guest.address]}})
    cluster.merge(cluster.of("sharemanagers", VOLUME), {"spec": {"attachments": {"client": {}}}})
    status = cluster.wait_state(VOLUME, "running")
    address, _, name = status["endpoint"].removeprefix("nfs://").partition("/")
    assert name == VOLUME
    guest.run("ip", "route", "replace", "10.96.0.0/16", "via", "10.99.0.1")
    return Export(address, 2049, f"/{VOLUME}")


def node_of(cluster: KubeCluster, status: Any) -> str:
    return next(name for name, node in cluster.nodes.items() if node.name == status["node"])


def adopt(cluster: KubeCluster) -> None:
    command = [PROGRAM, "volume", "adopt"]
    where = ["--kubeconfig", str(cluster.plane.kubeconfig()), "--namespace", cluster.namespace, "--output", "json"]

    def listed() -> Any:
        found = json.loads(subprocess.check_output([*command, *where]))
        return found if found and found[0]["present"] == ["r1", "r2"] else None

    (found,) = cluster.wait(listed, "told of by its nodes")
    # whoever was powered on a moment ago may not have caught up before nobody mounted it any more
    assert (found["volume"], found["doubts"]) == (VOLUME, [])
    assert {*found["in_sync"]} & {"r1", "r2"}
    subprocess.run([*command, VOLUME, *where], check=True)
    again = subprocess.run([*command, VOLUME, *where], check=False, capture_output=True, text=True)
    assert again.returncode == 4
    assert "there is a volume vol1 already" in again.stderr


def test_a_share_goes_on_whatever_dies(
    cluster: KubeCluster, one: Guest, stalls: Stalls, progress: Progress, control_plane: ControlPlane
) -> None:
    export = serve(cluster, one)
    faults: list[tuple[str, float, float]] = []
    with mounted(one, export, options="noresvport") as place:
        job = one.spawn(appender.append, path=f"{place}/log")
        job.wait_event("running")

        @contextlib.contextmanager
        def fault(kind: str) -> Iterator[Any]:
            before = cluster.share(VOLUME)
            began = time.time()
            yield before
            job.wait_event("progress", timeout=120, after=time.time() + 1)
            faults.append((kind, began, time.time()))
            progress(f"{kind}: records flow again")

        try:
            # nothing of it is in the data path
            with fault(f"the API server away for {AWAY:g} s"), control_plane.away():
                time.sleep(AWAY)
            assert cluster.share(VOLUME)["state"] == "running"

            with fault("a planned move") as status:
                target = next(node.name for node in cluster.nodes.values() if node.name != status["node"])
                cluster.merge(cluster.of("sharemanagers", VOLUME), {"spec": {"node": target}})
                moved = cluster.wait_state(VOLUME, "running", but=status["pod"])
            assert moved["node"] == target
            cluster.merge(cluster.of("sharemanagers", VOLUME), {"spec": {"node": None}})

            with fault("all of the share's pod killed") as status:
                cluster.kill_pod(status["pod"])
            cluster.wait_state(VOLUME, "running")

            with fault("the share's node, and the leader with it") as status:
                lost = node_of(cluster, status)
                cluster.power_cut(lost)
                cluster.kill_leader()
                after = cluster.wait_state(VOLUME, "running", but=status["pod"])
            assert after["node"] != status["node"]
            assert after["endpoint"] == status["endpoint"]
            assert after["lastFailover"]["before"] == status["node"]
            progress(f"failover: {json.dumps(after['lastFailover'])}")
            cluster.power_on(lost)
        except BaseException:
            print(job.events[-3:], one.kernel_log(), sep="\n")
            raise
        outcome = job.finish()
        for kind, began, mended in faults:
            stalls.add(f"kubernetes: {kind}", worst_after(outcome["gaps"], began, mended))
        gaps = [round(gap["end"] - gap["start"], 2) for gap in outcome["gaps"]]
        progress(f"{outcome['acknowledged']} records, gaps {gaps}")
        assert outcome["errors"] == []
        assert one.call(appender.verify, path=f"{place}/log", acknowledged=outcome["acknowledged"]) == []
        assert "lost" not in one.kernel_log()
    # deleted without a word about its data, and brought back
    cluster.call("DELETE", cluster.of("volumes", VOLUME))
    cluster.wait(lambda: cluster.find(cluster.of("volumes", VOLUME)) is None, "gone")
    adopt(cluster)
    cluster.wait_state(VOLUME, "stopped")
    cluster.merge(cluster.of("sharemanagers", VOLUME), {"spec": {"attachments": {"client": {}}}})
    address = cluster.wait_state(VOLUME, "running")["endpoint"].removeprefix("nfs://").partition("/")[0]
    with mounted(one, Export(address, 2049, f"/{VOLUME}"), options="noresvport") as place:
        assert one.call(appender.verify, path=f"{place}/log", acknowledged=outcome["acknowledged"]) == []
    cluster.merge(cluster.of("sharemanagers", VOLUME), {"spec": {"attachments": None}})
    cluster.wait_state(VOLUME, "stopped")
    erase = {"metadata": {"annotations": {"share-manager.io/erase-data": VOLUME}}}
    cluster.merge(cluster.of("volumes", VOLUME), erase)
    cluster.call("DELETE", cluster.of("volumes", VOLUME))
    cluster.wait(lambda: cluster.find(cluster.of("volumes", VOLUME)) is None, "gone")
    for node in cluster.nodes.values():
        assert list((node.data_dir / "replicas").glob("*")) == []
