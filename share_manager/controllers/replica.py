"""Replica: its node's agent serves it, and lets go of it when it is deleted. Where the node is gone, we do."""

from __future__ import annotations

import msgspec

from share_manager.controllers.actions import Action, Change, SetStatus, Tell
from share_manager.controllers.conditions import told
from share_manager.kube.resources import FINALIZER, Replica


class ReplicaSeen(msgspec.Struct, frozen=True, kw_only=True):
    """`suspect`: why its node may be dead, or nothing. `node_gone`: neither Kubernetes nor we know the node."""

    replica: Replica
    suspect: str
    node_gone: bool
    now: str


def decide(seen: ReplicaSeen) -> list[Action]:
    replica = seen.replica
    if replica.deleting and seen.node_gone and FINALIZER in replica.metadata.finalizers:
        left = [one for one in replica.metadata.finalizers if one != FINALIZER]
        message = f"node {replica.spec.node} is gone; whatever it had of the replica is left there"
        return [
            Tell(about=replica, type="Warning", reason="Abandoned", message=message),
            Change(of=replica, patch={"metadata": {"finalizers": left or None}}),
        ]
    if not seen.suspect or replica.status.state in ("unknown", "erased"):
        # a node that is alive says itself how its replicas are
        return []
    message = f"node {replica.spec.node}: {seen.suspect}"
    conditions = told(replica.status.conditions, "Serving", "Unknown", "NodeSuspect", message, now=seen.now)
    status = msgspec.structs.replace(replica.status, state="unknown", conditions=conditions)
    return [
        SetStatus(before=replica, after=msgspec.structs.replace(replica, status=status)),
        Tell(about=replica, type="Warning", reason="NodeSuspect", message=message),
    ]
