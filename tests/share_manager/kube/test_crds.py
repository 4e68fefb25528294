"""The custom resource definitions: current, complete, and enforced by a real API server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from share_manager.kube.client import Client
from share_manager.kube.crds import files
from share_manager.kube.errors import InvalidObjectError
from share_manager.kube.meta import ObjectMeta
from share_manager.kube.resources import (
    RESOURCES,
    RecordedReplica,
    Replica,
    Resource,
    ShareManager,
    StorageNode,
    Volume,
    VolumeRecord,
    VolumeRecordSpec,
    VolumeSpec,
    VolumeStatus,
)
from share_manager.kube.schema import definition, schema
from tests.lab.control_plane import ControlPlane
from tests.project.common import ROOT

UUID = "6d1a1f4e-0000-4000-8000-000000000001"


def walk(part: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, part
    for name, inner in part.get("properties", {}).items():
        yield from walk(inner, f"{path}.{name}")
    for inner in (part.get("items"), part.get("additionalProperties")):
        if isinstance(inner, dict):
            yield from walk(inner, f"{path}[]")


def test_the_files_in_deploy_are_current() -> None:
    directory = ROOT / "deploy/crds"
    assert {path.name: path.read_text() for path in directory.iterdir()} == files(), "run `make crds`"


@pytest.mark.parametrize("kind", RESOURCES)
def test_every_field_says_what_it_is(kind: type[Resource]) -> None:
    for path, part in walk(schema(kind)):
        assert "type" in part, path
        if path.count(".") > 1 and not path.endswith("[]"):
            assert part.get("description"), path


@pytest.mark.parametrize("kind", RESOURCES)
def test_short_names_shadow_nobody(kind: type[Resource]) -> None:
    assert kind.SHORT_NAMES
    assert all(name.startswith("sm") for name in kind.SHORT_NAMES)
    assert kind.__name__.lower() + "s" == kind.PLURAL


@pytest.mark.parametrize("kind", RESOURCES)
def test_defaults_are_what_the_types_have(kind: type[Resource]) -> None:
    """What is left out when it is the default must become the same at the API server."""
    for path, part in walk(schema(kind)):
        if "default" in part and part["default"] != {}:
            if "enum" in part:
                assert part["default"] in part["enum"], path
            assert part["type"] != "object", path


def test_what_the_table_shows() -> None:
    columns = [one["name"] for one in definition(ShareManager)["spec"]["versions"][0]["additionalPrinterColumns"]]
    assert columns[:5] == ["State", "Endpoint", "Node", "Clients", "Last-Failover"]
    assert columns[-1] == "Age"


def record(**changes: Any) -> VolumeRecordSpec:
    replicas = (RecordedReplica(name="r1", node="a", address="tcp:10.0.0.1:7500", directory="replicas/v/r1"),)
    spec = VolumeRecordSpec(uuid=UUID, size=1 << 30, replicas=replicas, in_sync=("r1",))
    return msgspec.structs.replace(spec, **changes)


@pytest.mark.system
@pytest.mark.parametrize(
    "bad",
    [
        {"size": 4095},
        {"size": (1 << 30) + 1},
        {"size": "1Gi"},
        {},
        {"size": 1 << 30, "replicas": 0},
        {"size": 1 << 30, "export": {"leaseLifetime": 9}},
        {"size": 1 << 30, "replicas": 99},
        {"size": 1 << 30, "filesystem": "btrfs"},
        {"size": 1 << 30, "encryption": {"keySize": 100}},
        {"size": 1 << 30, "encryption": {"cipher": "aes; rm"}},
        {"size": 1 << 30, "export": {"rootMode": "0999"}},
        {"size": 1 << 30, "export": {"graceperiod": "x", "gracePeriod": 0}},
        {"size": 1 << 30, "export": {"allow": "10.0.0.0/8"}},
        {"size": 1 << 30, "originalName": "x" * 129},
    ],
)
async def test_the_api_server_refuses_a_bad_volume(kube: Client, bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidObjectError):
        await kube.create_json(Volume, {"metadata": {"name": "bad"}, "spec": bad})


@pytest.mark.system
async def test_the_api_server_refuses_a_record_without_anybody_in_sync(kube: Client) -> None:
    made = await kube.create(VolumeRecord(metadata=ObjectMeta(name="v"), spec=record()))
    refused: tuple[dict[str, Any], ...] = (
        {"inSync": []},
        {"replicas": []},
        {"uuid": "x"},
        {"epoch": -1},
        {"version": 0},
    )
    for bad in refused:
        with pytest.raises(InvalidObjectError):
            await kube.patch(VolumeRecord, "v", {"spec": bad})
    assert await kube.get(VolumeRecord, "v") == made


@pytest.mark.system
async def test_what_is_left_out_is_the_default(kube: Client, control_plane: ControlPlane) -> None:
    made = await kube.create(Volume(metadata=ObjectMeta(name="vol1"), spec=VolumeSpec(size=1 << 30)))
    assert made.spec == VolumeSpec(size=1 << 30)
    raw = control_plane.call("GET", f"/apis/share-manager.io/v1beta1/namespaces/{kube.namespace}/volumes/vol1")
    assert raw["spec"]["export"]["gracePeriod"] == 30
    assert raw["spec"]["encryption"]["cipher"] == "aes-xts-plain64"
    assert raw["status"]["state"] == "creating"
    await kube.create(ShareManager(metadata=ObjectMeta(name="vol1")))
    await kube.create(StorageNode(metadata=ObjectMeta(name="node-1")))
    body = {"volume": "vol1", "replica": "r1", "node": "node-1", "size": 1 << 30, "port": 7500, "volumeUuid": UUID}
    replica = await kube.create_json(Replica, {"metadata": {"name": "vol1-r1"}, "spec": body})
    assert replica.spec.disk == "default"
    assert replica.status.state == "pending"


@pytest.mark.system
async def test_a_status_is_written_apart(kube: Client) -> None:
    made = await kube.create(
        Volume(metadata=ObjectMeta(name="v"), spec=VolumeSpec(size=1 << 30), status=VolumeStatus(state="ready"))
    )
    assert made.status.state == "creating"
    ready = await kube.update_status(made, msgspec.structs.replace(made, status=VolumeStatus(state="ready", in_sync=3)))
    assert ready.status == VolumeStatus(state="ready", in_sync=3)
    assert ready.metadata.generation == made.metadata.generation
    # a default that is left out is the default again
    again = await kube.update_status(ready, msgspec.structs.replace(ready, status=VolumeStatus()))
    assert again.status == VolumeStatus()


@pytest.mark.system
async def test_kubectl_would_show_the_columns(kube: Client, control_plane: ControlPlane) -> None:
    await kube.create(ShareManager(metadata=ObjectMeta(name="vol1")))
    base = f"/apis/share-manager.io/v1beta1/namespaces/{kube.namespace}/sharemanagers"
    table = control_plane.call("GET", base, accept="application/json;as=Table;v=v1;g=meta.k8s.io")
    names = [one["name"] for one in table["columnDefinitions"]]
    assert names[:2] == ["Name", "State"]
    assert table["rows"][0]["cells"][:2] == ["vol1", "stopped"]
