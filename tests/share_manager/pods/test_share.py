"""What a share's pod makes of its Volume, what it reports, and whom it lets in."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from share_manager.cli.pod import serve_options
from share_manager.errors import UsageError
from share_manager.kube.meta import ObjectMeta
from share_manager.kube.records import StorePlace
from share_manager.kube.resources import (
    Attachment,
    EncryptionSpec,
    ExportSpec,
    ShareManager,
    ShareManagerSpec,
    StorageNode,
    StorageNodeStatus,
    Volume,
    VolumeSpec,
)
from share_manager.pods.allowed import LOOPBACK, allowed
from share_manager.pods.home import PodOptions, report_of
from share_manager.share.export import ExportOptions
from share_manager.share.network import NetworkOptions
from share_manager.share.status import ClientInfo, ShareStatus

HERE = NetworkOptions(mode="here")


def volume(**changes: object) -> Volume:
    spec = msgspec.structs.replace(VolumeSpec(size=1 << 30), **changes)
    return Volume(metadata=ObjectMeta(name="vol1"), spec=spec)


def test_a_volume_says_how_it_is_served() -> None:
    export = ExportSpec(squash="root", root_uid=7, root_mode="0750", lease_lifetime=40, grace_period=30)
    options = serve_options(volume(filesystem="xfs", export=export), ExportOptions(port=2050), HERE, 0, None)
    assert options.filesystem.kind == "xfs"
    assert (options.filesystem.root_owner, options.filesystem.root_mode) == ((7, 0), 0o750)
    assert (options.export.squash, options.export.port) == ("root", 2050)
    # clients get at least as long to reclaim as they keep their locks
    assert options.export.grace_period == 40
    assert not options.alone
    # nobody but this machine until it is known who may
    assert options.export.allow == LOOPBACK
    assert not options.encryption.wanted


def test_an_encrypted_one_needs_its_secret(tmp_path: Path) -> None:
    encrypted = volume(encrypted=True, encryption=EncryptionSpec(key_size=512, allow_discards=True))
    with pytest.raises(UsageError, match=r"spec\.passphraseSecret"):
        serve_options(encrypted, ExportOptions(), HERE, 0, None)
    (tmp_path / "CRYPTO_KEY_VALUE").write_text("secret words")
    (tmp_path / "CRYPTO_KEY_HASH").write_text("sha512")
    options = serve_options(encrypted, ExportOptions(), HERE, 0, str(tmp_path))
    assert options.encryption.wanted
    assert options.encryption.discards
    assert options.encryption.parameters.key_size == 512
    assert options.encryption.parameters.digest == "sha512"
    assert "secret words" not in repr(options)


def test_a_report_is_what_the_controller_needs() -> None:
    options = PodOptions(
        instance="x1", node="a", place=StorePlace(namespace="s", holder="x1"), cluster_secret=Path("/secret")
    )
    status = ShareStatus(
        volume="vol1",
        state="running",
        kind="pod",
        epoch=4,
        clients=(ClientInfo(address="10.0.0.1"),),
        in_grace=True,
        grace_ends_at=1767225600.4,
        last_failure="old",
    )
    said = report_of(status, options)
    assert (said.instance, said.node, said.state, said.epoch, said.clients) == ("x1", "a", "running", 4, 1)
    assert said.grace_ends == "2026-01-01T00:00:00Z"
    # what is mended needs nobody's attention
    assert said.failure == ""
    assert report_of(msgspec.structs.replace(status, state="repairing"), options).failure == "old"


def test_who_may_mount() -> None:
    nodes = [
        StorageNode(metadata=ObjectMeta(name=name), status=StorageNodeStatus(addresses=addresses))
        for name, addresses in (("a", ("10.0.0.1", "172.17.0.1", "fd00::1")), ("b", ("10.0.0.2",)))
    ]
    share = ShareManager(metadata=ObjectMeta(name="vol1"), spec=ShareManagerSpec(attachments={"a": Attachment()}))
    more = volume(export=ExportSpec(allow=("192.0.2.0/24",)))
    found = allowed(share, more, nodes)
    assert set(found) == {*LOOPBACK, "10.0.0.1/32", "172.17.0.1/32", "fd00::1/128", "192.0.2.0/24"}
    assert found == allowed(share, more, reversed(nodes))
    assert set(allowed(None, None, nodes)) == set(LOOPBACK)
