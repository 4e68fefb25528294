"""Writes the custom resource definitions: `python -m share_manager.kube.crds DIRECTORY` (`make crds`)."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from share_manager.kube.resources import GROUP, RESOURCES
from share_manager.kube.schema import definition

HEADING = "# Made of share_manager/kube/resources.py by `make crds`.\n"


def files() -> dict[str, str]:
    """Name of each file, and what is to be in it; kustomization.yaml has them all."""
    found = {
        f"{kind.PLURAL}.yaml": HEADING + yaml.safe_dump(definition(kind), sort_keys=False, width=120)
        for kind in RESOURCES
    }
    every = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "labels": [{"pairs": {"app.kubernetes.io/part-of": "share-manager"}}],
        "resources": sorted(found),
    }
    return found | {"kustomization.yaml": HEADING + yaml.safe_dump(every, sort_keys=False)}


def main() -> None:
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (directory / name).write_text(text)
    print(f"{len(files())} files of {GROUP} in {directory}")


if __name__ == "__main__":
    main()
