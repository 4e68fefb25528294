"""Who this driver is, and whether it can work at present."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from google.protobuf.wrappers_pb2 import BoolValue

from share_manager.csi.protocol import csi_pb2 as pb

DRIVER = "driver.share-manager.io"


class Identity:
    """`ready` says whether calls have a chance; the probe of a pod's liveness asks no more than that it is answered."""

    def __init__(self, version: str, *, controller: bool, ready: Callable[[], Awaitable[bool]]) -> None:
        self._version = version
        self._controller = controller
        self._ready = ready

    async def GetPluginInfo(self, request: pb.GetPluginInfoRequest) -> pb.GetPluginInfoResponse:  # noqa: N802
        return pb.GetPluginInfoResponse(name=DRIVER, vendor_version=self._version)

    async def GetPluginCapabilities(  # noqa: N802
        self, request: pb.GetPluginCapabilitiesRequest
    ) -> pb.GetPluginCapabilitiesResponse:
        service = pb.PluginCapability.Service(type=pb.PluginCapability.Service.CONTROLLER_SERVICE)
        found = [pb.PluginCapability(service=service)] if self._controller else []
        return pb.GetPluginCapabilitiesResponse(capabilities=found)

    async def Probe(self, request: pb.ProbeRequest) -> pb.ProbeResponse:  # noqa: N802
        return pb.ProbeResponse(ready=BoolValue(value=await self._ready()))
