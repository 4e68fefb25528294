"""`share-manager agent`: beside the mounts of a client's node."""

from __future__ import annotations

from typing import Annotated

import trio
from cyclopts import Parameter

from engine.records import RecordsClient
from share_manager import cluster, units
from share_manager.cli.common import ClusterSecret, Records, Steps, reporter
from share_manager.events import Reporter
from share_manager.node.agent import Agent, Watched, parse_watched
from share_manager.share.session import leave_on_signals, require_root


def agent(
    *,
    volume: Annotated[
        list[str],
        Parameter(
            consume_multiple=True, negative=(), help="VOLUME=ADDRESS:PORT for each that is mounted on this node."
        ),
    ],
    records: Records,
    secret_file: ClusterSecret,
    output: Steps = "text",
) -> None:
    """End this node's NFS connections to where a share was, when another node serves it.

    For nodes whose way to the share is translated (kube-proxy), so that they would wait for TCP timeouts. Runs until
    Ctrl-C or SIGTERM. Needs root, and a kernel with INET_DIAG_DESTROY.

    For example:

    share-manager agent --volume vol1=192.0.2.10:2049 --records 192.0.2.1:7420 --secret-file /etc/share-manager/secret
    """
    watched = tuple(parse_watched(one) for one in volume)
    require_root("agent")
    client = cluster.open_client(units.parse_records(records), secret_file)
    trio.run(_run, client, watched, reporter(output))


async def _run(client: RecordsClient, watched: tuple[Watched, ...], report: Reporter) -> None:
    async with leave_on_signals(report, lambda: None):
        report.emit("ready", f"watching {', '.join(one.volume for one in watched)}")
        await Agent(client, watched, report).run()
    report.emit("stopped", "stopped")
