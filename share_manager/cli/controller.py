"""`share-manager controller`: makes the cluster as it is wanted."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from typing import Annotated

import trio
from cyclopts import Parameter

from engine import logs
from share_manager.controllers.manager import Manager
from share_manager.controllers.pod import PodOptions
from share_manager.kube.access import find_access
from share_manager.kube.client import Client

Kubeconfig = Annotated[
    Path | None, Parameter(help="Way to the API server; in a pod its service account, when not given.")
]
Namespace = Annotated[str, Parameter(help="Namespace of share-manager's objects; that of the pod, when not given.")]


def controller(
    *,
    kubeconfig: Kubeconfig = None,
    namespace: Namespace = "",
    identity: Annotated[str, Parameter(help="Name of this process in the leader's lease; made up if not given.")] = "",
    image: Annotated[str, Parameter(help="Image of the pods that it makes.")] = "share-manager:latest",
    service_account: Annotated[str, Parameter(help="Service account of shares' pods.")] = "share-manager-share",
    priority_class: Annotated[str, Parameter(help="Priority class of shares' pods.")] = "",
) -> None:
    """Run the controllers of share-manager's objects in Kubernetes, until SIGTERM. Of several, one leads.

    For example:

    share-manager controller --namespace share-manager --image registry.example/share-manager:1.0
    """
    logs.configure(process="controller")
    access = find_access(kubeconfig)
    options = PodOptions(image=image, service_account=service_account, priority_class=priority_class)
    name = identity or f"{socket.gethostname()}-{os.urandom(4).hex()}"
    trio.run(_run, Client(access, namespace=namespace), options, name)


async def _run(client: Client, options: PodOptions, identity: str) -> None:
    async with client, trio.open_nursery() as nursery:
        nursery.start_soon(Manager(client, options, identity).run)
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async for _ in signals:
                nursery.cancel_scope.cancel()
                break
