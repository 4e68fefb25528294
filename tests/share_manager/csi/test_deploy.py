"""The manifests in deploy/csi: they fit together, and their rights are enough for the driver and not more.

That an API server takes them is in tests/project/test_manifests.py.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import yaml

from share_manager.csi.bridge import parse_endpoint, serving
from share_manager.csi.controller import Controller
from share_manager.csi.identity import DRIVER
from share_manager.csi.parameters import read
from share_manager.csi.presence import Follower, publish_once
from share_manager.csi.protocol import csi_pb2 as pb
from share_manager.kube.client import Client
from share_manager.kube.core import Secret
from share_manager.kube.errors import ForbiddenError
from share_manager.kube.resources import ShareManager, StorageNode, Volume
from tests.lab.control_plane import ControlPlane
from tests.project.test_manifests import DEPLOY, documents
from tests.share_manager.csi.caller import Caller, capability
from tests.share_manager.csi.keeper import Keeper

DIRECTORY = DEPLOY / "csi"


def containers() -> Iterator[dict[str, Any]]:
    for name in ("controller.yaml", "node.yaml"):
        for one in documents(DIRECTORY / name):
            yield from one["spec"]["template"]["spec"]["containers"]


def test_every_sidecar_has_its_version() -> None:
    told = yaml.safe_load((DIRECTORY / "kustomization.yaml").read_text())
    versions = {image["name"]: image["newTag"] for image in told["images"]}
    sidecars = {one["image"] for one in containers() if not one["image"].startswith("share-manager:")}
    assert set(versions) == sidecars
    assert all(re.fullmatch(r"v\d+\.\d+\.\d+", version) for version in versions.values())


def test_the_sockets_of_driver_sidecars_and_kubelet_are_the_same() -> None:
    for one in containers():
        said = [arg for arg in one["args"] if "csi.sock" in arg]
        assert said
        if one["name"] == "driver":
            assert parse_endpoint(said[0]) == Path("/csi/csi.sock")
        else:
            assert "--csi-address=/csi/csi.sock" in said
    registrar = next(one for one in containers() if one["name"] == "registrar")
    assert f"--kubelet-registration-path=/var/lib/kubelet/plugins/{DRIVER}/csi.sock" in registrar["args"]
    assert documents(DIRECTORY / "driver.yaml")[0]["metadata"]["name"] == DRIVER


def test_the_driver_takes_the_storage_classes_that_there_are() -> None:
    for one in documents(DEPLOY / "manifests/storageclasses.yaml"):
        assert one["provisioner"] == DRIVER
        parameters = dict(one["parameters"])
        # external-provisioner takes these out of it
        fs = parameters.pop("csi.storage.k8s.io/fstype")
        request = pb.CreateVolumeRequest(name="v", volume_capabilities=[capability(fs=fs)], parameters=parameters)
        spec = read(request, "").spec
        assert (str(spec.replicas), spec.filesystem) == (parameters["replicas"], fs)
        assert spec.encrypted == ("encrypted" in parameters)
        if spec.encrypted:
            assert parameters["csi.storage.k8s.io/controller-publish-secret-namespace"] == "share-manager"


@pytest.fixture
async def accounts(control_plane: ControlPlane, kube_namespace: str) -> AsyncIterator[dict[str, Client]]:
    control_plane.apply_roles(kube_namespace)

    def client(account: str) -> Client:
        token = control_plane.token_of(kube_namespace, account)
        return Client(control_plane.access(token, kube_namespace))

    admin = Client(control_plane.admin, namespace=kube_namespace)
    async with client("share-manager-csi-controller") as controller, client("share-manager-csi-node") as node, admin:
        yield {"controller": controller, "node": node, "admin": admin}


@pytest.mark.system
async def test_the_controllers_rights_are_enough_for_all_that_it_does(
    accounts: dict[str, Client], control_plane: ControlPlane, tmp_path: Path
) -> None:
    control_plane.call("POST", "/api/v1/nodes", {"metadata": {"name": "rights"}})
    socket = tmp_path / "csi.sock"

    def life() -> None:
        with Caller(socket) as caller:
            create = pb.CreateVolumeRequest(
                name="rights", volume_capabilities=[capability()], parameters={"encrypted": "true"}
            )
            made = caller.call("CreateVolume", create).volume.volume_id
            publish = pb.ControllerPublishVolumeRequest(
                volume_id=made,
                node_id="rights",
                volume_capability=capability(),
                secrets={"CRYPTO_KEY_VALUE": "first"},
            )
            caller.call("ControllerPublishVolume", publish)
            publish.secrets["CRYPTO_KEY_VALUE"] = "second"
            caller.call("ControllerPublishVolume", publish)
            listed = caller.call("ListVolumes", pb.ListVolumesRequest()).entries
            assert [list(one.status.published_node_ids) for one in listed] == [["rights"]]
            caller.call("GetCapacity", pb.GetCapacityRequest())
            caller.call("ControllerUnpublishVolume", pb.ControllerUnpublishVolumeRequest(volume_id=made))
            caller.call("DeleteVolume", pb.DeleteVolumeRequest(volume_id=made))

    async with serving(socket, {"Controller": Controller(accounts["controller"])}), trio.open_nursery() as nursery:
        nursery.start_soon(Keeper(accounts["admin"]).run)
        await trio.to_thread.run_sync(life)
        nursery.cancel_scope.cancel()


@pytest.mark.system
async def test_a_nodes_rights_are_enough_for_all_that_it_does(accounts: dict[str, Client]) -> None:
    await publish_once(accounts["node"], "rights", ("192.0.2.7",))
    await publish_once(accounts["node"], "rights", ("192.0.2.8", "2001:db8::8"))
    found = await accounts["admin"].get(StorageNode, "rights")
    assert found.status.addresses == ("192.0.2.8", "2001:db8::8")

    async def moved(volume: str, address: str, port: int) -> None:
        raise AssertionError("nothing is mounted here")

    follower = Follower(accounts["node"], moved)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(follower.run)
        with trio.fail_after(20):
            await follower.synced.wait()
        nursery.cancel_scope.cancel()
    listing = await accounts["node"].list(ShareManager)
    async with accounts["node"].watch(ShareManager, listing.version):
        pass


@pytest.mark.system
async def test_nobody_has_more_rights_than_that(accounts: dict[str, Client], kube_namespace: str) -> None:
    controller, node = accounts["controller"], accounts["node"]
    for client, kind, namespace in (
        (controller, Secret, ""),
        (controller, Secret, "kube-system"),
        (node, Secret, kube_namespace),
        (node, Volume, kube_namespace),
        (controller, Volume, "default"),
    ):
        with pytest.raises(ForbiddenError):
            await client.list(kind, namespace=namespace)
    with pytest.raises(ForbiddenError):
        await node.patch(ShareManager, "x", {"spec": {"node": "mine"}})
    with pytest.raises(ForbiddenError):
        await controller.patch(ShareManager, "x", {"status": {"state": "running"}}, subresource="status")
    with pytest.raises(ForbiddenError):
        await node.patch(StorageNode, "rights", {"spec": {"schedulable": False}})
