"""Service: the address of a share for the volume's life, and which pod it leads to.

The switch is one write at the version that was observed, so whoever is not the leader any more, and has not seen the
newest switch, cannot switch back.
"""

from __future__ import annotations

from typing import Any

from share_manager.controllers.actions import Action, Change
from share_manager.kube.core import Service
from share_manager.kube.resources import COMPONENT_LABEL, INSTANCE_LABEL, SHARE_COMPONENT, VOLUME_LABEL, Volume

NOBODY = "none"
PORT = 2049


def selector(volume: str, instance: str) -> dict[str, str]:
    return {VOLUME_LABEL: volume, INSTANCE_LABEL: instance or NOBODY}


def service(volume: Volume) -> dict[str, Any]:
    """The body of a new one, which leads nowhere yet. Not-ready pods count: one that does not answer for a moment costs
    its clients less than an address that refuses."""
    owner = {
        "apiVersion": volume.GROUP_VERSION,
        "kind": "Volume",
        "name": volume.name,
        "uid": volume.metadata.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }
    return {
        "metadata": {
            "name": volume.name,
            "labels": {VOLUME_LABEL: volume.name, COMPONENT_LABEL: SHARE_COMPONENT},
            "ownerReferences": [owner],
        },
        "spec": {
            "type": "ClusterIP",
            "selector": selector(volume.name, ""),
            "publishNotReadyAddresses": True,
            "ports": [{"name": "nfs", "port": PORT, "targetPort": PORT, "protocol": "TCP"}],
        },
    }


def switch(found: Service, volume: str, instance: str) -> list[Action]:
    """Lead to the pod of `instance`, if it does not yet."""
    wanted = selector(volume, instance)
    if found.spec.selector == wanted:
        return []
    others = {name: None for name in found.spec.selector if name not in wanted}
    return [Change(of=found, patch={"spec": {"selector": wanted | others}})]
