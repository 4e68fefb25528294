"""What a terminal shows while a share runs: state, replicas, clients, throughput, below the steps."""

from __future__ import annotations

import contextlib
import time
from typing import Protocol

import trio
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from engine.client import CloneStatus
from share_manager.share.status import ReplicaInfo, ShareStatus
from share_manager.units import format_left, format_rate, format_size

_STATE_STYLE = {"running": "bold green", "repairing": "bold yellow", "stopping": "yellow", "starting": "cyan"}


def describe_replica(replica: ReplicaInfo) -> str:
    if replica.state == "resyncing" and replica.resync_total:
        share = f"{replica.name} resyncing {100 * replica.resync_done // replica.resync_total} %"
        if replica.resync_rate:
            share += f" ({format_rate(replica.resync_rate)}{format_left(replica.resync_left)})"
        return share
    return f"{replica.name} {replica.state.replace('_', ' ')}"


def describe_clients(status: ShareStatus) -> str:
    addresses = ", ".join(client.address for client in status.clients)
    return f"{len(status.clients)}{'  ' + addresses if addresses else ''}"


def describe_clone(clone: CloneStatus) -> str:
    text = f"{100 * clone.done // clone.total if clone.total else 0} % copied of {clone.origin}"
    if clone.failure:
        return f"{text}  {clone.failure}"
    left = f"  {clone.left:.0f} s left" if clone.left is not None else ""
    return f"{text}  {format_rate(clone.rate)}{left}"


class Watched(Protocol):
    async def status(self) -> ShareStatus: ...


class LiveView:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._last: tuple[float, int, int, int] | None = None

    async def run(self, share: Watched) -> None:
        """Until cancelled, or until the terminal is gone."""
        with contextlib.suppress(OSError), Live(console=self._console, auto_refresh=False, transient=True) as live:
            while True:
                live.update(self.render(await share.status(), time.monotonic()), refresh=True)
                await trio.sleep(1.0)

    def render(self, status: ShareStatus, now: float) -> Group:
        operations = status.engine.operations
        reads = operations["read"].bytes if "read" in operations else 0
        writes = operations["write"].bytes if "write" in operations else 0
        requests = sum(stats.count for stats in operations.values())
        rates = (0.0, 0.0, 0.0)
        if self._last is not None and now > self._last[0]:
            then, old_reads, old_writes, old_requests = self._last
            # a new engine counts from zero
            rates = (
                max(0, reads - old_reads) / (now - then),
                max(0, writes - old_writes) / (now - then),
                max(0, requests - old_requests) / (now - then),
            )
        self._last = (now, reads, writes, requests)
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim")
        grid.add_column()
        state = Text(status.state, _STATE_STYLE.get(status.state, ""))
        if status.in_grace:
            state.append("  in grace: clients reclaim", "yellow")
        grid.add_row("state", state)
        grid.add_row("volume", f"{status.volume}  {format_size(status.size_bytes)}  epoch {status.epoch}")
        if status.mount_command:
            grid.add_row("mount", status.mount_command)
        else:
            grid.add_row("file", status.engine.block_file)
        if status.engine.clone is not None:
            grid.add_row("clone", describe_clone(status.engine.clone))
        grid.add_row("replicas", "  ".join(describe_replica(replica) for replica in status.replicas))
        if status.kind == "serve":
            grid.add_row("clients", describe_clients(status))
        grid.add_row(
            "throughput", f"read {format_rate(rates[0])}  write {format_rate(rates[1])}  {rates[2]:.0f} requests/s"
        )
        return Group(Text(""), grid)
