"""What a node plugin tells the cluster, and what it does when the cluster tells that a share has moved."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import msgspec
import structlog
import trio

from share_manager.csi import mounts
from share_manager.errors import ShareManagerError
from share_manager.kube.client import Client
from share_manager.kube.errors import ConflictError
from share_manager.kube.informer import Informer
from share_manager.kube.meta import ObjectMeta
from share_manager.kube.resources import ShareManager, StorageNode
from share_manager.node import addresses

log = structlog.get_logger()

PORT = 2049
EVERY = 15.0
"""Seconds between looks at this host's addresses. What is as it was is not written."""
_AGAIN = 1.0
_MOST_AGAIN = 30.0


async def publish_addresses(client: Client, node: str) -> None:
    """Keep this host's addresses in its StorageNode, until cancelled."""
    pause = _AGAIN
    while True:
        try:
            await publish_once(client, node, await addresses.of_this_host())
        except ConflictError:
            continue
        except (ShareManagerError, msgspec.DecodeError) as error:
            log.warning("addresses_not_published", why=str(error))
            await trio.sleep(pause)
            pause = min(_MOST_AGAIN, pause * 2)
        else:
            pause = _AGAIN
            await trio.sleep(EVERY)


async def publish_once(client: Client, node: str, found: tuple[str, ...]) -> None:
    """Raises KubeError."""
    before = await client.ensure(StorageNode(metadata=ObjectMeta(name=node)))
    after = msgspec.structs.replace(before, status=msgspec.structs.replace(before.status, addresses=found))
    if before.status.addresses != found:
        await client.update_status(before, after)
        log.info("addresses_published", node=node, addresses=found)


class Seen(msgspec.Struct, frozen=True):
    """Which pod a share was last exported by."""

    instance: str
    service_ip: str


def switched(before: Seen | None, share: ShareManager) -> bool:
    """Whether connections to its address may lead to where it is no more."""
    status = share.status
    return (
        before is not None
        and status.state == "running"
        and bool(status.instance)
        and bool(status.service_ip)
        and before.instance != status.instance
    )


class Follower:
    """Watches the shares, and calls `moved` with the address of one that is exported by another pod than before, when
    this node mounts it. `seen`: who exported each the last time; `synced`: all shares were seen once."""

    def __init__(self, client: Client, moved: Callable[[str, str, int], Awaitable[None]]) -> None:
        self._client = client
        self._moved = moved
        self.seen: dict[str, Seen] = {}
        self.synced = trio.Event()

    async def run(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            informer = Informer(self._client, ShareManager, changed=partial(self._look, nursery))
            nursery.start_soon(informer.run)
            await informer.synced.wait()
            self.synced.set()

    def _look(self, nursery: trio.Nursery, share: ShareManager) -> None:
        status = share.status
        if switched(self.seen.get(share.name), share) and _mounted(share.name, status.service_ip):
            nursery.start_soon(self._moved, share.name, status.service_ip, PORT)
        if status.state == "running" and status.instance:
            self.seen[share.name] = Seen(status.instance, status.service_ip)


def _mounted(volume: str, address: str) -> bool:
    return any(mount.is_nfs and mount.share == volume and mount.server == address for mount in mounts.mounts())
