"""What `doctor --cluster` says of a real API server, and of objects that are not well."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, Literal

import msgspec
import pytest

from share_manager.controllers.manager import LEADER_LEASE
from share_manager.kube.client import Client
from share_manager.kube.core import Lease, LeaseSpec
from share_manager.kube.meta import Condition, ObjectMeta
from share_manager.kube.resources import (
    ShareManager,
    ShareManagerStatus,
    StorageNode,
    StorageNodeStatus,
    Volume,
    VolumeSpec,
    VolumeStatus,
)
from share_manager.pods.doctor import check_nodes, check_shares, check_version, check_volumes
from tests.lab.control_plane import ControlPlane


def condition(type_: str, status: Literal["True", "False"], message: str) -> tuple[Condition, ...]:
    return (Condition(type=type_, status=status, reason="R", message=message),)


def volume(name: str, **status: Any) -> Volume:
    return Volume(metadata=ObjectMeta(name=name), spec=VolumeSpec(size=1 << 30), status=VolumeStatus(**status))


def test_versions() -> None:
    assert check_version("1", "27+").result == "warning"
    assert check_version("1", "28").result == "ok"
    assert check_version("1", "31-gke.7").result == "ok"
    assert check_version("", "").result == "warning"


def test_what_is_not_well_is_told_with_its_words() -> None:
    node = StorageNode(
        metadata=ObjectMeta(name="a"), status=StorageNodeStatus(conditions=condition("Ready", "False", "it is silent"))
    )
    assert [check.detail for check in check_nodes([node])] == ["0 of 1 are ready", "it is silent"]
    assert check_nodes([])[0].result == "failed"
    broken = volume("v", state="faulted", conditions=condition("Healthy", "False", "bring node a back"))
    fewer = volume("w", state="ready", conditions=condition("Healthy", "False", "two of three"))
    assert [(check.result, check.detail) for check in check_volumes([broken, fewer])[1:]] == [
        ("failed", "bring node a back"),
        ("warning", "two of three"),
    ]
    status = ShareManagerStatus(state="error", conditions=condition("Available", "False", "no pod"))
    share = ShareManager(metadata=ObjectMeta(name="v"), status=status)
    assert [check.result for check in check_shares([share])] == ["ok", "failed"]


def doctor(plane: ControlPlane, namespace: str) -> tuple[int, dict[str, str]]:
    argv = [sys.executable, "-m", "share_manager", "doctor", "--cluster", "--output", "json"]
    argv += ["--kubeconfig", str(plane.kubeconfig(namespace=namespace)), "--namespace", namespace]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr == ""
    return done.returncode, {one["name"]: one["result"] for one in msgspec.json.decode(done.stdout)["checks"]}


@pytest.mark.system
async def test_a_cluster(kube: Client, control_plane: ControlPlane) -> None:
    status, found = doctor(control_plane, kube.namespace)
    assert status == 3
    assert found["definitions"] == "ok"
    assert (found["controller"], found["nodes"]) == ("failed", "failed")
    # one that held the lease, and does not renew it
    spec = LeaseSpec(holder_identity="one")
    await kube.create(Lease(metadata=ObjectMeta(name=LEADER_LEASE), spec=spec))
    assert doctor(control_plane, kube.namespace)[1]["controller"] == "failed"
