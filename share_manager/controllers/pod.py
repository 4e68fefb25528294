"""The pod of a share."""

from __future__ import annotations

from typing import Any

import msgspec

from share_manager.kube.resources import (
    COMPONENT_LABEL,
    INSTANCE_LABEL,
    SHARE_COMPONENT,
    VOLUME_LABEL,
    ShareManager,
    Volume,
    share_pod,
)

CLUSTER_SECRET = "share-manager-cluster"
"""Secret of this namespace from which engines and replicas derive the keys of volumes."""
CLUSTER_SECRET_DIR = "/etc/share-manager/cluster"
PASSPHRASE_DIR = "/etc/share-manager/passphrase"
METRICS_PORT = 9650
LEAVE_SECONDS = 30


class PodOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What is the same for all shares. `priority_class` may be empty."""

    image: str = "share-manager:latest"
    service_account: str = "share-manager-share"
    priority_class: str = ""


def share_pod_body(
    share: ShareManager,
    volume: Volume,
    *,
    instance: str,
    options: PodOptions,
    avoid: tuple[str, ...],
    node: str,
    near: tuple[str, ...],
) -> dict[str, Any]:
    """`avoid`: suspect nodes. `node`: the only one that may have it, if one was asked for. `near`: those that have its
    data."""
    mounts: list[dict[str, Any]] = [
        {"name": "dev", "mountPath": "/dev"},
        {"name": "modules", "mountPath": "/lib/modules", "readOnly": True},
        {"name": "cluster-secret", "mountPath": CLUSTER_SECRET_DIR, "readOnly": True},
    ]
    volumes: list[dict[str, Any]] = [
        {"name": "dev", "hostPath": {"path": "/dev", "type": "Directory"}},
        {"name": "modules", "hostPath": {"path": "/lib/modules"}},
        {"name": "cluster-secret", "secret": {"secretName": CLUSTER_SECRET, "defaultMode": 0o400}},
    ]
    command = ["share-manager", "pod", "share", volume.name, "--instance", instance, "--node", "$(NODE_NAME)"]
    command += ["--secret-file", f"{CLUSTER_SECRET_DIR}/secret", "--output", "json"]
    if volume.spec.encrypted and share.spec.passphrase_secret:
        mounts.append({"name": "passphrase", "mountPath": PASSPHRASE_DIR, "readOnly": True})
        secret = {"secretName": share.spec.passphrase_secret, "defaultMode": 0o400}
        volumes.append({"name": "passphrase", "secret": secret})
        command += ["--passphrase-file", PASSPHRASE_DIR]
    probe = {"httpGet": {"path": "/healthz", "port": METRICS_PORT}, "periodSeconds": 5, "failureThreshold": 6}
    container = {
        "name": "share-manager",
        "image": options.image,
        "imagePullPolicy": "IfNotPresent",
        "command": command,
        "env": [
            {"name": "NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
            {"name": "POD_NAMESPACE", "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}},
            # there is no udev in a container to answer cryptsetup
            {"name": "DM_DISABLE_UDEV", "value": "1"},
        ],
        "ports": [
            {"name": "nfs", "containerPort": 2049, "protocol": "TCP"},
            {"name": "metrics", "containerPort": METRICS_PORT, "protocol": "TCP"},
        ],
        "securityContext": {"privileged": True, "runAsUser": 0},
        "volumeMounts": mounts,
        "livenessProbe": probe | {"initialDelaySeconds": 30},
        "resources": {"requests": {"cpu": "50m", "memory": "128Mi"}},
    }
    spec: dict[str, Any] = {
        "serviceAccountName": options.service_account,
        "restartPolicy": "Always",
        "terminationGracePeriodSeconds": LEAVE_SECONDS,
        "containers": [container],
        "volumes": volumes,
        # the controller notices sooner than these would evict
        "tolerations": [
            {"key": "node.kubernetes.io/not-ready", "operator": "Exists", "effect": "NoExecute"},
            {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute"},
        ],
        "affinity": {"nodeAffinity": _affinity(avoid, node, near)},
    }
    if options.priority_class:
        spec["priorityClassName"] = options.priority_class
    owner = msgspec.to_builtins(share.reference(controller=True))
    return {
        "metadata": {
            "name": share_pod(volume.name, instance),
            "labels": {
                VOLUME_LABEL: volume.name,
                INSTANCE_LABEL: instance,
                COMPONENT_LABEL: SHARE_COMPONENT,
            },
            "ownerReferences": [owner],
        },
        "spec": spec,
    }


def _affinity(avoid: tuple[str, ...], node: str, near: tuple[str, ...]) -> dict[str, Any]:
    fields: list[dict[str, Any]] = []
    if node:
        fields.append({"key": "metadata.name", "operator": "In", "values": [node]})
    # matchFields takes one value each
    fields += [{"key": "metadata.name", "operator": "NotIn", "values": [one]} for one in avoid]
    found: dict[str, Any] = {}
    if fields:
        found["requiredDuringSchedulingIgnoredDuringExecution"] = {"nodeSelectorTerms": [{"matchFields": fields}]}
    if near:
        found["preferredDuringSchedulingIgnoredDuringExecution"] = [
            {
                "weight": 10,
                "preference": {"matchFields": [{"key": "metadata.name", "operator": "In", "values": [one]}]},
            }
            for one in near
        ]
    return found
