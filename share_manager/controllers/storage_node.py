"""StorageNode: whether a node is alive, judged by how long its Lease did not change on our own clock.

Addresses and disks in its status are the agent's, which is the only one who knows them; the conditions are ours.
"""

from __future__ import annotations

import msgspec

from share_manager.controllers.actions import Action, SetStatus, Tell
from share_manager.controllers.conditions import find, told
from share_manager.kube.resources import StorageNode

RENEW = 1.5
"""Seconds between two signs of life of an agent."""
SILENT = 8.0
"""Seconds; five signs that did not come. An API server that is away for less than a leader keeps its lease must not use
it up."""


class NodeSeen(msgspec.Struct, frozen=True, kw_only=True):
    """`suspect`: why it may be dead, or nothing. `gone`: Kubernetes has no such node."""

    node: StorageNode
    suspect: str
    gone: bool
    now: str


def suspect(age: float | None, kubernetes: str) -> str:
    """Why a node may be dead, or nothing.

    `age`: seconds since its Lease changed, while the API server answered; None when there is none. `kubernetes`: what
    Kubernetes says: "ready", "not ready" or "gone".
    """
    if kubernetes == "gone":
        return "Kubernetes has no such node any more"
    if age is None:
        return "its agent has never said that it is alive"
    if age >= SILENT:
        return f"its agent has been silent for more than {SILENT:g} s"
    if kubernetes == "not ready":
        return "Kubernetes says that it is not ready"
    return ""


def decide(seen: NodeSeen) -> list[Action]:
    node = seen.node
    why = seen.suspect
    if why:
        status, reason = "False", "Suspect"
        message = f"{why}. Shares and replicas there are taken for lost until it comes back."
        if seen.gone:
            reason = "NodeGone"
            message = f"{why}. When it will not come back: kubectl delete storagenode {node.name}"
    else:
        status, reason, message = "True", "Alive", "Its agent renews its Lease."
    conditions = told(
        node.status.conditions,
        "Ready",
        "True" if status == "True" else "False",
        reason,
        message,
        now=seen.now,
        generation=node.metadata.generation,
    )
    if conditions == node.status.conditions:
        return []
    before = find(node.status.conditions, "Ready")
    actions: list[Action] = [
        SetStatus(
            before=node,
            after=msgspec.structs.replace(node, status=msgspec.structs.replace(node.status, conditions=conditions)),
        )
    ]
    if before is None or before.status != status:
        actions.append(
            Tell(about=node, type="Normal" if status == "True" else "Warning", reason=reason, message=message)
        )
    return actions
