"""No secret is ever in a line of the log."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import structlog
from google.protobuf.descriptor import Descriptor
from google.protobuf.message_factory import GetMessageClass
from hypothesis import given
from hypothesis import strategies as st

from share_manager.csi import log as csi_log
from share_manager.csi.protocol import csi_pb2 as pb

WITH_SECRETS = [one for one in pb.DESCRIPTOR.message_types_by_name.values() if "secrets" in one.fields_by_name]
# nothing that a name of a field or a value beside it contains
SECRETS = st.text(st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF), min_size=8, max_size=40)


@pytest.fixture
def configured(capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    csi_log.configure(component="test")
    yield
    structlog.reset_defaults()


def test_the_protocol_has_secrets_in_these_requests() -> None:
    assert {one.name for one in WITH_SECRETS} >= {
        *("CreateVolumeRequest", "DeleteVolumeRequest", "ControllerPublishVolumeRequest"),
        *("NodeStageVolumeRequest", "NodePublishVolumeRequest", "ValidateVolumeCapabilitiesRequest"),
    }


@pytest.mark.parametrize("kind", WITH_SECRETS, ids=lambda kind: kind.name)
@given(secret=SECRETS)
def test_secrets_of_a_request_are_hidden(kind: Descriptor, secret: str) -> None:
    request = GetMessageClass(kind)(secrets={"CRYPTO_KEY_VALUE": secret})
    line = structlog.processors.JSONRenderer(ensure_ascii=False)(
        None, "info", csi_log.hide_secrets(None, "info", {"event": "call", "request": request})
    )
    assert secret not in str(line)
    assert csi_log.HIDDEN in str(line)


@given(SECRETS)
def test_secrets_are_hidden_wherever_they_are(secret: str) -> None:
    flags = pb.VolumeCapability(mount=pb.VolumeCapability.MountVolume(mount_flags=[f"password={secret}"]))
    shown = csi_log.hide_secrets(
        None,
        "info",
        {
            "event": "call",
            "request": pb.NodeStageVolumeRequest(volume_id="v", volume_capability=flags),
            "requests": [pb.DeleteVolumeRequest(secrets={"a": secret})],
            "more": {"passphrase": secret, "inner": {"CRYPTO_KEY_VALUE": secret}},
            "secrets": {"a": secret},
            "token": secret,
        },
    )
    assert secret not in repr(shown)
    assert shown["request"]["volume_id"] == "v"


def test_what_is_no_secret_is_shown(configured: None, capsys: pytest.CaptureFixture[str]) -> None:
    request = pb.ControllerPublishVolumeRequest(volume_id="v1", node_id="n1", secrets={"k": "hidden-value"})
    structlog.get_logger().info("call", request=request, path="/x", names=("a", "b"), error=ValueError("why"))
    written = capsys.readouterr()
    line = json.loads(written.err)
    assert line["request"] == {"volume_id": "v1", "node_id": "n1", "secrets": csi_log.HIDDEN}
    assert (line["names"], line["error"], line["component"]) == (["a", "b"], "why", "test")
    assert written.out == ""
