"""A caller of the driver, as kubelet and the sidecars are: it knows the protocol and a socket, nothing else."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from share_manager.csi.protocol import csi_pb2 as pb

METHODS = {
    method.name: (f"/csi.v1.{service.name}/{method.name}", GetMessageClass(method.output_type))
    for service in pb.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}


class Refused(Exception):  # noqa: N818 - what the other side did
    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message


def refused(error: grpc.RpcError) -> Refused:
    assert isinstance(error, grpc.Call)
    return Refused(error.code().name, error.details() or "")


class Caller:
    """A context manager. Calls block."""

    def __init__(self, socket: Path) -> None:
        self._channel = grpc.insecure_channel(f"unix:{socket}", options=[("grpc.enable_retries", 0)])

    def __enter__(self) -> Caller:
        grpc.channel_ready_future(self._channel).result(timeout=30)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    def call(self, name: str, request: Message, timeout: float | None = 30.0) -> Any:
        """Raises Refused."""
        path, answer = METHODS[name]
        return self.send(path, request.SerializeToString(), answer.FromString, timeout)

    def send(self, path: str, request: bytes, read: Any = bytes, timeout: float | None = 30.0) -> Any:
        """Raises Refused."""
        method: Any = self._channel.unary_unary(path, request_serializer=bytes, response_deserializer=read)
        try:
            return method(request, timeout=timeout)
        except grpc.RpcError as error:
            raise refused(error) from None

    def refusal(self, name: str, request: Message, timeout: float | None = 30.0) -> Refused:
        """Of a call that must be refused."""
        try:
            answer = self.call(name, request, timeout)
        except Refused as refused:
            return refused
        raise AssertionError(f"{name} was not refused: {answer}")

    def future(self, name: str, request: Message, timeout: float | None = 30.0) -> Any:
        path, answer = METHODS[name]
        method: Any = self._channel.unary_unary(
            path,
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=answer.FromString,
        )
        return method.future(request, timeout=timeout)


def capability(
    mode: str = "MULTI_NODE_MULTI_WRITER", *, block: bool = False, fs: str = "", flags: tuple[str, ...] = ()
) -> pb.VolumeCapability:
    access = pb.VolumeCapability.AccessMode(mode=mode)
    if block:
        return pb.VolumeCapability(block=pb.VolumeCapability.BlockVolume(), access_mode=access)
    return pb.VolumeCapability(mount=pb.VolumeCapability.MountVolume(fs_type=fs, mount_flags=flags), access_mode=access)
