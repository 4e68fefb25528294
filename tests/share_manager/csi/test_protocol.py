"""The protocol on the wire is the specification's: names and numbers, and code that is made of what is here."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from share_manager.csi.protocol import csi_pb2 as pb
from tests.project.common import ROOT

GENERATED = ("csi_pb2.py", "csi_pb2.pyi")


def test_the_generated_code_is_current(tmp_path: Path) -> None:
    subprocess.run([ROOT / "scripts/csi-protocol.sh", tmp_path], check=True, capture_output=True, timeout=60)
    for name in GENERATED:
        assert (tmp_path / name).read_text() == (ROOT / "share_manager/csi/protocol" / name).read_text(), (
            "run scripts/csi-protocol.sh"
        )


def test_services_and_calls_have_the_names_of_the_specification() -> None:
    services = {name: [m.name for m in one.methods] for name, one in pb.DESCRIPTOR.services_by_name.items()}
    assert pb.DESCRIPTOR.package == "csi.v1"
    assert services["Identity"] == ["GetPluginInfo", "GetPluginCapabilities", "Probe"]
    assert set(services["Controller"]) >= {"CreateVolume", "DeleteVolume", "ControllerPublishVolume", "ListVolumes"}
    assert set(services["Node"]) >= {"NodeStageVolume", "NodePublishVolume", "NodeGetVolumeStats", "NodeGetInfo"}


# field number << 3 | 2 for strings and messages, | 0 for numbers; written by hand from the specification's csi.proto
GOLDEN = [
    (
        pb.CreateVolumeRequest(
            name="n",
            capacity_range=pb.CapacityRange(required_bytes=1, limit_bytes=2),
            volume_capabilities=[
                pb.VolumeCapability(
                    mount=pb.VolumeCapability.MountVolume(fs_type="f", mount_flags=["m"]),
                    access_mode=pb.VolumeCapability.AccessMode(mode=5),  # type: ignore[arg-type]
                )
            ],
            parameters={"p": "q"},
            secrets={"s": "t"},
        ),
        b"\x0a\x01n\x12\x04\x08\x01\x10\x02\x1a\x0c\x12\x06\x0a\x01f\x12\x01m\x1a\x02\x08\x05"
        b"\x22\x06\x0a\x01p\x12\x01q\x2a\x06\x0a\x01s\x12\x01t",
    ),
    (
        pb.CreateVolumeResponse(volume=pb.Volume(capacity_bytes=3, volume_id="v", volume_context={"a": "b"})),
        b"\x0a\x0d\x08\x03\x12\x01v\x1a\x06\x0a\x01a\x12\x01b",
    ),
    (
        pb.NodePublishVolumeRequest(
            volume_id="v", staging_target_path="s", target_path="t", readonly=True, publish_context={"a": "b"}
        ),
        b"\x0a\x01v\x12\x06\x0a\x01a\x12\x01b\x1a\x01s\x22\x01t\x30\x01",
    ),
    (
        pb.ControllerPublishVolumeRequest(volume_id="v", node_id="n", readonly=True, volume_context={"a": "b"}),
        b"\x0a\x01v\x12\x01n\x20\x01\x32\x06\x0a\x01a\x12\x01b",
    ),
    (
        pb.NodeGetVolumeStatsResponse(usage=[pb.VolumeUsage(available=1, total=2, used=3, unit=2)]),  # type: ignore[arg-type]
        b"\x0a\x08\x08\x01\x10\x02\x18\x03\x20\x02",
    ),
    (
        pb.ListVolumesResponse(
            entries=[
                pb.ListVolumesResponse.Entry(
                    volume=pb.Volume(volume_id="v"),
                    status=pb.ListVolumesResponse.VolumeStatus(published_node_ids=["n"]),
                )
            ],
            next_token="t",
        ),
        b"\x0a\x0a\x0a\x03\x12\x01v\x12\x03\x0a\x01n\x12\x01t",
    ),
    (
        pb.NodeGetCapabilitiesResponse(
            capabilities=[pb.NodeServiceCapability(rpc=pb.NodeServiceCapability.RPC(type=1))]  # type: ignore[arg-type]
        ),
        b"\x0a\x04\x0a\x02\x08\x01",
    ),
]


@pytest.mark.parametrize(("message", "encoded"), GOLDEN, ids=lambda value: type(value).__name__)
def test_messages_are_encoded_as_others_do(message: pb.Volume, encoded: bytes) -> None:
    assert message.SerializeToString(deterministic=True) == encoded
    assert type(message).FromString(encoded) == message
