"""What a call must satisfy before anything is done: what has to be there, sizes, and which uses there are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from share_manager.csi.errors import InvalidArgumentError
from share_manager.csi.names import MAX_NAME
from share_manager.csi.protocol import csi_pb2 as pb

MAX_MAP = 4096
"""Bytes of all keys and values of a map, by the specification's size limits."""
MAX_NODE_ID = 256
MAX_PATH = 4095
"""Bytes, PATH_MAX of limits.h without its null."""
MAX_FLAGS = 4096

Mode = pb.VolumeCapability.AccessMode

SINGLE_NODE = (
    Mode.SINGLE_NODE_WRITER,
    Mode.SINGLE_NODE_READER_ONLY,
    Mode.SINGLE_NODE_SINGLE_WRITER,
    Mode.SINGLE_NODE_MULTI_WRITER,
)
READERS = (Mode.SINGLE_NODE_READER_ONLY, Mode.MULTI_NODE_READER_ONLY)
MODES = (*SINGLE_NODE, Mode.MULTI_NODE_READER_ONLY, Mode.MULTI_NODE_SINGLE_WRITER, Mode.MULTI_NODE_MULTI_WRITER)


def required(name: str, value: str, limit: int = MAX_NAME) -> str:
    """Raises InvalidArgumentError."""
    if not value:
        raise InvalidArgumentError(f"{name} is missing")
    return limited(name, value, limit)


def limited(name: str, value: str, limit: int = MAX_NAME) -> str:
    """Raises InvalidArgumentError."""
    if len(value.encode()) > limit:
        raise InvalidArgumentError(f"{name} is longer than {limit} bytes")
    return value


def path(name: str, value: str) -> str:
    """An absolute one that leads nowhere else. Raises InvalidArgumentError."""
    required(name, value, MAX_PATH)
    if not value.startswith("/") or "\0" in value or ".." in value.split("/"):
        raise InvalidArgumentError(f"{name} is no absolute path")
    return value.rstrip("/") or "/"


def small_map(name: str, value: Mapping[str, str]) -> Mapping[str, str]:
    """Raises InvalidArgumentError."""
    if sum(len(key.encode()) + len(item.encode()) for key, item in value.items()) > MAX_MAP:
        raise InvalidArgumentError(f"{name} is larger than {MAX_MAP} bytes")
    return value


def unusable(capability: pb.VolumeCapability) -> str:
    """Why no volume of ours can be used like that, or nothing."""
    kind = capability.WhichOneof("access_type")
    if kind == "block":
        return (
            "volumeMode Block is not offered: a share is a filesystem that many nodes mount; use volumeMode Filesystem"
        )
    if kind is None:
        return "volume_capability has no access_type"
    if capability.access_mode.mode == Mode.UNKNOWN:
        return "volume_capability has no access_mode"
    if capability.access_mode.mode not in MODES:
        return f"access_mode {capability.access_mode.mode} is not known to this driver"
    if sum(len(flag.encode()) for flag in capability.mount.mount_flags) > MAX_FLAGS:
        return f"mount_flags are larger than {MAX_FLAGS} bytes"
    if capability.mount.volume_mount_group:
        return "volume_mount_group is not offered"
    return ""


def capability(
    request: pb.ControllerPublishVolumeRequest | pb.NodeStageVolumeRequest | pb.NodePublishVolumeRequest,
) -> pb.VolumeCapability:
    """The one that a request has to have. Raises InvalidArgumentError."""
    if not request.HasField("volume_capability"):
        raise InvalidArgumentError("volume_capability is missing")
    if problem := unusable(request.volume_capability):
        raise InvalidArgumentError(problem)
    return request.volume_capability


def capabilities(found: Iterable[pb.VolumeCapability]) -> list[pb.VolumeCapability]:
    """Those that a request has to have. Raises InvalidArgumentError."""
    all_of_them = list(found)
    if not all_of_them:
        raise InvalidArgumentError("volume_capabilities are missing")
    for one in all_of_them:
        if problem := unusable(one):
            raise InvalidArgumentError(problem)
    return all_of_them


def only_reads(found: pb.VolumeCapability) -> bool:
    return found.access_mode.mode in READERS
