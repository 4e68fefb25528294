"""Parameters of a StorageClass, and the volume that they and a request describe."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, TypeAlias

import msgspec

from share_manager import units
from share_manager.csi import checks, options
from share_manager.csi.errors import InvalidArgumentError, OutOfRangeError
from share_manager.csi.protocol import csi_pb2 as pb
from share_manager.encryption import HEADER_SIZE
from share_manager.errors import InvalidValueError
from share_manager.kube.resources import VolumeSpec

DEFAULT_SIZE = 10 << 30
ROUND = 1 << 20
"""Sizes are multiples of that: in bytes, so that no filesystem has a ragged end."""
SIDECAR = "csi.storage.k8s.io/"
"""Prefix of what external-provisioner adds."""
NFS_OPTIONS: Final = "nfsOptions"
_FILESYSTEMS = ("ext4", "xfs")

Reader: TypeAlias = Callable[[str], Any]


def _boolean(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError("true or false")
    return text == "true"


def _networks(text: str) -> tuple[str, ...]:
    return tuple(units.parse_network(word, "allow") for word in text.replace(",", " ").split())


_KNOWN: dict[str, tuple[str, Reader]] = {
    "replicas": ("replicas", int),
    "encrypted": ("encrypted", _boolean),
    "dirsync": ("dirsync", _boolean),
    "squash": ("export.squash", str),
    "readOnly": ("export.readOnly", _boolean),
    "allow": ("export.allow", _networks),
    "rootUid": ("export.rootUid", int),
    "rootGid": ("export.rootGid", int),
    "rootMode": ("export.rootMode", str),
    "leaseLifetime": ("export.leaseLifetime", int),
    "gracePeriod": ("export.gracePeriod", int),
    "luksCipher": ("encryption.cipher", str),
    "luksHash": ("encryption.hash", str),
    "luksKeySize": ("encryption.keySize", int),
    "luksPbkdf": ("encryption.pbkdf", str),
    "allowDiscards": ("encryption.allowDiscards", _boolean),
}
"""By parameter: where it is in a Volume's spec, and how it is read."""
_WHERE = re.compile(r" - at `\$\.([A-Za-z.]+)")


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """`limit` in bytes, 0 for none. `claim`: the PVC, as namespace/name, when the provisioner said."""

    spec: VolumeSpec
    limit: int
    nfs_options: str
    claim: str = ""


def read(request: pb.CreateVolumeRequest, original_name: str) -> Wanted:
    """Raises InvalidArgumentError, OutOfRangeError."""
    capabilities = checks.capabilities(request.volume_capabilities)
    parameters = dict(checks.small_map("parameters", request.parameters))
    claim = "/".join(parameters.get(f"{SIDECAR}pvc/{part}", "") for part in ("namespace", "name")).strip("/")
    parameters = {key: value for key, value in parameters.items() if not key.startswith(SIDECAR)}
    nfs_options = parameters.pop(NFS_OPTIONS, "")
    options.parse(nfs_options, NFS_OPTIONS)
    for capability in capabilities:
        options.parse_flags(capability.mount.mount_flags)
    filesystem = _filesystem(capabilities)
    encrypted = parameters.get("encrypted") == "true"
    if not encrypted and (lost := [key for key in parameters if _KNOWN.get(key, ("",))[0].startswith("encryption.")]):
        raise InvalidArgumentError(f"parameter {lost[0]} needs encrypted: 'true'")
    size, limit = _size(request.capacity_range, filesystem, encrypted)
    spec = _spec(
        parameters,
        size=size,
        filesystem=filesystem,
        accessMode=_access_mode(capabilities),
        originalName=original_name,
    )
    if spec.export.grace_period < spec.export.lease_lifetime:
        raise InvalidArgumentError("parameter gracePeriod is shorter than leaseLifetime, so clients would lose locks")
    return Wanted(spec=spec, limit=limit, nfs_options=nfs_options, claim=claim)


def _spec(parameters: Mapping[str, str], **fixed: Any) -> VolumeSpec:
    """With the same checks as the Volume's schema has. Raises InvalidArgumentError."""
    parts: dict[str, Any] = {**fixed, "export": {}, "encryption": {}}
    for key, text in parameters.items():
        if key not in _KNOWN:
            known = ", ".join(sorted([*_KNOWN, NFS_OPTIONS]))
            raise InvalidArgumentError(f"parameter {key!r} is not known; there are {known}")
        where, parse = _KNOWN[key]
        part, _, field = where.rpartition(".")
        try:
            (parts[part] if part else parts)[field] = parse(text)
        except (ValueError, InvalidValueError) as error:
            raise InvalidArgumentError(f"parameter {key} cannot be {text!r}: {error}") from None
    try:
        return msgspec.convert(parts, VolumeSpec)
    except msgspec.ValidationError as error:
        found = _WHERE.search(str(error))
        reason = str(error).partition(" - at ")[0]
        for key, (where, _) in _KNOWN.items():
            if found is not None and where == found[1]:
                raise InvalidArgumentError(f"parameter {key} cannot be {parameters.get(key)!r}: {reason}") from None
        raise InvalidArgumentError(f"parameters: {error}") from None


def _filesystem(capabilities: Iterable[pb.VolumeCapability]) -> str:
    named = {one.mount.fs_type for one in capabilities if one.mount.fs_type}
    if not named:
        return _FILESYSTEMS[0]
    found = named.pop()
    if named or found not in _FILESYSTEMS:
        raise InvalidArgumentError(f"fsType {found!r} is not offered: use {' or '.join(_FILESYSTEMS)}")
    return found


def _access_mode(capabilities: Iterable[pb.VolumeCapability]) -> str:
    single = all(one.access_mode.mode in checks.SINGLE_NODE for one in capabilities)
    return "ReadWriteOnce" if single else "ReadWriteMany"


def _size(wanted: pb.CapacityRange, filesystem: str, encrypted: bool) -> tuple[int, int]:
    """Bytes of the volume, and the most that it may have, 0 for no limit."""
    least, limit = wanted.required_bytes, wanted.limit_bytes
    if least < 0 or limit < 0:
        raise InvalidArgumentError("capacity_range is negative")
    if limit and least > limit:
        raise InvalidArgumentError(f"capacity_range requires {least} bytes and allows {limit}")
    size = least or min(DEFAULT_SIZE, limit // units.BLOCK * units.BLOCK or DEFAULT_SIZE)
    floor = _smallest(filesystem, encrypted)
    size = max(size, floor)
    rounded = -(-size // ROUND) * ROUND
    if limit and rounded > limit:
        # between what is required and what is allowed a whole number of blocks may still be
        rounded = limit // units.BLOCK * units.BLOCK
        if rounded < size:
            raise OutOfRangeError(f"no volume has between {least} and {limit} bytes: the smallest has {floor}")
    if rounded > units.MAX_SIZE:
        raise OutOfRangeError(f"{least} bytes are more than a volume can have ({units.MAX_SIZE})")
    return rounded, limit


def _smallest(filesystem: str, encrypted: bool) -> int:
    return units.MIN_SIZE[filesystem] + (HEADER_SIZE if encrypted else 0)


def smallest(spec: VolumeSpec) -> int:
    """Bytes of the smallest volume of that kind."""
    return _smallest(spec.filesystem, spec.encrypted)


def incompatible(found: VolumeSpec, nfs_options: str, wanted: Wanted, required: int) -> str:
    """In what a volume that is there is not what is asked for, or nothing."""
    if found.size < required or (wanted.limit and found.size > wanted.limit):
        return f"it has {found.size} bytes"
    same_size = msgspec.structs.replace(found, size=wanted.spec.size)
    for field in msgspec.structs.fields(VolumeSpec):
        if getattr(same_size, field.name) != getattr(wanted.spec, field.name):
            return f"its {field.name} is {getattr(found, field.name)!r}"
    return f"its {NFS_OPTIONS} are {nfs_options!r}" if nfs_options != wanted.nfs_options else ""


def context(nfs_options: str) -> Mapping[str, str]:
    """The volume_context: always the same for a volume."""
    return {NFS_OPTIONS: nfs_options} if nfs_options else {}
