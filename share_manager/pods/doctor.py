"""Whether share-manager in a Kubernetes cluster is well: each check with its remedy."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import trio

from share_manager.controllers.conditions import find
from share_manager.controllers.manager import LEADER_LEASE
from share_manager.doctor import Check, failed, passed, warning
from share_manager.kube.access import Access, find_access
from share_manager.kube.client import Client
from share_manager.kube.core import CustomResourceDefinition, Lease
from share_manager.kube.errors import KubeError, NotFoundError
from share_manager.kube.leader import LeaderTiming
from share_manager.kube.resources import GROUP, RESOURCES, ShareManager, StorageNode, Volume

OLDEST = (1, 28)
_LOOK = 0.3


def run(kubeconfig: Path | None, namespace: str) -> list[Check]:
    """Raises AccessError."""
    return trio.run(_run, find_access(kubeconfig), namespace)


async def _run(access: Access, namespace: str) -> list[Check]:
    async with Client(access, namespace=namespace) as client:
        return await examine(client)


async def examine(client: Client) -> list[Check]:
    """All checks, those after one that others need only when that passed."""
    try:
        version = json.loads(await client.ask("/version"))
    except (KubeError, ValueError) as error:
        return [
            failed("API server", str(error), "see that the address and the rights in the kubeconfig file are right")
        ]
    checks = [check_version(str(version.get("major", "")), str(version.get("minor", "")))]
    missing = await _missing_kinds(client)
    if missing:
        remedy = "kubectl apply -k deploy/"
        return [*checks, failed("definitions", f"not defined: {', '.join(missing)}", remedy)]
    checks.append(passed("definitions", f"all kinds of {GROUP} are defined"))
    try:
        if await _is_defined(client, "sharemanagers.longhorn.io"):
            detail = "Longhorn has a kind of that name, too"
            checks.append(warning("names", detail, f"write sharemanagers.{GROUP} in full"))
        checks.append(await _check_leader(client))
        checks += check_nodes((await client.list(StorageNode)).items)
        checks += check_volumes((await client.list(Volume)).items)
        checks += check_shares((await client.list(ShareManager)).items)
    except KubeError as error:
        checks.append(failed("objects", str(error), "use a kubeconfig file that may read them"))
    return checks


def check_version(major: str, minor: str) -> Check:
    numbers = [int(re.sub(r"\D.*", "", part) or 0) for part in (major, minor)]
    said = f"Kubernetes {major}.{minor}"
    if (numbers[0], numbers[1]) < OLDEST:
        return warning("API server", said, f"share-manager is made for {OLDEST[0]}.{OLDEST[1]} and newer")
    return passed("API server", said)


async def _missing_kinds(client: Client) -> list[str]:
    missing = []
    for kind in RESOURCES:
        try:
            await client.list(kind)
        except NotFoundError:
            missing.append(kind.PLURAL)
        except KubeError:
            # that is told with the objects
            continue
    return missing


async def _is_defined(client: Client, name: str) -> bool:
    try:
        return await client.find(CustomResourceDefinition, name) is not None
    except KubeError:
        return False


async def _check_leader(client: Client) -> Check:
    """One that leads renews its lease."""
    remedy = f"kubectl -n {client.namespace} logs deployment/share-manager-controller"
    first = await client.find(Lease, LEADER_LEASE)
    if first is None or not first.spec.holder_identity:
        return failed("controller", "no controller leads", remedy)
    with trio.move_on_after(LeaderTiming().duration):
        while True:
            now = await client.find(Lease, LEADER_LEASE)
            if now is not None and now.metadata.resource_version != first.metadata.resource_version:
                return passed("controller", f"{now.spec.holder_identity} leads")
            await trio.sleep(_LOOK)
    return failed("controller", f"{first.spec.holder_identity} does not renew its lease", remedy)


def check_nodes(nodes: Sequence[StorageNode]) -> list[Check]:
    if not nodes:
        return [failed("nodes", "no node has registered", "see the pods of the DaemonSet share-manager-node")]
    checks = []
    well = 0
    for node in nodes:
        ready = find(node.status.conditions, "Ready")
        if ready is not None and ready.status == "True":
            well += 1
        else:
            detail = ready.message if ready is not None else "no controller has looked at it yet"
            checks.append(warning(f"node {node.name}", detail, "look at the node and at its pod of share-manager-node"))
    return [passed("nodes", f"{well} of {len(nodes)} are ready"), *checks]


def check_volumes(volumes: Sequence[Volume]) -> list[Check]:
    checks = []
    for volume in volumes:
        for one in volume.status.conditions:
            if one.type in ("Healthy", "Scheduled") and one.status == "False":
                tell = failed if volume.status.state in ("faulted", "creating") else warning
                checks.append(tell(f"volume {volume.name}", one.message, "docs/operations.md, In Kubernetes"))
    well = sum(volume.status.robustness == "healthy" for volume in volumes)
    return [passed("volumes", f"{well} of {len(volumes)} are healthy"), *checks]


def check_shares(shares: Sequence[ShareManager]) -> list[Check]:
    checks = []
    for share in shares:
        available = find(share.status.conditions, "Available")
        if share.status.state == "error" and available is not None:
            checks.append(failed(f"share {share.name}", available.message, "docs/operations.md, In Kubernetes"))
    running = sum(share.status.state == "running" for share in shares)
    return [passed("shares", f"{running} of {len(shares)} are running"), *checks]
