"""What a StorageClass and a PVC describe, and when a volume that is there is another one."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from share_manager.csi.errors import InvalidArgumentError, OutOfRangeError
from share_manager.csi.parameters import incompatible, read
from share_manager.csi.protocol import csi_pb2 as pb
from share_manager.kube.resources import VolumeSpec
from share_manager.units import BLOCK, MAX_SIZE, MIN_SIZE
from tests.share_manager.csi.caller import capability

GIB = 1 << 30


def request(
    parameters: dict[str, str] | None = None,
    *,
    required: int = 0,
    limit: int = 0,
    capabilities: list[pb.VolumeCapability] | None = None,
) -> pb.CreateVolumeRequest:
    return pb.CreateVolumeRequest(
        name="v",
        capacity_range=pb.CapacityRange(required_bytes=required, limit_bytes=limit),
        volume_capabilities=capabilities or [capability()],
        parameters=parameters or {},
    )


def test_without_parameters_it_is_the_default_of_a_volume() -> None:
    assert read(request(), "").spec == VolumeSpec(size=10 * GIB)


def test_every_parameter_has_its_place() -> None:
    said = {
        "replicas": "2",
        "encrypted": "true",
        "dirsync": "false",
        "squash": "root",
        "readOnly": "true",
        "allow": "192.0.2.0/24, 2001:db8::/32",
        "rootUid": "1000",
        "rootGid": "1001",
        "rootMode": "0750",
        "leaseLifetime": "10",
        "gracePeriod": "15",
        "luksCipher": "aes-xts-plain64",
        "luksHash": "sha512",
        "luksKeySize": "512",
        "luksPbkdf": "argon2id",
        "allowDiscards": "true",
        "nfsOptions": "vers=4.1,soft",
        "csi.storage.k8s.io/pvc/name": "claim",
        "csi.storage.k8s.io/pvc/namespace": "team",
    }
    wanted = read(request(said, required=GIB, capabilities=[capability(fs="xfs")]), "My Volume")
    spec = wanted.spec
    assert (spec.size, spec.replicas, spec.filesystem, spec.encrypted, spec.dirsync) == (GIB, 2, "xfs", True, False)
    assert (spec.original_name, wanted.nfs_options, wanted.claim) == ("My Volume", "vers=4.1,soft", "team/claim")
    export = spec.export
    assert (export.squash, export.read_only, export.allow) == ("root", True, ("192.0.2.0/24", "2001:db8::/32"))
    assert (export.root_uid, export.root_gid, export.root_mode) == (1000, 1001, "0750")
    assert (export.lease_lifetime, export.grace_period) == (10, 15)
    assert (spec.encryption.hash, spec.encryption.key_size, spec.encryption.pbkdf) == ("sha512", 512, "argon2id")
    assert spec.encryption.allow_discards


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"replica": "3"}, "replica"),
        ({"replicas": "0"}, "replicas"),
        ({"replicas": "10"}, "replicas"),
        ({"replicas": "three"}, "replicas"),
        ({"encrypted": "yes"}, "encrypted"),
        ({"squash": "everyone"}, "squash"),
        ({"allow": "192.0.2.0/33"}, "allow"),
        ({"rootUid": "-1"}, "rootUid"),
        ({"rootUid": "4294967295"}, "rootUid"),
        ({"rootMode": "9"}, "rootMode"),
        ({"leaseLifetime": "9"}, "leaseLifetime"),
        ({"leaseLifetime": "30", "gracePeriod": "20"}, "gracePeriod"),
        ({"luksCipher": "aes-xts-plain64"}, "luksCipher"),
        ({"encrypted": "true", "luksKeySize": "300"}, "luksKeySize"),
        ({"encrypted": "true", "luksPbkdf": "md5"}, "luksPbkdf"),
        ({"nfsOptions": "vers=3"}, "nfsOptions"),
        ({"a": "b" * 5000}, "parameters"),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(parameters: dict[str, str], named: str) -> None:
    with pytest.raises(InvalidArgumentError, match=named):
        read(request(parameters), "")


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        ([capability(block=True)], "Block"),
        ([capability(), capability(block=True)], "Block"),
        ([pb.VolumeCapability(access_mode=capability().access_mode)], "access_type"),
        ([pb.VolumeCapability(mount=pb.VolumeCapability.MountVolume())], "access_mode"),
        ([capability(fs="btrfs")], "btrfs"),
        ([capability(fs="ext4"), capability(fs="xfs")], "fsType"),
        ([capability(flags=("vers=3",))], "vers"),
        ([capability(flags=("hard,",) * 2000)], "mount_flags"),
    ],
)
def test_uses_that_are_not_offered_are_refused(found: list[pb.VolumeCapability], problem: str) -> None:
    with pytest.raises(InvalidArgumentError, match=problem):
        read(request(capabilities=found), "")


def test_a_request_without_uses_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="volume_capabilities are missing"):
        read(pb.CreateVolumeRequest(name="v"), "")


@pytest.mark.parametrize(
    ("modes", "access"),
    [
        (["MULTI_NODE_MULTI_WRITER"], "ReadWriteMany"),
        (["SINGLE_NODE_WRITER"], "ReadWriteOnce"),
        (["SINGLE_NODE_SINGLE_WRITER", "SINGLE_NODE_MULTI_WRITER"], "ReadWriteOnce"),
        (["SINGLE_NODE_WRITER", "MULTI_NODE_READER_ONLY"], "ReadWriteMany"),
    ],
)
def test_access_modes(modes: list[str], access: str) -> None:
    assert read(request(capabilities=[capability(mode) for mode in modes]), "").spec.access_mode == access


@given(
    required=st.integers(0, MAX_SIZE + GIB),
    extra=st.integers(0, 1 << 40) | st.none(),
    fs=st.sampled_from(["ext4", "xfs"]),
    encrypted=st.booleans(),
)
# nothing is required, and what is allowed is no whole number of blocks
@example(required=0, extra=83890177, fs="ext4", encrypted=False)
def test_a_size_is_within_its_range_or_refused(required: int, extra: int | None, fs: str, encrypted: bool) -> None:
    limit = 0 if extra is None else required + extra
    asked = request(
        {"encrypted": str(encrypted).lower()}, required=required, limit=limit, capabilities=[capability(fs=fs)]
    )
    try:
        size = read(asked, "").spec.size
    except OutOfRangeError:
        least = max(required, MIN_SIZE[fs])
        assert least > MAX_SIZE - (1 << 20) or (limit and limit < least + BLOCK + (16 << 20))
        return
    assert size >= max(required, MIN_SIZE[fs])
    assert not limit or size <= limit
    assert size % BLOCK == 0


@pytest.mark.parametrize(("required", "limit"), [(-1, 0), (0, -1), (2 * GIB, GIB)])
def test_ranges_that_cannot_be(required: int, limit: int) -> None:
    with pytest.raises(InvalidArgumentError):
        read(request(required=required, limit=limit), "")


@pytest.mark.parametrize(("required", "limit"), [(0, 4096), (1 << 51, 0), (GIB + 1, GIB + 2)])
def test_sizes_that_no_volume_has(required: int, limit: int) -> None:
    with pytest.raises(OutOfRangeError):
        read(request(required=required, limit=limit), "")


def test_the_same_request_finds_its_volume_again_and_another_does_not() -> None:
    base: dict[str, Any] = {"parameters": {"replicas": "2"}, "required": GIB}
    there = read(request(**base), "").spec
    same = read(request(**base), "")
    assert incompatible(there, "", same, GIB) == ""
    # it may have grown since, and a smaller one is no other
    grown = msgspec.structs.replace(there, size=2 * GIB)
    assert incompatible(grown, "", same, GIB) == ""
    assert incompatible(grown, "", read(request({"replicas": "2"}, required=GIB, limit=GIB), ""), GIB) != ""
    for other in (
        request({"replicas": "3"}, required=GIB),
        request({"replicas": "2"}, required=2 * GIB),
        request({"replicas": "2"}, required=GIB, capabilities=[capability("SINGLE_NODE_WRITER")]),
        request({"replicas": "2"}, required=GIB, capabilities=[capability(fs="xfs")]),
        request({"replicas": "2", "nfsOptions": "soft"}, required=GIB),
        request({"replicas": "2", "squash": "all"}, required=GIB),
    ):
        assert incompatible(there, "", read(other, ""), other.capacity_range.required_bytes) != ""
    assert "original_name" in incompatible(there, "", read(request(**base), "V"), GIB)
