"""Whose addresses may mount a share: of the nodes that it is published to, loopback, and the networks of its volume.

A node may be seen by any of its addresses, as masquerading shows a bridge's; its agent publishes them all.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

import structlog
import trio

from share_manager.errors import ShareManagerError
from share_manager.kube.client import Client
from share_manager.kube.informer import Informer
from share_manager.kube.meta import Object
from share_manager.kube.resources import VOLUME_LABEL, ShareManager, StorageNode, Volume

log = structlog.get_logger()

LOOPBACK = ("127.0.0.0/8", "::1/128")


def allowed(share: ShareManager | None, volume: Volume | None, nodes: Iterable[StorageNode]) -> tuple[str, ...]:
    """Networks in CIDR notation, in an order that does not change by itself."""
    found = set(LOOPBACK)
    if volume is not None:
        found.update(volume.spec.export.allow)
    if share is not None:
        for node in nodes:
            if node.name in share.spec.attachments:
                found.update(_network(address) for address in node.status.addresses)
    return tuple(sorted(found))


def _network(address: str) -> str:
    if "/" in address:
        return address
    return f"{address}/{128 if ':' in address else 32}"


class Allowed:
    """`run` keeps the share's list as it has to be."""

    def __init__(self, client: Client, volume: Volume, change: Callable[[tuple[str, ...]], Awaitable[None]]) -> None:
        self._volume = volume
        self._change = change
        self._news = trio.Event()
        self._shares = Informer(client, ShareManager, labels=f"{VOLUME_LABEL}={volume.name}", changed=self._changed)
        self._nodes = Informer(client, StorageNode, changed=self._changed)

    def _changed(self, item: Object) -> None:
        self._news.set()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._shares.run)
            nursery.start_soon(self._nodes.run)
            await self._shares.synced.wait()
            await self._nodes.synced.wait()
            known: tuple[str, ...] = ()
            while True:
                self._news = trio.Event()
                share = next(iter(self._shares.store.all()), None)
                wanted = allowed(share, self._volume, self._nodes.store.all())
                if wanted != known:
                    try:
                        await self._change(wanted)
                        known = wanted
                    except ShareManagerError as error:
                        log.warning("clients not allowed", reason=str(error))
                        self._news.set()
                        await trio.sleep(1.0)
                await self._news.wait()
