"""What a node tells the cluster about itself, and what it does when a share is exported by another pod."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from share_manager.csi import mounts
from share_manager.csi.presence import Follower, Seen, publish_addresses, publish_once, switched
from share_manager.kube.client import Client
from share_manager.kube.meta import ObjectMeta
from share_manager.kube.resources import ShareManager, ShareManagerStatus, StorageNode
from share_manager.node import addresses
from tests.lab.control_plane import ControlPlane

SHOWN: list[dict[str, Any]] = [
    {"ifname": "lo", "addr_info": [{"local": "127.0.0.1"}, {"local": "::1"}]},
    {"ifname": "eth0", "addr_info": [{"local": "192.0.2.10"}, {"local": "2001:db8::10"}, {"local": "fe80::1"}]},
    {"ifname": "cni0", "addr_info": [{"local": "10.244.1.1"}]},
    {"ifname": "kube-ipvs0", "addr_info": [{"local": "10.96.0.1"}, {"local": "10.96.0.10"}]},
    {"ifname": "nodelocaldns", "addr_info": [{"local": "169.254.20.10"}]},
    {"ifname": "down", "addr_info": [{}], "flags": ["NO-CARRIER"]},
    {"ifname": "twice", "addr_info": [{"local": "192.0.2.10"}, {"local": "192.0.2.9"}]},
]


def test_a_host_has_the_addresses_of_its_bridges_too_and_not_those_of_services() -> None:
    assert addresses.parse(json.dumps(SHOWN)) == ("10.244.1.1", "192.0.2.9", "192.0.2.10", "2001:db8::10")


def test_there_is_an_end_to_them() -> None:
    many = [{"ifname": "eth0", "addr_info": [{"local": f"10.0.{n // 250}.{n % 250 + 1}"} for n in range(2000)]}]
    assert len(addresses.parse(json.dumps(many))) == addresses.MOST


async def test_this_host_has_some() -> None:
    assert all(":" in one or one.count(".") == 3 for one in await addresses.of_this_host())


def share(name: str, state: str, instance: str, service_ip: str = "10.96.0.7") -> ShareManager:
    status = ShareManagerStatus(state=state, instance=instance, service_ip=service_ip)  # type: ignore[arg-type]
    return ShareManager(metadata=ObjectMeta(name=name), status=status)


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        (None, share("v", "running", "b"), False),
        (Seen("a", "10.96.0.7"), share("v", "running", "b"), True),
        (Seen("a", "10.96.0.7"), share("v", "running", "a"), False),
        (Seen("a", "10.96.0.7"), share("v", "starting", "b"), False),
        (Seen("a", "10.96.0.7"), share("v", "running", ""), False),
        (Seen("a", "10.96.0.7"), share("v", "running", "b", ""), False),
    ],
)
def test_a_share_has_switched_when_another_pod_exports_it(
    before: Seen | None, now: ShareManager, expected: bool
) -> None:
    assert switched(before, now) is expected


real = pytest.mark.system


@real
async def test_addresses_are_written_once_and_beside_what_others_write(kube: Client) -> None:
    await publish_once(kube, "a", ("192.0.2.1",))
    first = await kube.get(StorageNode, "a")
    await publish_once(kube, "a", ("192.0.2.1",))
    assert (await kube.get(StorageNode, "a")).metadata.resource_version == first.metadata.resource_version
    await kube.patch(StorageNode, "a", {"status": {"replicaAddress": "192.0.2.1:7500"}}, subresource="status")
    await publish_once(kube, "a", ("192.0.2.1", "10.244.1.1"))
    found = (await kube.get(StorageNode, "a")).status
    assert (found.addresses, found.replica_address) == (("192.0.2.1", "10.244.1.1"), "192.0.2.1:7500")


@real
async def test_addresses_are_published_when_the_api_server_is_back(
    kube: Client, control_plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = trio.Event()

    async def some() -> tuple[str, ...]:
        asked.set()
        return ("192.0.2.77",)

    monkeypatch.setattr(addresses, "of_this_host", some)
    async with trio.open_nursery() as nursery:
        with control_plane.away():
            nursery.start_soon(publish_addresses, kube, "late")
            await asked.wait()
        with trio.fail_after(30):
            while (found := await kube.find(StorageNode, "late")) is None or not found.status.addresses:
                await trio.sleep(0.1)
        assert found.status.addresses == ("192.0.2.77",)
        nursery.cancel_scope.cancel()


@real
async def test_connections_of_mounted_shares_are_ended_at_a_switch_also_after_an_outage(
    kube: Client, control_plane: ControlPlane, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    line = "412 99 0:51 / /staged rw shared:7 - nfs4 10.96.0.7:/{} rw,vers=4.2,hard\n"
    (tmp_path / "mountinfo").write_text(line.format("mounted"))
    monkeypatch.setattr(mounts, "MOUNTINFO", tmp_path / "mountinfo")
    moved: list[str] = []

    async def note(volume: str, address: str, port: int) -> None:
        moved.append(f"{volume} {address}:{port}")

    async def exported(name: str, instance: str, state: str = "running") -> None:
        before = await kube.ensure(ShareManager(metadata=ObjectMeta(name=name)))
        status = share(name, state, instance).status
        await kube.update_status(before, msgspec.structs.replace(before, status=status))

    async def until(count: int) -> None:
        with trio.fail_after(40):
            while len(moved) < count:
                await trio.sleep(0.05)

    await exported("mounted", "pod-1")
    await exported("elsewhere", "pod-1")
    async with trio.open_nursery() as nursery:
        follower = Follower(kube, note)
        nursery.start_soon(follower.run)
        with trio.fail_after(30):
            while len(follower.seen) < 2:
                await trio.sleep(0.05)
        assert moved == []
        await exported("elsewhere", "pod-2")
        await exported("mounted", "pod-2", "starting")
        await exported("mounted", "pod-2")
        await until(1)
        with control_plane.away():
            pass
        await exported("mounted", "pod-3")
        await until(2)
        assert moved == ["mounted 10.96.0.7:2049"] * 2
        nursery.cancel_scope.cancel()
