"""The two processes of the driver: one beside the sidecars of the controller, one on every node."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import structlog
import trio

from share_manager.csi import log as csi_log
from share_manager.csi.bridge import serving
from share_manager.csi.controller import Controller
from share_manager.csi.identity import Identity
from share_manager.csi.node import Node
from share_manager.csi.presence import Follower, publish_addresses
from share_manager.errors import ShareManagerError
from share_manager.events import LineSink, Reporter
from share_manager.kube.access import find_access
from share_manager.kube.client import Client
from share_manager.node.agent import Watched, end_stale
from share_manager.share.session import leave_on_signals, require_root
from share_manager.units import parse_node

log = structlog.get_logger()


def run_controller(socket: Path, kubeconfig: Path | None, namespace: str) -> None:
    """Raises ShareManagerError."""
    csi_log.configure(component="csi-controller")
    client = Client(find_access(kubeconfig), namespace=namespace)
    trio.run(_controller, socket, client)


async def _controller(socket: Path, client: Client) -> None:
    async with client, _served(socket, {"Controller": Controller(client)}, client):
        await trio.sleep_forever()


def run_node(socket: Path, name: str, kubeconfig: Path | None, namespace: str, patience: float) -> None:
    """Raises ShareManagerError."""
    parse_node(name, "--node-name")
    require_root("csi node")
    csi_log.configure(component="csi-node", node=name)
    client = Client(find_access(kubeconfig), namespace=namespace)
    trio.run(_node, socket, Node(name, patience=patience), client)


async def _node(socket: Path, node: Node, client: Client) -> None:
    async with client, _served(socket, {"Node": node}, None), trio.open_nursery() as nursery:
        nursery.start_soon(publish_addresses, client, node.name)
        nursery.start_soon(Follower(client, _end_stale).run)


async def _end_stale(volume: str, address: str, port: int) -> None:
    ended = await end_stale(Watched(volume, address, port), Reporter(LineSink(sys.stderr)))
    log.info("switched", volume=volume, address=address, ended=ended)


@contextlib.asynccontextmanager
async def _served(socket: Path, services: Mapping[str, object], client: Client | None) -> AsyncIterator[None]:
    """Until SIGTERM. With `client` the driver is ready while the API server answers it."""
    version = importlib.metadata.version("share-manager")
    identity = Identity(version, controller="Controller" in services, ready=functools.partial(_ready, client))
    async with (
        leave_on_signals(Reporter(LineSink(sys.stderr)), lambda: None),
        serving(socket, {"Identity": identity, **services}),
    ):
        log.info("ready", endpoint=str(socket), version=version, pid=os.getpid())
        yield


async def _ready(client: Client | None) -> bool:
    if client is None:
        return True
    try:
        await client.ask("/version")
    except ShareManagerError as error:
        log.warning("not_ready", why=str(error))
        return False
    return True
