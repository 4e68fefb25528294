"""The Controller service: PVCs become Volumes, and nodes that are to mount one become attachments of its ShareManager.

The objects are all the state there is. Every call may be repeated, at any point where it was cut off, and by another
process. What makes volumes and starts shares are the controllers of these kinds; a call waits for them until shortly
before its deadline, and says then what they are waiting for.
"""

from __future__ import annotations

import base64
import contextlib
import secrets
from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import partial
from typing import TypeVar

import msgspec
import trio

from share_manager import units
from share_manager.csi import checks, options, parameters, publishing
from share_manager.csi.errors import (
    AbortedError,
    AlreadyExistsError,
    CsiError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
)
from share_manager.csi.locks import Locks
from share_manager.csi.names import is_volume_id, volume_id
from share_manager.csi.node import Target
from share_manager.csi.parameters import NFS_OPTIONS
from share_manager.csi.protocol import csi_pb2 as pb
from share_manager.encryption import read_secret
from share_manager.errors import PassphraseError
from share_manager.kube import errors as kube_errors
from share_manager.kube.client import Client
from share_manager.kube.core import Node, Secret, Service
from share_manager.kube.meta import Condition, ObjectMeta
from share_manager.kube.resources import (
    ERASE_ANNOTATION,
    GROUP,
    VOLUME_LABEL,
    Attachment,
    ShareManager,
    StorageNode,
    Volume,
)

T = TypeVar("T")

OPTIONS_ANNOTATION = f"{GROUP}/nfs-options"
"""On a Volume: the mount options of its StorageClass."""
CLAIM_ANNOTATION = f"{GROUP}/claim"
"""On a Volume, for people: the PVC that it was made for."""
PORT = 2049
_PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8)
_TELL = 0.3
_SECRET_PARAMETER = "csi.storage.k8s.io/controller-publish-secret-name"


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """A publication. `asked`: the options that were asked for, of those in the attachment."""

    node: str
    attachment: Attachment
    asked: tuple[str, ...]
    single_node: bool


class Controller:
    def __init__(self, client: Client) -> None:
        self._client = client
        self._locks = Locks()

    async def ControllerGetCapabilities(  # noqa: N802
        self, request: pb.ControllerGetCapabilitiesRequest
    ) -> pb.ControllerGetCapabilitiesResponse:
        kinds = pb.ControllerServiceCapability.RPC
        offered = (
            kinds.CREATE_DELETE_VOLUME,
            kinds.PUBLISH_UNPUBLISH_VOLUME,
            kinds.LIST_VOLUMES,
            kinds.GET_CAPACITY,
            kinds.PUBLISH_READONLY,
            kinds.LIST_VOLUMES_PUBLISHED_NODES,
            kinds.SINGLE_NODE_MULTI_WRITER,
        )
        return pb.ControllerGetCapabilitiesResponse(
            capabilities=[pb.ControllerServiceCapability(rpc=kinds(type=kind)) for kind in offered]
        )

    async def CreateVolume(self, request: pb.CreateVolumeRequest) -> pb.CreateVolumeResponse:  # noqa: N802
        volume = volume_id(request.name)
        if request.HasField("volume_content_source"):
            raise InvalidArgumentError("volume_content_source: volumes of snapshots or volumes are not offered yet")
        if request.mutable_parameters:
            raise InvalidArgumentError("mutable_parameters are not offered")
        wanted = parameters.read(request, "" if volume == request.name else request.name)
        with self._locks.alone(volume), _kube():
            found = await self._client.find(Volume, volume)
            if found is None:
                made = Volume(metadata=_meta(volume, wanted), spec=wanted.spec)
                found = await self._client.ensure(made)
            nfs_options = found.metadata.annotations.get(OPTIONS_ANNOTATION, "")
            required = request.capacity_range.required_bytes
            if problem := parameters.incompatible(found.spec, nfs_options, wanted, required):
                raise AlreadyExistsError(f"volume {volume} exists already, and {problem}")
            ready = await self._wait(f"volume {volume} is not ready yet", lambda: self._ready(volume))
        return pb.CreateVolumeResponse(volume=_told(ready))

    async def _ready(self, volume: str) -> tuple[Volume | None, str]:
        found = await self._client.find(Volume, volume)
        if found is None or found.deleting:
            raise AbortedError(f"volume {volume} is being deleted")
        if found.status.state == "ready":
            return found, ""
        return None, unhappy(found.status.conditions) or f"it is {found.status.state}"

    async def DeleteVolume(self, request: pb.DeleteVolumeRequest) -> pb.DeleteVolumeResponse:  # noqa: N802
        """Erases the data."""
        volume = checks.required("volume_id", request.volume_id)
        if not is_volume_id(volume):
            return pb.DeleteVolumeResponse()
        with self._locks.alone(volume), _kube():
            found = await self._client.find(Volume, volume)
            if found is not None:
                await self._delete(found)
                await self._wait(f"volume {volume} is not gone yet", lambda: self._gone(found))
        return pb.DeleteVolumeResponse()

    async def _delete(self, found: Volume) -> None:
        share = await self._client.find(ShareManager, found.name)
        if share is not None and share.spec.attachments:
            nodes = ", ".join(sorted(share.spec.attachments))
            raise FailedPreconditionError(f"volume {found.name} is still published on {nodes}")
        if found.metadata.annotations.get(ERASE_ANNOTATION) != found.name:
            await self._client.patch(
                Volume,
                found.name,
                {"metadata": {"annotations": {ERASE_ANNOTATION: found.name}, "uid": found.metadata.uid}},
            )
        await self._client.delete(Volume, found.name, uid=found.metadata.uid)

    async def _gone(self, before: Volume) -> tuple[bool | None, str]:
        found = await self._client.find(Volume, before.name)
        if found is None or found.metadata.uid != before.metadata.uid:
            return True, ""
        return None, unhappy(found.status.conditions)

    async def ControllerPublishVolume(  # noqa: N802
        self, request: pb.ControllerPublishVolumeRequest
    ) -> pb.ControllerPublishVolumeResponse:
        volume = checks.required("volume_id", request.volume_id)
        node = checks.required("node_id", request.node_id, checks.MAX_NODE_ID)
        capability = checks.capability(request)
        checks.small_map("volume_context", request.volume_context)
        read_only = request.readonly or checks.only_reads(capability)
        with _kube(), self._alone(volume):
            found = await self._volume(volume)
            machine = await self._client.find(Node, node)
            if machine is None:
                raise NotFoundError(f"there is no node {node}")
            asked = options.asked(
                request.volume_context.get(NFS_OPTIONS) or found.metadata.annotations.get(OPTIONS_ANNOTATION, ""),
                capability.mount.mount_flags,
            )
            kernel = machine.status.node_info.kernel_version
            chosen = options.resolve(asked, kernel=kernel, read_only=read_only)
            wanted = Wanted(
                node=node,
                attachment=Attachment(read_only=read_only, nfs_options=chosen),
                asked=tuple(option for key, option in asked.items() if key != "rw"),
                single_node=capability.access_mode.mode in checks.SINGLE_NODE,
            )
            data = _passphrase(request.secrets, volume) if found.spec.encrypted else {}
            attached = await self._update(volume, partial(self._attach, wanted, data))
            address = await self._wait(f"volume {volume} has no address yet", lambda: self._address(volume))
        target = Target(server=address, port=PORT, share=f"/{volume}", options=attached.nfs_options)
        return pb.ControllerPublishVolumeResponse(publish_context=target.context())

    async def _attach(self, wanted: Wanted, data: Mapping[str, str], share: ShareManager) -> Attachment:
        """Raises kube's ConflictError when the share is another one by now."""
        node, new = wanted.node, wanted.attachment
        found = publishing.attach(share, node, new, wanted.asked, single_node=wanted.single_node)
        before = share.spec.passphrase_secret
        kept = not data or await self._holds(before, data)
        if found is not None and kept:
            return found
        spec: dict[str, object] = {}
        if found is None:
            spec["attachments"] = {node: {"readOnly": new.read_only, "nfsOptions": new.nfs_options}}
        if kept:
            await self._change(share, spec)
            return new
        # before the share is wanted: its pod mounts it
        made = await self._make_secret(share, data)
        try:
            await self._change(share, {**spec, "passphraseSecret": made})
        except kube_errors.ConflictError:
            await self._client.delete(Secret, made)
            raise
        if before:
            await self._client.delete(Secret, before)
        return found or new

    async def _holds(self, name: str, data: Mapping[str, str]) -> bool:
        found = await self._client.find(Secret, name) if name else None
        return found is not None and found.data == data

    async def _make_secret(self, share: ShareManager, data: Mapping[str, str]) -> str:
        """Owned by the share, so that it goes with it; nothing else in the cluster has a reason to read it."""
        name = f"{_secret_prefix(share)}{secrets.token_hex(4)}"
        meta = ObjectMeta(name=name, labels={VOLUME_LABEL: share.name}, owner_references=(share.reference(),))
        await self._client.create(Secret(metadata=meta, data=dict(data), immutable=True))
        return name

    async def _address(self, volume: str) -> tuple[str | None, str]:
        """Of its Service, which is there before its share is: the node waits for that."""
        service = await self._client.find(Service, volume)
        found = service.spec.cluster_ip if service is not None else ""
        return found if found not in ("", "None") else None, "its Service is not there"

    async def ControllerUnpublishVolume(  # noqa: N802
        self, request: pb.ControllerUnpublishVolumeRequest
    ) -> pb.ControllerUnpublishVolumeResponse:
        volume = checks.required("volume_id", request.volume_id)
        node = checks.limited("node_id", request.node_id, checks.MAX_NODE_ID)
        if not is_volume_id(volume):
            return pb.ControllerUnpublishVolumeResponse()
        with _kube(), self._locks.alone(volume):
            if await self._client.find(ShareManager, volume) is not None:
                await self._update(volume, partial(self._detach, node))
        return pb.ControllerUnpublishVolumeResponse()

    async def _detach(self, node: str, share: ShareManager) -> None:
        """Raises kube's ConflictError when the share is another one by now."""
        leaving = [name for name in share.spec.attachments if node in ("", name)]
        last = len(leaving) == len(share.spec.attachments)
        spec: dict[str, object] = {}
        if leaving:
            spec["attachments"] = dict.fromkeys(leaving)
        if last and share.spec.passphrase_secret:
            spec["passphraseSecret"] = None
        if spec:
            await self._change(share, spec)
        if last:
            # those too that a call which was cut off had made
            for secret in (await self._client.list(Secret, labels=f"{VOLUME_LABEL}={share.name}")).items:
                if secret.name.startswith(_secret_prefix(share)):
                    await self._client.delete(Secret, secret.name)

    async def _update(self, volume: str, step: Callable[[ShareManager], Awaitable[T]]) -> T:
        """Take a step that changes the share as it is now, again when somebody else has changed it in between."""
        for pause in (*_PAUSES, *_PAUSES, *_PAUSES):
            share = await self._client.find(ShareManager, volume)
            if share is None or share.deleting:
                raise UnavailableError(f"volume {volume} has no ShareManager yet")
            try:
                return await step(share)
            except kube_errors.ConflictError:
                await trio.sleep(pause)
        raise AbortedError(f"ShareManager {volume} is being changed all the time")

    async def _change(self, share: ShareManager, spec: Mapping[str, object]) -> None:
        """Raises kube's ConflictError."""
        await self._client.patch(
            ShareManager, share.name, {"spec": dict(spec)}, version=share.metadata.resource_version
        )

    async def ValidateVolumeCapabilities(  # noqa: N802
        self, request: pb.ValidateVolumeCapabilitiesRequest
    ) -> pb.ValidateVolumeCapabilitiesResponse:
        volume = checks.required("volume_id", request.volume_id)
        if not request.volume_capabilities:
            raise InvalidArgumentError("volume_capabilities are missing")
        with _kube():
            found = await self._volume(volume)
        answer = pb.ValidateVolumeCapabilitiesResponse
        for one in request.volume_capabilities:
            if problem := checks.unusable(one) or _other_filesystem(one, found):
                return answer(message=problem)
        if key := publishing.changed_context(_context(found), request.volume_context):
            return answer(message=f"volume_context: {key} is not the volume's")
        return answer(
            confirmed=answer.Confirmed(
                volume_context=request.volume_context,
                volume_capabilities=request.volume_capabilities,
                parameters=request.parameters,
            )
        )

    async def ListVolumes(self, request: pb.ListVolumesRequest) -> pb.ListVolumesResponse:  # noqa: N802
        checks.limited("starting_token", request.starting_token)
        with _kube():
            volumes = {one.name: one for one in (await self._client.list(Volume)).items}
            shares = {one.name: one for one in (await self._client.list(ShareManager)).items}
        names, token = publishing.page(sorted(volumes), request.starting_token, request.max_entries)
        answer = pb.ListVolumesResponse
        entries = [
            answer.Entry(
                volume=_told(volumes[name]),
                status=answer.VolumeStatus(
                    published_node_ids=sorted(shares[name].spec.attachments) if name in shares else []
                ),
            )
            for name in names
        ]
        return answer(entries=entries, next_token=token)

    async def GetCapacity(self, request: pb.GetCapacityRequest) -> pb.GetCapacityResponse:  # noqa: N802
        wanted = pb.CreateVolumeRequest(volume_capabilities=request.volume_capabilities, parameters=request.parameters)
        if any(checks.unusable(one) for one in request.volume_capabilities):
            return pb.GetCapacityResponse(available_capacity=0)
        if not request.volume_capabilities:
            wanted.volume_capabilities.add(
                mount=pb.VolumeCapability.MountVolume(),
                access_mode=pb.VolumeCapability.AccessMode(mode=checks.Mode.MULTI_NODE_MULTI_WRITER),
            )
        spec = parameters.read(wanted, "").spec
        with _kube():
            nodes = (await self._client.list(StorageNode)).items
        found = publishing.room(nodes, spec.replicas)
        answer = pb.GetCapacityResponse(available_capacity=max(0, found))
        answer.maximum_volume_size.value = max(0, min(found, units.MAX_SIZE))
        answer.minimum_volume_size.value = parameters.smallest(spec)
        return answer

    async def _volume(self, volume: str) -> Volume:
        """Raises NotFoundError."""
        found = await self._client.find(Volume, volume) if is_volume_id(volume) else None
        if found is None or found.deleting:
            raise NotFoundError(f"there is no volume {volume!r}")
        return found

    @contextlib.contextmanager
    def _alone(self, volume: str) -> Iterator[None]:
        """Raises AbortedError, NotFoundError."""
        if not is_volume_id(volume):
            raise NotFoundError(f"there is no volume {volume!r}")
        with self._locks.alone(volume):
            yield

    async def _wait(self, what: str, look: Callable[[], Awaitable[tuple[T | None, str]]]) -> T:
        """What `look` finds, waiting for it until shortly before the deadline. Raises UnavailableError."""
        problem = ""
        tries = 0
        with trio.move_on_at(trio.current_effective_deadline() - _TELL):
            while True:
                found, problem = await look()
                if found is not None:
                    return found
                await trio.sleep(_PAUSES[min(tries, len(_PAUSES) - 1)])
                tries += 1
        raise UnavailableError(f"{what}{': ' if problem else ''}{problem}")


def _secret_prefix(share: ShareManager) -> str:
    return f"{share.name}-passphrase-"


def unhappy(conditions: tuple[Condition, ...]) -> str:
    """What those that are not as they should be say."""
    return "; ".join(one.message for one in conditions if one.status == "False" and one.message)


def _meta(volume: str, wanted: parameters.Wanted) -> ObjectMeta:
    said = {OPTIONS_ANNOTATION: wanted.nfs_options, CLAIM_ANNOTATION: wanted.claim}
    annotations = {key: value for key, value in said.items() if value}
    return ObjectMeta(name=volume, labels={VOLUME_LABEL: volume}, annotations=annotations)


def _context(volume: Volume) -> Mapping[str, str]:
    return parameters.context(volume.metadata.annotations.get(OPTIONS_ANNOTATION, ""))


def _told(volume: Volume) -> pb.Volume:
    return pb.Volume(volume_id=volume.name, capacity_bytes=volume.spec.size, volume_context=dict(_context(volume)))


def _other_filesystem(capability: pb.VolumeCapability, volume: Volume) -> str:
    asked = capability.mount.fs_type
    if asked and asked not in (volume.spec.filesystem, "nfs"):
        return f"volume {volume.name} has {volume.spec.filesystem}, not {asked}"
    return ""


def _passphrase(given: Mapping[str, str], volume: str) -> dict[str, str]:
    """The data of its Secret. Raises InvalidArgumentError."""
    if not given:
        raise InvalidArgumentError(
            f"volume {volume} is encrypted, and no passphrase came with the call: name a Secret in the StorageClass's "
            f"parameters {_SECRET_PARAMETER} and {_SECRET_PARAMETER.replace('-name', '-namespace')}"
        )
    try:
        read_secret({key: value.encode() for key, value in given.items()}, f"the Secret of {_SECRET_PARAMETER}")
    except PassphraseError as error:
        raise InvalidArgumentError(str(error)) from None
    return {
        key: base64.b64encode(value.encode()).decode()
        for key, value in sorted(given.items())
        if key.startswith("CRYPTO_")
    }


@contextlib.contextmanager
def _kube() -> Iterator[None]:
    """Errors of the API server as those of a call."""
    try:
        yield
    except CsiError:
        raise
    except (kube_errors.ApiAwayError, kube_errors.ConflictError, kube_errors.ExpiredError) as error:
        raise UnavailableError(str(error)) from error
    except kube_errors.InvalidObjectError as error:
        raise InvalidArgumentError(str(error)) from error
    except kube_errors.KubeError as error:
        raise InternalError(str(error)) from error
