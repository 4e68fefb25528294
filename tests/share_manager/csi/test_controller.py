"""The Controller service over its socket, with a real API server behind it: the specification's calls and codes."""

from __future__ import annotations

import base64
import functools
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from google.protobuf.message import Message

from share_manager.controllers.placement import DISK
from share_manager.csi.bridge import serving
from share_manager.csi.controller import CLAIM_ANNOTATION, Controller
from share_manager.csi.identity import Identity
from share_manager.csi.names import volume_id
from share_manager.csi.node import Target
from share_manager.csi.protocol import csi_pb2 as pb
from share_manager.kube.client import Client
from share_manager.kube.core import Secret, Service
from share_manager.kube.errors import NotFoundError
from share_manager.kube.meta import Condition, ObjectMeta
from share_manager.kube.resources import (
    ERASE_ANNOTATION,
    VOLUME_LABEL,
    DiskStatus,
    ShareManager,
    StorageNode,
    StorageNodeStatus,
    Volume,
)
from tests.lab.control_plane import ControlPlane
from tests.share_manager.csi.caller import Caller, Refused, capability
from tests.share_manager.csi.keeper import Keeper

pytestmark = pytest.mark.system

GIB = 1 << 30
OLD, NEW, THIRD = "node-old", "node-new", "node-third"
PASSPHRASE = {"CRYPTO_KEY_VALUE": "correct horse", "CRYPTO_KEY_PROVIDER": "secret"}


@pytest.fixture(scope="module")
def machines(control_plane: ControlPlane) -> None:
    for name, kernel in ((OLD, "6.1.0-13-amd64"), (NEW, "6.19.1"), (THIRD, "6.6.1")):
        machine(control_plane, name, kernel)


def machine(control_plane: ControlPlane, name: str, kernel: str) -> None:
    control_plane.call("POST", "/api/v1/nodes", {"metadata": {"name": name}})
    set_kernel(control_plane, name, kernel)


def set_kernel(control_plane: ControlPlane, name: str, kernel: str) -> None:
    blank = ("machineID", "systemUUID", "bootID", "osImage", "containerRuntimeVersion", "kubeletVersion")
    more = ("kubeProxyVersion", "operatingSystem", "architecture")
    info = dict.fromkeys((*blank, *more), "") | {"kernelVersion": kernel}
    body = {"metadata": {"name": name}, "status": {"nodeInfo": info}}
    control_plane.call("PUT", f"/api/v1/nodes/{name}/status", body)


class Driver:
    """The calls, for trio."""

    def __init__(self, caller: Caller, keeper: Keeper, kube: Client) -> None:
        self.caller = caller
        self.keeper = keeper
        self.kube = kube

    async def call(self, name: str, request: Message, timeout: float = 20.0) -> Any:
        return await trio.to_thread.run_sync(self.caller.call, name, request, timeout)

    async def refusal(self, name: str, request: Message, timeout: float = 20.0) -> Refused:
        return await trio.to_thread.run_sync(self.caller.refusal, name, request, timeout)

    async def create(self, name: str, **values: Any) -> pb.Volume:
        made: pb.Volume = (await self.call("CreateVolume", creating(name, **values))).volume
        return made

    async def publish(self, volume: str, node: str = OLD, **values: Any) -> dict[str, str]:
        answer = await self.call("ControllerPublishVolume", publishing(volume, node, **values))
        return dict(answer.publish_context)

    async def unpublish(self, volume: str, node: str = "") -> None:
        request = pb.ControllerUnpublishVolumeRequest(volume_id=volume, node_id=node)
        await self.call("ControllerUnpublishVolume", request)

    async def secrets(self) -> tuple[Secret, ...]:
        """The API server of old makes some of its own."""
        return (await self.kube.list(Secret, labels=VOLUME_LABEL)).items

    async def delete(self, volume: str) -> None:
        await self.call("DeleteVolume", pb.DeleteVolumeRequest(volume_id=volume))


def creating(name: str, **values: Any) -> pb.CreateVolumeRequest:
    base: dict[str, Any] = {
        "name": name,
        "capacity_range": pb.CapacityRange(required_bytes=GIB),
        "volume_capabilities": [capability()],
    }
    return pb.CreateVolumeRequest(**(base | values))


def publishing(volume: str, node: str, **values: Any) -> pb.ControllerPublishVolumeRequest:
    base: dict[str, Any] = {"volume_id": volume, "node_id": node, "volume_capability": capability()}
    return pb.ControllerPublishVolumeRequest(**(base | values))


@pytest.fixture
async def driver(kube: Client, tmp_path: Path, machines: None) -> AsyncIterator[Driver]:
    keeper = Keeper(kube)

    async def ready() -> bool:
        return True

    identity = Identity("1", controller=True, ready=ready)
    path = tmp_path / "csi.sock"
    async with serving(path, {"Identity": identity, "Controller": Controller(kube)}), trio.open_nursery() as nursery:
        nursery.start_soon(keeper.run)
        with Caller(path) as caller:
            yield Driver(caller, keeper, kube)
        nursery.cancel_scope.cancel()


async def test_a_volume_from_its_creation_to_its_end_each_call_twice(driver: Driver) -> None:
    parameters = {"replicas": "2", "nfsOptions": "vers=4.1", "csi.storage.k8s.io/pvc/name": "claim"}
    parameters["csi.storage.k8s.io/pvc/namespace"] = "team"
    made = await driver.create("pvc-1", parameters=parameters)
    assert (made.volume_id, made.capacity_bytes, dict(made.volume_context)) == (
        "pvc-1",
        GIB,
        {"nfsOptions": "vers=4.1"},
    )
    assert await driver.create("pvc-1", parameters=parameters) == made
    stored = await driver.kube.get(Volume, "pvc-1")
    assert (stored.spec.size, stored.spec.replicas, stored.spec.original_name) == (GIB, 2, "")
    assert stored.metadata.annotations[CLAIM_ANNOTATION] == "team/claim"

    context = await driver.publish("pvc-1", volume_context=dict(made.volume_context))
    assert await driver.publish("pvc-1", volume_context=dict(made.volume_context)) == context
    share = await driver.kube.get(ShareManager, "pvc-1")
    service = await driver.kube.get(Service, "pvc-1")
    assert (context["server"], context["port"], context["share"]) == (service.spec.cluster_ip, "2049", "/pvc-1")
    assert context["options"].startswith("vers=4.1,hard,")
    assert Target.parse(context, "pvc-1").context() == context
    assert share.spec.attachments[OLD].nfs_options == context["options"]

    refused = await driver.refusal("DeleteVolume", pb.DeleteVolumeRequest(volume_id="pvc-1"))
    assert refused.code == "FAILED_PRECONDITION"
    assert OLD in refused.message
    for _ in range(2):
        await driver.unpublish("pvc-1", OLD)
    assert (await driver.kube.get(ShareManager, "pvc-1")).spec.attachments == {}
    for _ in range(2):
        await driver.delete("pvc-1")
    with pytest.raises(NotFoundError):
        await driver.kube.get(Volume, "pvc-1")
    await driver.unpublish("pvc-1", OLD)


@pytest.mark.parametrize(
    ("name", "request_", "code"),
    [
        ("CreateVolume", pb.CreateVolumeRequest(), "INVALID_ARGUMENT"),
        ("CreateVolume", creating(""), "INVALID_ARGUMENT"),
        ("CreateVolume", creating("a" * 129), "INVALID_ARGUMENT"),
        ("CreateVolume", creating("a\x01b"), "INVALID_ARGUMENT"),
        ("CreateVolume", creating("v", volume_capabilities=[]), "INVALID_ARGUMENT"),
        ("CreateVolume", creating("v", volume_capabilities=[capability(block=True)]), "INVALID_ARGUMENT"),
        ("CreateVolume", creating("v", parameters={"nonsense": "1"}), "INVALID_ARGUMENT"),
        ("CreateVolume", creating("v", parameters={"nfsOptions": "port=1"}), "INVALID_ARGUMENT"),
        ("CreateVolume", creating("v", mutable_parameters={"a": "b"}), "INVALID_ARGUMENT"),
        (
            "CreateVolume",
            creating(
                "v",
                volume_content_source=pb.VolumeContentSource(
                    snapshot=pb.VolumeContentSource.SnapshotSource(snapshot_id="s")
                ),
            ),
            "INVALID_ARGUMENT",
        ),
        ("CreateVolume", creating("v", capacity_range=pb.CapacityRange(required_bytes=1 << 60)), "OUT_OF_RANGE"),
        ("CreateVolume", creating("v", capacity_range=pb.CapacityRange(limit_bytes=4096)), "OUT_OF_RANGE"),
        ("DeleteVolume", pb.DeleteVolumeRequest(), "INVALID_ARGUMENT"),
        ("DeleteVolume", pb.DeleteVolumeRequest(volume_id="a" * 129), "INVALID_ARGUMENT"),
        ("ControllerPublishVolume", pb.ControllerPublishVolumeRequest(), "INVALID_ARGUMENT"),
        ("ControllerPublishVolume", publishing("", OLD), "INVALID_ARGUMENT"),
        ("ControllerPublishVolume", publishing("v", ""), "INVALID_ARGUMENT"),
        ("ControllerPublishVolume", publishing("v", "n" * 257), "INVALID_ARGUMENT"),
        ("ControllerPublishVolume", publishing("v", OLD, volume_capability=None), "INVALID_ARGUMENT"),
        ("ControllerPublishVolume", publishing("v", OLD, volume_capability=capability(block=True)), "INVALID_ARGUMENT"),
        ("ControllerPublishVolume", publishing("v", OLD, volume_context={"a": "b" * 5000}), "INVALID_ARGUMENT"),
        ("ControllerPublishVolume", publishing("no-such", OLD), "NOT_FOUND"),
        ("ControllerPublishVolume", publishing("No Such", OLD), "NOT_FOUND"),
        ("ControllerUnpublishVolume", pb.ControllerUnpublishVolumeRequest(node_id=OLD), "INVALID_ARGUMENT"),
        ("ValidateVolumeCapabilities", pb.ValidateVolumeCapabilitiesRequest(), "INVALID_ARGUMENT"),
        ("ValidateVolumeCapabilities", pb.ValidateVolumeCapabilitiesRequest(volume_id="v"), "INVALID_ARGUMENT"),
        (
            "ValidateVolumeCapabilities",
            pb.ValidateVolumeCapabilitiesRequest(volume_id="no-such", volume_capabilities=[capability()]),
            "NOT_FOUND",
        ),
        ("ListVolumes", pb.ListVolumesRequest(max_entries=-1), "INVALID_ARGUMENT"),
        ("ListVolumes", pb.ListVolumesRequest(starting_token="invalid-token"), "ABORTED"),
        ("ListVolumes", pb.ListVolumesRequest(starting_token="a" * 129), "INVALID_ARGUMENT"),
        ("GetCapacity", pb.GetCapacityRequest(parameters={"replicas": "0"}), "INVALID_ARGUMENT"),
    ],
)
async def test_codes_of_requests_that_cannot_be(driver: Driver, name: str, request_: Message, code: str) -> None:
    refused = await driver.refusal(name, request_)
    assert refused.code == code, refused.message
    assert (await driver.kube.list(Volume)).items == ()


async def test_a_volume_that_is_different_is_not_taken_for_the_one_asked_for(driver: Driver) -> None:
    await driver.create("pvc-1")
    for other in (
        {"capacity_range": pb.CapacityRange(required_bytes=2 * GIB)},
        {"capacity_range": pb.CapacityRange(limit_bytes=GIB // 2)},
        {"parameters": {"replicas": "1"}},
        {"volume_capabilities": [capability("SINGLE_NODE_WRITER")]},
        {"volume_capabilities": [capability(fs="xfs")]},
    ):
        assert (await driver.refusal("CreateVolume", creating("pvc-1", **other))).code == "ALREADY_EXISTS"
    assert (
        await driver.create("pvc-1", capacity_range=pb.CapacityRange(required_bytes=GIB // 2))
    ).capacity_bytes == GIB


async def test_names_of_any_characters_keep_their_volumes_apart(driver: Driver) -> None:
    names = ["My Volume", "my volume", "my-volume", "Ünïcödé ☃", "0", "a" * 128, "a/b\\c:d", "tab\tand\nline"]
    ids = {name: (await driver.create(name)).volume_id for name in names}
    assert ids == {name: volume_id(name) for name in names}
    assert len(set(ids.values())) == len(names)
    for name, one in ids.items():
        kept = (await driver.kube.get(Volume, one)).spec.original_name
        assert kept == ("" if name == one else name)
        assert (await driver.create(name)).volume_id == one


async def test_a_volume_that_is_not_ready_says_what_it_waits_for_and_can_be_asked_for_again(driver: Driver) -> None:
    driver.keeper.held = True
    began = time.monotonic()
    refused = await driver.refusal("CreateVolume", creating("pvc-1"), 2.0)
    assert refused.code == "UNAVAILABLE"
    assert driver.keeper.problem in refused.message
    assert 1.4 < time.monotonic() - began < 2.0
    driver.keeper.held = False
    assert (await driver.create("pvc-1")).volume_id == "pvc-1"
    assert len((await driver.kube.list(Volume)).items) == 1


async def test_concurrent_calls_end_in_one_volume_and_one_publication(driver: Driver) -> None:
    codes: list[str] = []

    async def ask(name: str, request: Message) -> None:
        try:
            await driver.call(name, request)
            codes.append("OK")
        except Refused as refused:
            codes.append(refused.code)

    async def all_of(name: str, requests: list[Any]) -> None:
        codes.clear()
        async with trio.open_nursery() as nursery:
            for request in requests:
                nursery.start_soon(ask, name, request)
        assert "OK" in codes
        assert set(codes) <= {"OK", "ABORTED"}

    await all_of("CreateVolume", [creating("pvc-1")] * 8)
    assert len((await driver.kube.list(Volume)).items) == 1
    await all_of("ControllerPublishVolume", [publishing("pvc-1", OLD)] * 8)
    assert list((await driver.kube.get(ShareManager, "pvc-1")).spec.attachments) == [OLD]
    unpublish = pb.ControllerUnpublishVolumeRequest(volume_id="pvc-1", node_id=OLD)
    await all_of("ControllerUnpublishVolume", [unpublish] * 8)
    await all_of("DeleteVolume", [pb.DeleteVolumeRequest(volume_id="pvc-1")] * 8)
    assert (await driver.kube.list(Volume)).items == ()


async def test_two_drivers_at_once_lose_no_publication(driver: Driver, tmp_path: Path) -> None:
    """As while a new leader of the sidecars begins and the old one has not ended."""
    await driver.create("pvc-1")
    other = tmp_path / "other.sock"
    async with serving(other, {"Controller": Controller(driver.kube)}):
        with Caller(other) as second:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(driver.publish, "pvc-1", OLD)
                call = functools.partial(second.call, "ControllerPublishVolume", publishing("pvc-1", THIRD))
                nursery.start_soon(trio.to_thread.run_sync, call)
    assert set((await driver.kube.get(ShareManager, "pvc-1")).spec.attachments) == {OLD, THIRD}


async def test_many_nodes_mount_a_volume_each_with_what_its_kernel_can(driver: Driver) -> None:
    await driver.create("pvc-1")
    assert (await driver.publish("pvc-1", OLD))["options"].startswith("vers=4.2,")
    assert (await driver.publish("pvc-1", NEW))["options"].startswith("vers=4.0,"), "directory delegations"
    flags = capability(flags=("timeo=50", "noatime"))
    assert "timeo=50" in (await driver.publish("pvc-1", THIRD, volume_capability=flags))["options"]
    assert set((await driver.kube.get(ShareManager, "pvc-1")).spec.attachments) == {OLD, NEW, THIRD}
    refused = await driver.refusal("ControllerPublishVolume", publishing("pvc-1", "no-such-node"))
    assert refused.code == "NOT_FOUND"
    assert "no-such-node" in refused.message
    wrong = publishing("pvc-1", OLD, volume_capability=capability(flags=("nolock",)))
    assert (await driver.refusal("ControllerPublishVolume", wrong)).code == "INVALID_ARGUMENT"
    assert (await driver.refusal("ControllerPublishVolume", publishing("pvc-1", OLD, readonly=True))).code == (
        "ALREADY_EXISTS"
    )
    await driver.unpublish("pvc-1")
    assert (await driver.kube.get(ShareManager, "pvc-1")).spec.attachments == {}


async def test_a_publication_stays_as_it_is_when_its_node_gets_another_kernel(
    driver: Driver, control_plane: ControlPlane
) -> None:
    """The mount may be there, with the options that it was made with."""
    machine(control_plane, "node-upgraded", "6.1.0")
    await driver.create("pvc-1")
    before = await driver.publish("pvc-1", "node-upgraded")
    set_kernel(control_plane, "node-upgraded", "6.19.0")
    assert await driver.publish("pvc-1", "node-upgraded") == before
    explicit = publishing("pvc-1", "node-upgraded", volume_capability=capability(flags=("vers=4.1",)))
    assert (await driver.refusal("ControllerPublishVolume", explicit)).code == "ALREADY_EXISTS"
    await driver.unpublish("pvc-1", "node-upgraded")
    assert (await driver.publish("pvc-1", "node-upgraded"))["options"].startswith("vers=4.0,")


async def test_readers(driver: Driver) -> None:
    await driver.create("pvc-1")
    assert "ro" in (await driver.publish("pvc-1", OLD, readonly=True))["options"].split(",")
    reader = capability("MULTI_NODE_READER_ONLY")
    assert "ro" in (await driver.publish("pvc-1", THIRD, volume_capability=reader))["options"].split(",")
    share = await driver.kube.get(ShareManager, "pvc-1")
    assert all(one.read_only for one in share.spec.attachments.values())


async def test_a_volume_for_one_node_goes_to_a_second_when_the_first_has_left(driver: Driver) -> None:
    single = capability("SINGLE_NODE_MULTI_WRITER")
    await driver.create("pvc-1", volume_capabilities=[single])
    assert (await driver.kube.get(Volume, "pvc-1")).spec.access_mode == "ReadWriteOnce"
    await driver.publish("pvc-1", OLD, volume_capability=single)
    refused = await driver.refusal("ControllerPublishVolume", publishing("pvc-1", THIRD, volume_capability=single))
    assert refused.code == "FAILED_PRECONDITION"
    assert OLD in refused.message
    await driver.unpublish("pvc-1", OLD)
    await driver.publish("pvc-1", THIRD, volume_capability=single)


async def test_the_passphrase_of_an_encrypted_volume_is_there_from_the_first_publication_to_the_last(
    driver: Driver, capsys: pytest.CaptureFixture[str]
) -> None:
    await driver.create("pvc-1", parameters={"encrypted": "true"})
    refused = await driver.refusal("ControllerPublishVolume", publishing("pvc-1", OLD))
    assert refused.code == "INVALID_ARGUMENT"
    assert "csi.storage.k8s.io/controller-publish-secret-name" in refused.message
    for wrong in ({"OTHER": "x"}, {"CRYPTO_KEY_VALUE": ""}, {**PASSPHRASE, "CRYPTO_KEY_PROVIDER": "vault"}):
        refused = await driver.refusal("ControllerPublishVolume", publishing("pvc-1", OLD, secrets=wrong))
        assert refused.code == "INVALID_ARGUMENT"
        assert "correct horse" not in refused.message
    assert await driver.secrets() == ()

    await driver.publish("pvc-1", OLD, secrets=PASSPHRASE)
    await driver.publish("pvc-1", NEW, secrets=PASSPHRASE)
    await driver.publish("pvc-1", OLD, secrets=PASSPHRASE)
    share = await driver.kube.get(ShareManager, "pvc-1")
    (secret,) = await driver.secrets()
    assert secret.name == share.spec.passphrase_secret
    assert secret.immutable
    assert secret.metadata.owner_references[0].uid == share.metadata.uid
    assert base64.b64decode(secret.data["CRYPTO_KEY_VALUE"]) == b"correct horse"
    assert "horse" not in secret.name

    # changed in the StorageClass's Secret: the next start has the new one, and the old one is gone
    await driver.publish("pvc-1", THIRD, secrets={"CRYPTO_KEY_VALUE": "battery staple"})
    (renewed,) = await driver.secrets()
    share = await driver.kube.get(ShareManager, "pvc-1")
    assert renewed.name == share.spec.passphrase_secret != secret.name
    await driver.unpublish("pvc-1", OLD)
    await driver.unpublish("pvc-1", NEW)
    assert len(await driver.secrets()) == 1
    await driver.unpublish("pvc-1", THIRD)
    assert await driver.secrets() == ()
    assert (await driver.kube.get(ShareManager, "pvc-1")).spec.passphrase_secret == ""
    written = capsys.readouterr()
    assert "horse" not in written.out + written.err


async def test_a_volume_is_checked_for_what_it_can(driver: Driver) -> None:
    made = await driver.create("pvc-1", parameters={"nfsOptions": "soft"})

    async def validate(*found: pb.VolumeCapability, **values: Any) -> pb.ValidateVolumeCapabilitiesResponse:
        request = pb.ValidateVolumeCapabilitiesRequest(volume_id="pvc-1", volume_capabilities=found, **values)
        answer: pb.ValidateVolumeCapabilitiesResponse = await driver.call("ValidateVolumeCapabilities", request)
        return answer

    both = (capability(), capability("SINGLE_NODE_WRITER", fs="ext4"))
    answer = await validate(*both, volume_context=dict(made.volume_context))
    assert list(answer.confirmed.volume_capabilities) == list(both)
    for wrong in (capability(block=True), capability(fs="xfs")):
        answer = await validate(capability(), wrong)
        assert not answer.HasField("confirmed")
        assert answer.message
    assert not (await validate(capability(), volume_context={"nfsOptions": "hard"})).HasField("confirmed")


async def test_pages_of_the_list_have_every_volume_once_with_its_nodes(driver: Driver) -> None:
    names = [f"pvc-{number}" for number in range(7)]
    for name in names:
        await driver.create(name)
    await driver.publish("pvc-3", OLD)
    everything = await driver.call("ListVolumes", pb.ListVolumesRequest())
    assert [entry.volume.volume_id for entry in everything.entries] == names
    assert everything.next_token == ""
    seen, token = [], ""
    while True:
        request = pb.ListVolumesRequest(max_entries=3, starting_token=token)
        answer = await driver.call("ListVolumes", request)
        assert len(answer.entries) <= 3
        seen += [(entry.volume.volume_id, list(entry.status.published_node_ids)) for entry in answer.entries]
        token = answer.next_token
        if not token:
            break
        if len(seen) == 3:
            await driver.delete("pvc-2")
    assert seen == [(name, [OLD] if name == "pvc-3" else []) for name in names]


async def test_capacity_is_that_of_the_largest_volume(driver: Driver, kube: Client) -> None:
    ask = pb.GetCapacityRequest(parameters={"replicas": "2"}, volume_capabilities=[capability()])
    assert (await driver.call("GetCapacity", ask)).available_capacity == 0
    for name, free in (("a", 5), ("b", 3), ("c", 1)):
        node = await kube.create(StorageNode(metadata=ObjectMeta(name=name)))
        ready = Condition(type="Ready", status="True", last_transition_time="2026-01-01T00:00:00Z")
        status = StorageNodeStatus(
            replica_address="192.0.2.1",
            disks={DISK: DiskStatus(total=10 * GIB, available=free * GIB)},
            conditions=(ready,),
        )
        await kube.update_status(node, msgspec.structs.replace(node, status=status))
    answer = await driver.call("GetCapacity", ask)
    assert (answer.available_capacity, answer.maximum_volume_size.value) == (3 * GIB, 3 * GIB)
    assert answer.minimum_volume_size.value == 64 << 20
    assert (await driver.call("GetCapacity", pb.GetCapacityRequest())).available_capacity == 1 * GIB
    block = pb.GetCapacityRequest(volume_capabilities=[capability(block=True)])
    assert (await driver.call("GetCapacity", block)).available_capacity == 0


async def test_data_is_erased_by_deletion_and_by_nothing_less(driver: Driver, kube: Client) -> None:
    made = await driver.create("pvc-1")
    await kube.patch(Volume, made.volume_id, {"metadata": {"finalizers": ["share-manager.io/test"]}})
    assert ERASE_ANNOTATION not in (await kube.get(Volume, "pvc-1")).metadata.annotations
    request = pb.DeleteVolumeRequest(volume_id="pvc-1")
    refused = await driver.refusal("DeleteVolume", request, 2.0)
    assert refused.code == "UNAVAILABLE"
    leaving = await kube.get(Volume, "pvc-1")
    assert leaving.deleting
    assert leaving.metadata.annotations[ERASE_ANNOTATION] == "pvc-1"
    assert (await driver.refusal("CreateVolume", creating("pvc-1"), 5.0)).code == "ABORTED"
    assert (await driver.refusal("ControllerPublishVolume", publishing("pvc-1", OLD))).code == "NOT_FOUND"
    await kube.patch(Volume, "pvc-1", {"metadata": {"finalizers": None}})
    await driver.delete("pvc-1")


async def test_an_api_server_that_is_away_is_worth_another_try(driver: Driver, control_plane: ControlPlane) -> None:
    await driver.create("pvc-1")
    with control_plane.paused():
        for name, request in (
            ("CreateVolume", creating("pvc-2")),
            ("ControllerPublishVolume", publishing("pvc-1", OLD)),
            ("ListVolumes", pb.ListVolumesRequest()),
        ):
            assert (await driver.refusal(name, request, 15.0)).code == "UNAVAILABLE"
    await driver.create("pvc-2")
    await driver.publish("pvc-1", OLD)


def test_the_command_serves_until_it_is_told_to_stop(
    control_plane: ControlPlane, kube_namespace: str, tmp_path: Path
) -> None:
    program = Path(sys.executable).with_name("share-manager")
    endpoint = tmp_path / "csi.sock"
    argv = [str(program), "csi", "controller", "--endpoint", f"unix://{endpoint}"]
    kubeconfig = control_plane.kubeconfig(namespace=kube_namespace)
    with subprocess.Popen([*argv, "--kubeconfig", kubeconfig], stderr=subprocess.PIPE) as process:
        try:
            end = time.monotonic() + 20
            while not endpoint.exists():
                assert process.poll() is None
                assert time.monotonic() < end
                time.sleep(0.02)
            with Caller(endpoint) as caller:
                assert caller.call("Probe", pb.ProbeRequest()).ready.value
                assert caller.call("ListVolumes", pb.ListVolumesRequest()).entries == []
                kinds = pb.ControllerServiceCapability.RPC
                offered = caller.call("ControllerGetCapabilities", pb.ControllerGetCapabilitiesRequest()).capabilities
                assert {one.rpc.type for one in offered} >= {kinds.CREATE_DELETE_VOLUME, kinds.PUBLISH_UNPUBLISH_VOLUME}
                with control_plane.paused():
                    assert not caller.call("Probe", pb.ProbeRequest()).ready.value
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()
    assert not endpoint.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["controller", "--endpoint", "tcp://127.0.0.1:1"], "--endpoint"),
        (
            ["controller", "--endpoint", "unix:///nowhere/csi.sock", "--kubeconfig", "/nowhere/config"],
            "/nowhere/config",
        ),
        (["node", "--endpoint", "unix:///tmp/x.sock", "--node-name", "Not A Node"], "--node-name"),
        (["node", "--endpoint", "unix:///tmp/x.sock"], "--node-name"),
    ],
)
def test_wrong_usage_gets_one_line(arguments: list[str], said: str) -> None:
    program = Path(sys.executable).with_name("share-manager")
    done = subprocess.run([program, "csi", *arguments], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode != 0
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
