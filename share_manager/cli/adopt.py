"""`share-manager volume adopt`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from share_manager import units
from share_manager.cli.common import Table, plain_table, print_json, table_console


def adopt(
    volume: Annotated[str, Parameter(help="Its name; without one, what can be adopted is listed.")] = "",
    /,
    *,
    uuid: Annotated[str, Parameter(help="Which of several that had the name.")] = "",
    accept_loss: Annotated[
        bool, Parameter(negative=(), help="Go on from what is there, although replicas that are not may hold more.")
    ] = False,
    kubeconfig: Annotated[Path | None, Parameter(help="Way to the API server, as kubectl's.")] = None,
    namespace: Annotated[str, Parameter(help="Namespace of share-manager's objects.")] = "share-manager",
    output: Table = "table",
) -> None:
    """Bring a volume back whose objects in Kubernetes were deleted, from its replicas on the nodes' disks.

    Deleting a Volume without the erase annotation, the definitions or the namespace leaves the data where it is. Nodes
    tell within 30 s what they have of it. A Volume that has lost only its VolumeRecord gets that back.

    For example:

    share-manager volume adopt

    share-manager volume adopt pvc-4f1c1b2d --kubeconfig ~/.kube/config
    """
    # imported late: most machines have no cluster
    from share_manager.pods.adopt import run_adopt, run_survey

    if volume:
        name = units.parse_name(volume)
        done = run_adopt(kubeconfig, namespace, name, uuid=uuid, accept_loss=accept_loss).adoptable
        if output == "json":
            print_json(done)
        else:
            print(f"volume {done.volume} is adopted: in sync {', '.join(done.in_sync)}")
        return
    found = run_survey(kubeconfig, namespace)
    if output == "json":
        print_json(found)
        return
    table = plain_table()
    for heading in ("VOLUME", "UUID", "SIZE", "REPLICAS", "IN SYNC", "DOUBTS"):
        table.add_column(heading, overflow="fold")
    for one in found:
        size = units.format_size(one.size_bytes)
        doubts = "; ".join(one.doubts)
        table.add_row(one.volume, one.uuid, size, ", ".join(one.present), ", ".join(one.in_sync), doubts)
    table_console().print(table)
