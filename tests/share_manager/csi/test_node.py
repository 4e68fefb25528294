"""The Node service where nothing is mounted: what it refuses, with which code, and that any request gets an answer.

What it mounts is in tests/system/test_csi_node.py, in a guest with a kernel's NFS client.
"""

from __future__ import annotations

import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from share_manager.csi.bridge import serving
from share_manager.csi.errors import CsiError
from share_manager.csi.node import Node, Target
from share_manager.csi.protocol import csi_pb2 as pb
from tests.share_manager.csi.caller import Caller, capability


@pytest.fixture
def silent_port() -> Iterator[int]:
    """One on which nobody listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


CONTEXT = {"server": "127.0.0.1", "port": "1", "share": "/pvc-1", "options": "vers=4.2,hard"}


@asynccontextmanager
async def node(tmp_path: Path) -> AsyncIterator[Caller]:
    path = tmp_path / "csi.sock"
    async with serving(path, {"Node": Node("node-1")}):
        with Caller(path) as caller:
            yield caller


def staging(place: str = "/nowhere/staged", **values: Any) -> pb.NodeStageVolumeRequest:
    base: dict[str, Any] = {
        "volume_id": "pvc-1",
        "staging_target_path": place,
        "volume_capability": capability(),
        "publish_context": CONTEXT,
    }
    return pb.NodeStageVolumeRequest(**(base | values))


def publishing(**values: Any) -> pb.NodePublishVolumeRequest:
    base: dict[str, Any] = {
        "volume_id": "pvc-1",
        "staging_target_path": "/nowhere/staged",
        "target_path": "/nowhere/target",
        "volume_capability": capability(),
    }
    return pb.NodePublishVolumeRequest(**(base | values))


MATRIX: list[tuple[str, Message, str, str]] = [
    ("NodeStageVolume", pb.NodeStageVolumeRequest(), "INVALID_ARGUMENT", "volume_id"),
    ("NodeStageVolume", staging(volume_id="a" * 129), "INVALID_ARGUMENT", "volume_id"),
    ("NodeStageVolume", staging(volume_id="No Label"), "NOT_FOUND", "No Label"),
    ("NodeStageVolume", staging(""), "INVALID_ARGUMENT", "staging_target_path"),
    ("NodeStageVolume", staging("relative/path"), "INVALID_ARGUMENT", "staging_target_path"),
    ("NodeStageVolume", staging("/up/../there"), "INVALID_ARGUMENT", "staging_target_path"),
    ("NodeStageVolume", staging("/" + "a" * 4096), "INVALID_ARGUMENT", "staging_target_path"),
    ("NodeStageVolume", staging("/nul\0"), "INVALID_ARGUMENT", "staging_target_path"),
    ("NodeStageVolume", staging(volume_capability=None), "INVALID_ARGUMENT", "volume_capability"),
    ("NodeStageVolume", staging(volume_capability=capability(block=True)), "INVALID_ARGUMENT", "Block"),
    ("NodeStageVolume", staging(volume_capability=pb.VolumeCapability()), "INVALID_ARGUMENT", "access_type"),
    ("NodeStageVolume", staging(publish_context={}), "INVALID_ARGUMENT", "server and no port"),
    ("NodeStageVolume", staging(publish_context=CONTEXT | {"port": "0"}), "INVALID_ARGUMENT", "port"),
    ("NodeStageVolume", staging(publish_context=CONTEXT | {"port": "65536"}), "INVALID_ARGUMENT", "port"),
    ("NodeStageVolume", staging(publish_context=CONTEXT | {"port": "x"}), "INVALID_ARGUMENT", "port"),
    ("NodeStageVolume", staging(publish_context=CONTEXT | {"share": "/other"}), "INVALID_ARGUMENT", "/other"),
    ("NodeStageVolume", staging(publish_context=CONTEXT | {"options": "bg"}), "INVALID_ARGUMENT", "bg"),
    ("NodeStageVolume", staging(publish_context=CONTEXT | {"x": "y" * 5000}), "INVALID_ARGUMENT", "publish_context"),
    ("NodeUnstageVolume", pb.NodeUnstageVolumeRequest(), "INVALID_ARGUMENT", "volume_id"),
    ("NodeUnstageVolume", pb.NodeUnstageVolumeRequest(volume_id="pvc-1"), "INVALID_ARGUMENT", "staging_target_path"),
    (
        "NodeUnstageVolume",
        pb.NodeUnstageVolumeRequest(volume_id="pvc-1", staging_target_path="/proc"),
        "FAILED_PRECONDITION",
        "not of this driver",
    ),
    ("NodePublishVolume", pb.NodePublishVolumeRequest(), "INVALID_ARGUMENT", "volume_id"),
    ("NodePublishVolume", publishing(target_path=""), "INVALID_ARGUMENT", "target_path"),
    ("NodePublishVolume", publishing(staging_target_path=""), "INVALID_ARGUMENT", "staging_target_path"),
    ("NodePublishVolume", publishing(volume_capability=None), "INVALID_ARGUMENT", "volume_capability"),
    ("NodePublishVolume", publishing(volume_capability=capability(block=True)), "INVALID_ARGUMENT", "Block"),
    ("NodePublishVolume", publishing(), "FAILED_PRECONDITION", "not staged"),
    ("NodePublishVolume", publishing(staging_target_path="/proc"), "FAILED_PRECONDITION", "not staged"),
    ("NodeUnpublishVolume", pb.NodeUnpublishVolumeRequest(), "INVALID_ARGUMENT", "volume_id"),
    ("NodeUnpublishVolume", pb.NodeUnpublishVolumeRequest(volume_id="pvc-1"), "INVALID_ARGUMENT", "target_path"),
    ("NodeGetVolumeStats", pb.NodeGetVolumeStatsRequest(), "INVALID_ARGUMENT", "volume_id"),
    ("NodeGetVolumeStats", pb.NodeGetVolumeStatsRequest(volume_id="pvc-1"), "INVALID_ARGUMENT", "volume_path"),
    (
        "NodeGetVolumeStats",
        pb.NodeGetVolumeStatsRequest(volume_id="pvc-1", volume_path="/nowhere"),
        "NOT_FOUND",
        "/nowhere",
    ),
    (
        "NodeGetVolumeStats",
        pb.NodeGetVolumeStatsRequest(volume_id="pvc-1", volume_path="/proc"),
        "NOT_FOUND",
        "/proc",
    ),
]


async def test_codes_of_requests_that_cannot_be(tmp_path: Path) -> None:
    async with node(tmp_path) as caller:
        for name, request, code, named in MATRIX:
            refused = await trio.to_thread.run_sync(caller.refusal, name, request)
            assert (name, refused.code, named in refused.message) == (name, code, True), refused.message


async def test_what_is_not_there_is_unpublished_and_unstaged(tmp_path: Path) -> None:
    async with node(tmp_path) as caller:
        unpublish = pb.NodeUnpublishVolumeRequest(volume_id="pvc-1", target_path=str(tmp_path / "target"))
        await trio.to_thread.run_sync(caller.call, "NodeUnpublishVolume", unpublish)
        unstage = pb.NodeUnstageVolumeRequest(volume_id="pvc-1", staging_target_path=str(tmp_path / "staged"))
        await trio.to_thread.run_sync(caller.call, "NodeUnstageVolume", unstage)


async def test_a_node_tells_its_name_and_what_it_can(tmp_path: Path) -> None:
    async with node(tmp_path) as caller:
        info = await trio.to_thread.run_sync(caller.call, "NodeGetInfo", pb.NodeGetInfoRequest())
        assert (info.node_id, info.max_volumes_per_node) == ("node-1", 0)
        answer = await trio.to_thread.run_sync(caller.call, "NodeGetCapabilities", pb.NodeGetCapabilitiesRequest())
        kinds = pb.NodeServiceCapability.RPC
        assert {one.rpc.type for one in answer.capabilities} == {
            *(kinds.STAGE_UNSTAGE_VOLUME, kinds.GET_VOLUME_STATS, kinds.SINGLE_NODE_MULTI_WRITER)
        }


async def test_an_export_that_does_not_come_is_told_before_the_deadline(tmp_path: Path, silent_port: int) -> None:
    context = CONTEXT | {"port": str(silent_port)}
    request = staging(str(tmp_path / "staged"), publish_context=context)
    async with node(tmp_path) as caller:
        for timeout in (0.2, 1.5):
            began = time.monotonic()
            refused = await trio.to_thread.run_sync(caller.refusal, "NodeStageVolume", request, timeout)
            assert refused.code == "UNAVAILABLE"
            assert time.monotonic() - began < timeout
        assert "Connection refused" in refused.message
    assert not (tmp_path / "staged").exists()


async def test_a_second_call_for_a_volume_is_told_at_once(tmp_path: Path, silent_port: int) -> None:
    request = staging(str(tmp_path / "staged"), publish_context=CONTEXT | {"port": str(silent_port)})
    async with node(tmp_path) as caller, trio.open_nursery() as nursery:
        first = caller.future("NodeStageVolume", request, 8.0)
        with trio.fail_after(8):
            while True:
                refused = await trio.to_thread.run_sync(caller.refusal, "NodeStageVolume", request, 0.3)
                if refused.code == "ABORTED":
                    break
                if first.done():
                    # the one that was to be refused came first, and this one in its millisecond
                    first = caller.future("NodeStageVolume", request, 8.0)
        # another volume is not held up
        other = staging(str(tmp_path / "o"), volume_id="pvc-2", publish_context=CONTEXT | {"share": "/pvc-2"})
        assert (await trio.to_thread.run_sync(caller.refusal, "NodeStageVolume", other, 0.5)).code == "UNAVAILABLE"
        first.cancel()
        nursery.cancel_scope.cancel()


TEXT = st.text(max_size=12) | st.sampled_from(["pvc-1", "/proc", "/", "/nowhere/x", "vers=4.2", "127.0.0.1"])
MAPS = st.dictionaries(TEXT | st.sampled_from(["server", "port", "share", "options"]), TEXT, max_size=5)
CAPABILITIES = st.none() | st.builds(
    pb.VolumeCapability,
    mount=st.none() | st.builds(pb.VolumeCapability.MountVolume, fs_type=TEXT, mount_flags=st.lists(TEXT, max_size=2)),
    access_mode=st.none() | st.builds(pb.VolumeCapability.AccessMode, mode=st.integers(-2, 9)),
)
# never a request that could change something on this machine: nothing is staged, and no target is a mount
REQUESTS = st.one_of(
    st.builds(
        pb.NodePublishVolumeRequest,
        volume_id=TEXT,
        publish_context=MAPS,
        staging_target_path=TEXT,
        target_path=TEXT,
        volume_capability=CAPABILITIES,
        readonly=st.booleans(),
    ),
    st.builds(pb.NodeGetVolumeStatsRequest, volume_id=TEXT, volume_path=TEXT, staging_target_path=TEXT),
)


@given(REQUESTS)
def test_any_request_gets_an_answer_or_a_code(request_: Message) -> None:
    name = type(request_).__name__.removesuffix("Request")

    async def ask() -> None:
        with pytest.raises(CsiError):
            await getattr(Node("n"), name)(request_)

    trio.run(ask)


@given(MAPS, TEXT)
def test_a_context_is_read_or_refused(context: dict[str, str], volume: str) -> None:
    try:
        found = Target.parse(context, volume)
    except CsiError:
        return
    assert Target.parse(found.context(), volume) == found
