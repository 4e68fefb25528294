"""`share-manager status`."""

from __future__ import annotations

from typing import Annotated

import trio
from cyclopts import Parameter

from share_manager import units
from share_manager.cli.common import (
    DEFAULT_DATA_DIR,
    DataDir,
    Table,
    plain_grid,
    plain_table,
    print_json,
    table_console,
)
from share_manager.cli.live import describe_clients, describe_clone, describe_replica
from share_manager.paths import VolumePaths
from share_manager.share.inspect import all_status, volume_status
from share_manager.share.status import FailoverInfo, NodeInfo, ShareStatus
from share_manager.volumes import find_volume, list_volumes


def status(
    volume: Annotated[str | None, Parameter(help="Name of a volume; all volumes when not given.")] = None,
    /,
    *,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: Table = "table",
) -> None:
    """Show volumes and their shares: a list, or everything about one.

    State: stopped, starting, running, repairing, stopping; orphaned when a killed share manager left processes that
    the next `serve` or `stop` clears.

    For example:

    share-manager status

    share-manager status vol1 --output json
    """
    if volume is None:
        every = [VolumePaths(data_dir.resolve(), name) for name in list_volumes(data_dir)]
        found = trio.run(all_status, every)
        if output == "json":
            print_json(found)
        else:
            show_list(found)
        return
    one = trio.run(volume_status, find_volume(data_dir, units.parse_name(volume)))
    if output == "json":
        print_json(one)
    else:
        show_one(one)


def show_list(found: list[ShareStatus]) -> None:
    table = plain_table()
    for heading in ("VOLUME", "STATE", "SIZE", "EPOCH", "REPLICAS", "CLIENTS", "ENDPOINT"):
        table.add_column(heading, overflow="fold")
    for one in found:
        in_sync = sum(replica.state == "in_sync" for replica in one.replicas)
        table.add_row(
            one.volume,
            one.state,
            units.format_size(one.size_bytes) if one.size_bytes else "-",
            str(one.epoch),
            f"{in_sync}/{len(one.replicas)} in sync" if one.replicas else "-",
            str(len(one.clients)) if one.state == "running" else "-",
            one.endpoint or "-",
        )
    table_console().print(table)


def describe_node(node: NodeInfo) -> str:
    text = f"{node.name}  {node.role}"
    if node.holder and node.holder != node.name:
        text += f"  ({node.holder} is {node.phase})"
    return text if node.records else f"{text}  the record server does not answer"


def describe_failover(last: FailoverInfo) -> str:
    lasted = "" if last.duration is None else f" in {last.duration:.2f} s"
    return f"{last.before or 'nobody'} to {last.after}{lasted}: {last.cause}  ({last.id})"


def show_one(one: ShareStatus) -> None:
    grid = plain_grid()
    rows = [
        ("volume", one.volume),
        ("state", one.state + ("  (in grace: clients reclaim)" if one.in_grace else "")),
        ("size", units.format_size(one.size_bytes)),
        ("encrypted", "yes" if one.encrypted else None),
        ("epoch", str(one.epoch)),
        ("node", describe_node(one.node) if one.node else None),
        ("last failover", describe_failover(one.node.last_failover) if one.node and one.node.last_failover else None),
        ("started in", ", ".join(f"{name} {spent:.2f} s" for name, spent in one.phases.items()) or None),
        ("endpoint", one.endpoint),
        ("mount", one.mount_command),
        ("clients", describe_clients(one) if one.state == "running" and one.kind != "attach" else None),
        ("share manager", f"pid {one.share_manager.pid}" if one.share_manager else None),
        ("engine", f"pid {one.engine.pid}  {one.engine.state}  {one.engine.frontend}" if one.engine.pid else None),
        ("clone", describe_clone(one.engine.clone) if one.engine.clone else None),
        ("block file", one.engine.block_file or None),
        ("device", one.device),
        ("mountpoint", one.mountpoint),
        ("ganesha", f"pid {one.ganesha.pid}" if one.ganesha.pid else None),
        ("metrics", one.metrics),
        ("last failure", one.last_failure or None),
    ]
    for name, value in rows:
        if value:
            grid.add_row(name, value)
    for replica in one.replicas:
        pid = f"  pid {replica.pid}" if replica.pid else ""
        reason = f"  {replica.reason}" if replica.reason else ""
        grid.add_row("replica", f"{describe_replica(replica)}{pid}  {replica.directory}{reason}")
    table_console().print(grid)
