"""Where replicas go: no two of a volume on one node, ever; those with the fewest first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from share_manager.controllers.conditions import find
from share_manager.kube.resources import FIRST_PORT, Replica, StorageNode

DISK = "default"


class Place(msgspec.Struct, frozen=True, kw_only=True):
    node: str
    disk: str
    port: int


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """`refused` says of each node why nothing was placed on it; only when there are too few `places`."""

    places: tuple[Place, ...]
    refused: dict[str, str] = msgspec.field(default_factory=dict)


def place(
    wanted: int, size: int, nodes: Iterable[StorageNode], replicas: Sequence[Replica], taken: set[str]
) -> Placement:
    """`wanted` places of `size` bytes, none on the nodes in `taken`. `replicas` are all there are, of all volumes."""
    load = Counter(one.spec.node for one in replicas)
    usable, refused = [], {}
    for node in nodes:
        if node.name in taken:
            continue
        why = unusable(node)
        if why:
            refused[node.name] = why
        else:
            usable.append(node)
    usable.sort(key=lambda node: (load[node.name], node.name))
    places = tuple(Place(node=node.name, disk=DISK, port=free_port(node.name, replicas)) for node in usable[:wanted])
    return Placement(places=places, refused=refused if len(places) < wanted else {})


def unusable(node: StorageNode) -> str:
    """Why no new replica goes there, or nothing."""
    if node.deleting:
        return "it is being deleted"
    ready = find(node.status.conditions, "Ready")
    if ready is None or ready.status != "True":
        return "it is not ready"
    if not node.spec.schedulable:
        return "it is not schedulable"
    if not node.status.replica_address:
        return "no replicas are served there"
    disk, there = node.spec.disks.get(DISK), node.status.disks.get(DISK)
    if disk is not None and not disk.schedulable:
        return f"its disk {DISK} is not schedulable"
    if there is None:
        return f"its disk {DISK} is not known yet"
    if there.problem:
        return f"its disk {DISK}: {there.problem}"
    reserved = disk.reserved if disk is not None else 0
    if there.available <= reserved:
        return f"its disk {DISK} has no room beyond the {reserved} bytes that are reserved"
    return ""


def free_port(node: str, replicas: Iterable[Replica]) -> int:
    """The lowest that no replica of the node has."""
    used = {one.spec.port for one in replicas if one.spec.node == node}
    port = FIRST_PORT
    while port in used:
        port += 1
    return port
