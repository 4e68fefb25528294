"""What is in deploy/: taken by a real API server, and with no right more than what is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from share_manager.controllers.pod import PodOptions, share_pod_body
from share_manager.kube.meta import ObjectMeta
from share_manager.kube.resources import ShareManager, ShareManagerSpec, Volume, VolumeSpec
from tests.lab.control_plane import ControlPlane
from tests.project.common import ROOT

DEPLOY = ROOT / "deploy"
PATHS = {
    "Namespace": "/api/v1/namespaces",
    "ServiceAccount": "/api/v1/namespaces/{}/serviceaccounts",
    "Role": "/apis/rbac.authorization.k8s.io/v1/namespaces/{}/roles",
    "RoleBinding": "/apis/rbac.authorization.k8s.io/v1/namespaces/{}/rolebindings",
    "ClusterRole": "/apis/rbac.authorization.k8s.io/v1/clusterroles",
    "ClusterRoleBinding": "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
    "Deployment": "/apis/apps/v1/namespaces/{}/deployments",
    "DaemonSet": "/apis/apps/v1/namespaces/{}/daemonsets",
    "CSIDriver": "/apis/storage.k8s.io/v1/csidrivers",
    "StorageClass": "/apis/storage.k8s.io/v1/storageclasses",
    "PersistentVolumeClaim": "/api/v1/namespaces/{}/persistentvolumeclaims",
}


def built(directory: Path) -> list[Path]:
    """Files of a kustomization, those of its directories too."""
    wanted = yaml.safe_load((directory / "kustomization.yaml").read_text())["resources"]
    found: list[Path] = []
    for name in wanted:
        path = directory / name
        assert path.exists(), path
        found += built(path) if path.is_dir() else [path]
    return found


def documents(path: Path) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all(path.read_text()) if one]


def everything() -> list[dict[str, Any]]:
    return [one for path in built(DEPLOY) for one in documents(path)]


def test_nothing_is_forgotten() -> None:
    there = {path for name in ("crds", "csi", "manifests") for path in (DEPLOY / name).glob("*.yaml")}
    assert {path for path in there if path.name != "kustomization.yaml"} == set(built(DEPLOY))


def test_few_read_secrets_and_nobody_has_all_rights() -> None:
    for one in everything():
        for rule in one.get("rules", ()) if one["kind"] in ("Role", "ClusterRole") else ():
            assert "*" not in [*rule["verbs"], *rule["resources"], *rule["apiGroups"]], one["metadata"]["name"]
            if "secrets" in rule["resources"]:
                assert one["kind"] == "Role"
                # the sidecar reads those that StorageClasses name, whose names nobody knows before
                named = rule["verbs"] == ["create"] or rule.get("resourceNames")
                assert named or one["metadata"]["name"] == "share-manager-csi-controller"


def test_all_images_are_one() -> None:
    text = "".join(path.read_text() for name in ("manifests", "csi") for path in (DEPLOY / name).glob("*.yaml"))
    ours = {line.split()[-1] for line in text.splitlines() if "image: share-manager" in line}
    assert ours == {"share-manager:latest"}
    assert "--image, share-manager:latest" in text


def share_pod() -> dict[str, Any]:
    volume = Volume(metadata=ObjectMeta(name="vol1"), spec=VolumeSpec(size=1 << 30, encrypted=True))
    meta = ObjectMeta(name="vol1", uid="0e1f6c6e-0000-4000-8000-000000000001")
    share = ShareManager(metadata=meta, spec=ShareManagerSpec(passphrase_secret="vol1-passphrase"))
    options = PodOptions(priority_class="system-cluster-critical")
    body = share_pod_body(
        share, volume, instance="abcde", options=options, avoid=("n1", "n2"), node="n3", near=("n3", "n4")
    )
    return {"apiVersion": "v1", "kind": "Pod", **body}


@pytest.mark.parametrize("version", ["1.28", kubernetes_validate.latest_version()])
def test_the_oldest_and_the_newest_release_know_every_field(version: str) -> None:
    for one in [*everything(), *documents(DEPLOY / "examples/three-writers.yaml"), share_pod()]:
        kubernetes_validate.validate(one, version, strict=True)
    unknown = share_pod()
    unknown["spec"]["containers"][0]["livenessProb"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(unknown, version, strict=True)


@pytest.mark.system
def test_the_api_server_takes_it(control_plane: ControlPlane) -> None:
    namespace = control_plane.new_namespace()
    for one in [*everything(), *documents(DEPLOY / "examples/three-writers.yaml")]:
        if one["kind"] in ("CustomResourceDefinition", "Namespace"):
            continue
        if "namespace" in one["metadata"]:
            one["metadata"]["namespace"] = namespace
        made = control_plane.call("POST", PATHS[one["kind"]].format(namespace) + "?dryRun=All", one)
        # what it does not know it would have left out (this version checks no fields itself)
        missing = lost(one, made)
        assert missing == [], missing


def lost(sent: Any, got: Any, path: str = "") -> list[str]:
    """Fields that were sent and are not there."""
    if isinstance(sent, dict):
        if not isinstance(got, dict):
            return [path]
        return [gone for key, value in sent.items() for gone in lost(value, got.get(key), f"{path}.{key}")]
    if isinstance(sent, list):
        if not isinstance(got, list) or len(got) != len(sent):
            return [path]
        return [gone for index, value in enumerate(sent) for gone in lost(value, got[index], f"{path}[{index}]")]
    return [] if sent == got else [f"{path}: {sent!r} is {got!r}"]
