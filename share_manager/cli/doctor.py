"""`share-manager doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from share_manager import units
from share_manager.cli.common import DEFAULT_DATA_DIR, DataDir, Table, plain_table, print_json, table_console
from share_manager.doctor import examine

_MARK = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "failed": "[bold red]failed[/]"}


def doctor(
    *,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    bind: Annotated[str, Parameter(help="Address that a share would listen on.")] = "127.0.0.1",
    port: Annotated[int, Parameter(help="Port that a share would listen on.")] = 2049,
    cluster: Annotated[
        bool, Parameter(negative=(), help="Check share-manager in a Kubernetes cluster instead of this machine.")
    ] = False,
    kubeconfig: Annotated[Path | None, Parameter(help="With --cluster: way to the API server, as kubectl's.")] = None,
    namespace: Annotated[
        str, Parameter(help="With --cluster: namespace of share-manager's objects.")
    ] = "share-manager",
    output: Table = "table",
) -> int:
    """Check kernel features, programs, privileges, ports and disk; each failure with its remedy.

    Exit status 0 when volumes can be served, 3 when not; warnings are about what is optional. With --cluster: API
    server, definitions, controller, nodes, volumes and shares of a cluster.

    For example:

    share-manager doctor

    share-manager doctor --data-dir /srv/volumes --port 2050 --output json

    share-manager doctor --cluster --kubeconfig ~/.kube/config
    """
    if cluster:
        # imported late: most machines have no cluster
        from share_manager.pods.doctor import run

        checks = run(kubeconfig, namespace)
    else:
        checks = examine(data_dir, units.parse_address(bind), units.parse_port(port))
    failures = [check for check in checks if check.result == "failed"]
    if output == "json":
        print_json({"ok": not failures, "checks": checks})
    else:
        table = plain_table()
        for heading in ("CHECK", "RESULT", "DETAIL", "REMEDY"):
            table.add_column(heading, overflow="fold")
        for check in checks:
            table.add_row(check.name, _MARK[check.result], check.detail, check.remedy)
        table_console().print(table)
    return 3 if failures else 0
