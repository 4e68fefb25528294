"""`share-manager csi`: what kubelet and the sidecars of Kubernetes talk to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

app = App(name="csi", help="Serve the Container Storage Interface on a unix socket, beside the sidecars of Kubernetes.")

Endpoint = Annotated[str, Parameter(help="Socket to listen on: unix:///csi/csi.sock.")]
Kubeconfig = Annotated[
    Path | None, Parameter(help="How to reach the API server; without it, as the pod's service account.")
]
Namespace = Annotated[str, Parameter(help="Where the objects of share-manager are; empty: as the access says.")]


@app.command
def controller(*, endpoint: Endpoint, kubeconfig: Kubeconfig = None, namespace: Namespace = "") -> None:
    """Make, delete, publish and list volumes.

    Stands beside external-provisioner and external-attacher. Runs until SIGTERM.
    """
    from share_manager.csi.bridge import parse_endpoint
    from share_manager.csi.run import run_controller

    run_controller(parse_endpoint(endpoint), kubeconfig, namespace)


@app.command
def node(
    *,
    endpoint: Endpoint,
    node_name: Annotated[str, Parameter(help="Name of the Kubernetes node that this is.")],
    patience: Annotated[
        float,
        Parameter(
            help="Seconds that a volume which leaves this node waits for a share that is away, with what was "
            "written and is not there yet; then that is lost."
        ),
    ] = 120.0,
    kubeconfig: Kubeconfig = None,
    namespace: Namespace = "",
) -> None:
    """Mount shares on this node, publish its addresses, and end its connections to where a share was.

    Stands beside node-driver-registrar. Runs as root in the host's network, until SIGTERM. Its mounts stay when it
    ends; the next one goes on with them. While the API server is away it mounts and unmounts all the same.
    """
    from share_manager.csi.bridge import parse_endpoint
    from share_manager.csi.run import run_node

    run_node(parse_endpoint(endpoint), node_name, kubeconfig, namespace, patience)
