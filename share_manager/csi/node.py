"""The Node service: a volume is staged by mounting its share once on the node, and published by bind mounts of that.

Several pods of a node share the staged mount's superblock. So what is done for one of them never touches the others:
forcing an unmount fails everything that is under way in the superblock, and is only done when a volume leaves the node.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import msgspec
import structlog
import trio

from ganesha.errors import RpcError
from ganesha.rpc import PROC_NULL, connect
from share_manager.csi import checks, mounts, options
from share_manager.csi.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
)
from share_manager.csi.locks import Locks
from share_manager.csi.mounts import Health, Mount
from share_manager.csi.names import is_volume_id
from share_manager.csi.protocol import csi_pb2 as pb
from share_manager.errors import CommandError, TimeoutProblem

log = structlog.get_logger()

PATIENCE = 120.0
"""Seconds that a volume which leaves the node waits for a server that is away, with what was written and is not there
yet. Then it is lost: a node that is drained must not wait for ever."""
_NULL = 2.0
_PAUSES = (0.1, 0.2, 0.4, 0.8, 1.0)
_TELL = 0.3
_REFUSED_OPTIONS = ("incorrect mount option", "protocol not supported", "invalid argument")


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """Where a share is, as ControllerPublishVolume said."""

    server: str
    port: int
    share: str
    options: str

    @classmethod
    def parse(cls, context: Mapping[str, str], volume: str) -> Target:
        """Raises InvalidArgumentError."""
        checks.small_map("publish_context", context)
        found = {key: context.get(key, "") for key in ("server", "port", "share", "options")}
        if missing := [key for key, value in found.items() if not value]:
            raise InvalidArgumentError(f"publish_context has no {' and no '.join(missing)}")
        if not found["port"].isdecimal() or not 0 < int(found["port"]) < 65536:
            raise InvalidArgumentError(f"publish_context: {found['port']!r} is no port")
        if found["share"] != f"/{volume}":
            raise InvalidArgumentError(f"publish_context is about {found['share']}, not about volume {volume}")
        options.parse(found["options"], "publish_context")
        return cls(server=found["server"], port=int(found["port"]), share=found["share"], options=found["options"])

    def context(self) -> dict[str, str]:
        return {"server": self.server, "port": str(self.port), "share": self.share, "options": self.options}

    @property
    def source(self) -> str:
        return f"[{self.server}]:{self.share}" if ":" in self.server else f"{self.server}:{self.share}"

    @property
    def all_options(self) -> str:
        return f"{self.options},port={self.port}"


class Node:
    def __init__(self, name: str, *, patience: float = PATIENCE) -> None:
        """`name` is that of the Kubernetes node, `patience` in seconds."""
        self.name = name
        self._patience = patience
        self._locks = Locks()
        self._leaving: dict[str, float] = {}

    async def NodeGetInfo(self, request: pb.NodeGetInfoRequest) -> pb.NodeGetInfoResponse:  # noqa: N802
        return pb.NodeGetInfoResponse(node_id=self.name)

    async def NodeGetCapabilities(  # noqa: N802
        self, request: pb.NodeGetCapabilitiesRequest
    ) -> pb.NodeGetCapabilitiesResponse:
        kinds = pb.NodeServiceCapability.RPC
        offered = (kinds.STAGE_UNSTAGE_VOLUME, kinds.GET_VOLUME_STATS, kinds.SINGLE_NODE_MULTI_WRITER)
        return pb.NodeGetCapabilitiesResponse(
            capabilities=[pb.NodeServiceCapability(rpc=kinds(type=kind)) for kind in offered]
        )

    async def NodeStageVolume(self, request: pb.NodeStageVolumeRequest) -> pb.NodeStageVolumeResponse:  # noqa: N802
        """Mount the share, waiting for it until shortly before the deadline."""
        volume = _volume(request.volume_id)
        place = checks.path("staging_target_path", request.staging_target_path)
        checks.capability(request)
        target = Target.parse(request.publish_context, volume)
        with self._locks.alone(volume):
            self._leaving.pop(place, None)
            await self._stage(volume, place, target)
        return pb.NodeStageVolumeResponse()

    async def _stage(self, volume: str, place: str, target: Target) -> None:
        problem = "there was no time to try"
        tries = 0
        with trio.move_on_at(trio.current_effective_deadline() - _TELL):
            while True:
                found = mounts.mount_at(place)
                if found is not None and found.is_nfs and found.share == volume and found.server != target.server:
                    # an address is a volume's for its life: that was another volume of this name
                    log.warning("staged_anew", volume=volume, place=place, why=f"it was one at {found.server}")
                    await mounts.detach(place)
                elif found is not None:
                    _check_same(found, target)
                    health = await mounts.health(place)
                    if health is Health.ALIVE:
                        return
                    problem = f"it is mounted at {place}, and {health.value}"
                    # one that hangs is waited for, as the pods that have it do: they never see an error
                    if health is Health.STALE:
                        log.warning("staged_anew", volume=volume, place=place, why=health.value)
                        await mounts.detach(place)
                        continue
                else:
                    problem = await _why_silent(target) or await self._mount(place, target)
                    if not problem:
                        log.info("staged", volume=volume, place=place, source=target.source, options=target.all_options)
                        return
                await trio.sleep(_PAUSES[min(tries, len(_PAUSES) - 1)])
                tries += 1
        raise UnavailableError(f"volume {volume} is not to be had at {target.server} port {target.port} yet: {problem}")

    async def _mount(self, place: str, target: Target) -> str:
        """Why it could not be mounted now, or nothing. Raises InvalidArgumentError when it never can."""
        await mounts.make_place(place, parents=True)
        try:
            await mounts.mount_nfs(target.source, place, target.all_options, mounts.CHANGE)
        except CommandError as error:
            if any(word in error.output.lower() for word in _REFUSED_OPTIONS):
                raise InvalidArgumentError(f"{target.options}: this node cannot mount so: {error}") from error
            return str(error)
        except TimeoutProblem as error:
            return str(error)
        return ""

    async def NodeUnstageVolume(self, request: pb.NodeUnstageVolumeRequest) -> pb.NodeUnstageVolumeResponse:  # noqa: N802
        """Unmount the share once everything that was written is on its server."""
        volume = _volume(request.volume_id)
        place = checks.path("staging_target_path", request.staging_target_path)
        with self._locks.alone(volume):
            while (found := mounts.mount_at(place)) is not None:
                if not found.is_nfs:
                    raise FailedPreconditionError(f"{place} is a mount of {found.kind}, which is not of this driver")
                await self._unstage(volume, place, found)
            self._leaving.pop(place, None)
        return pb.NodeUnstageVolumeResponse()

    async def _unstage(self, volume: str, place: str, found: Mount) -> None:
        began = self._leaving.setdefault(place, time.monotonic())
        patient_until = trio.current_time() + began + self._patience - time.monotonic()
        told_by = trio.current_effective_deadline() - _TELL
        port = int(found.shown.get("port", "2049"))
        target = Target(server=found.server, port=port, share=f"/{found.share}", options="")
        with trio.move_on_at(min(told_by, max(patient_until, trio.current_time() + mounts.LOOK))):
            try:
                await mounts.write_back(place, float("inf"))
            except mounts.StaleError:
                await mounts.detach(place, force=True)
                return
            except CommandError as error:
                # what could not be written back was told to those who wrote it
                log.warning("not_written_back", volume=volume, place=place, why=str(error))
            try:
                await mounts.unmount(place)
            except mounts.BusyError as error:
                raise FailedPreconditionError(str(error)) from error
            return
        if trio.current_time() < patient_until or not (problem := await _why_silent(target)):
            raise UnavailableError(
                f"volume {volume} stays on node {self.name} until what was written to it is at {found.server}"
            )
        log.warning("given_up", volume=volume, place=place, server=found.server, why=problem, waited=self._patience)
        await mounts.detach(place, force=True)

    async def NodePublishVolume(self, request: pb.NodePublishVolumeRequest) -> pb.NodePublishVolumeResponse:  # noqa: N802
        volume = _volume(request.volume_id)
        place = checks.path("target_path", request.target_path)
        staged_at = checks.path("staging_target_path", request.staging_target_path)
        capability = checks.capability(request)
        checks.small_map("publish_context", request.publish_context)
        with self._locks.place(volume, place):
            await self._publish(volume, staged_at, place, request.readonly or checks.only_reads(capability))
        return pb.NodePublishVolumeResponse()

    async def _publish(self, volume: str, staged_at: str, place: str, read_only: bool) -> None:
        staged = mounts.mount_at(staged_at)
        if staged is None or not staged.is_nfs or staged.share != volume:
            raise FailedPreconditionError(f"volume {volume} is not staged at {staged_at}")
        if (found := mounts.mount_at(place)) is not None:
            if (found.device, found.root) == (staged.device, staged.root):
                if found.read_only != (read_only or staged.read_only):
                    how = "only readable" if found.read_only else "writable"
                    raise AlreadyExistsError(f"volume {volume} is published at {place} already, and is {how} there")
                return
            if not found.is_nfs or found.share != volume:
                raise AlreadyExistsError(f"{found.source} is mounted at {place} already")
            # of a staged mount that was made anew since
            await mounts.detach(place)
        await mounts.make_place(place, parents=False)
        try:
            await mounts.bind(staged_at, place, read_only=read_only)
        except TimeoutProblem as error:
            raise UnavailableError(f"volume {volume} cannot be published: {error}") from error

    async def NodeUnpublishVolume(  # noqa: N802
        self, request: pb.NodeUnpublishVolumeRequest
    ) -> pb.NodeUnpublishVolumeResponse:
        volume = _volume(request.volume_id)
        place = checks.path("target_path", request.target_path)
        with self._locks.place(volume, place):
            while mounts.mount_at(place) is not None:
                try:
                    await mounts.unmount(place)
                except (mounts.BusyError, TimeoutProblem):
                    # its pod has ended: what still has a file open there keeps the filesystem, not the place
                    await mounts.detach(place)
            mounts.drop_place(place)
        return pb.NodeUnpublishVolumeResponse()

    async def NodeGetVolumeStats(  # noqa: N802
        self, request: pb.NodeGetVolumeStatsRequest
    ) -> pb.NodeGetVolumeStatsResponse:
        volume = checks.required("volume_id", request.volume_id)
        place = checks.path("volume_path", request.volume_path)
        found = mounts.mount_at(place)
        if found is None or not found.is_nfs or found.share != volume:
            raise NotFoundError(f"volume {volume} is not at {place}")
        try:
            used = await mounts.usage(place)
        except TimeoutProblem:
            raise UnavailableError(f"volume {volume}: {found.server} does not answer at present") from None
        unit = pb.VolumeUsage
        return pb.NodeGetVolumeStatsResponse(
            usage=[
                unit(unit=unit.BYTES, total=used.total, available=used.available, used=used.total - used.free),
                unit(
                    unit=unit.INODES,
                    total=used.inodes,
                    available=used.inodes_free,
                    used=used.inodes - used.inodes_free,
                ),
            ]
        )


def _volume(given: str) -> str:
    """Raises InvalidArgumentError, NotFoundError."""
    if not is_volume_id(checks.required("volume_id", given)):
        raise NotFoundError(f"there is no volume {given!r}: ids are DNS labels")
    return given


def _check_same(found: Mount, target: Target) -> None:
    """Raises AlreadyExistsError."""
    if not found.is_nfs or f"/{found.share}" != target.share:
        raise AlreadyExistsError(f"{found.source} is mounted at {found.place} already")
    if option := options.differs(target.options, {**found.shown, **found.options}):
        raise AlreadyExistsError(f"volume {found.share} is staged at {found.place} already, without {option}")


async def _why_silent(target: Target) -> str:
    """Why an NFS server does not answer, or nothing when it does."""
    with trio.move_on_after(_NULL):
        try:
            async with connect(target.server, target.port) as connection:
                await connection.call(PROC_NULL)
        except RpcError as error:
            return str(error)
        return ""
    return f"no answer within {_NULL:g} s"
