"""What a user may say of an export, to `serve` as to `share`."""

from __future__ import annotations

from typing import Annotated, Literal

from cyclopts import Parameter

from share_manager import units
from share_manager.errors import InvalidValueError
from share_manager.share.export import ExportOptions

Bind = Annotated[str, Parameter(help="Address to listen on; 0.0.0.0 or :: for all.")]
Port = Annotated[int, Parameter(help="TCP port of the NFS server.")]
Allow = Annotated[
    list[str] | None,
    Parameter(consume_multiple=True, negative=(), help="Networks whose clients may mount; everyone when not given."),
]
Squash = Annotated[
    Literal["none", "root", "all"], Parameter(help="Which users become nobody (65534): none, root, or all.")
]
ReadOnly = Annotated[bool, Parameter(negative=(), help="Let clients only read.")]
LeaseLifetime = Annotated[int, Parameter(help="Seconds that a silent client keeps its locks, 10 to 120.")]
GracePeriod = Annotated[
    int, Parameter(help="Seconds after a restart in which clients reclaim; at least the lease, at most 180.")
]
Dirsync = Annotated[
    bool, Parameter(help="Have created, renamed and removed names on disk before the client is answered.")
]
MetricsPort = Annotated[int, Parameter(help="Port for /metrics, /healthz and /readyz on the --bind address; 0: none.")]
Network = Annotated[
    Literal["host", "here", "own"],
    Parameter(
        help="host: the machine's network, left as it is. here: the network namespace that this runs in is the "
        "share's, with rules for its port. own: a namespace is made for it, with --address."
    ),
]
Gateway = Annotated[str, Parameter(help="With --network own: the way to other networks.")]


def export_options(
    *,
    bind: str,
    port: int,
    metrics_port: int,
    allow: list[str] | None,
    squash: Literal["none", "root", "all"],
    read_only: bool,
    lease_lifetime: int,
    grace_period: int,
) -> ExportOptions:
    """Raises InvalidValueError."""
    bind = units.parse_address(bind)
    units.parse_port(port)
    units.parse_port(metrics_port, "--metrics-port", least=0)
    if metrics_port == port:
        raise InvalidValueError("--metrics-port", str(metrics_port), "it is the port of the NFS server")
    units.check_grace(lease_lifetime, grace_period)
    return ExportOptions(
        bind=bind,
        port=port,
        allow=tuple(units.parse_network(network) for network in allow or ()),
        squash=squash,
        read_only=read_only,
        lease_lifetime=lease_lifetime,
        grace_period=grace_period,
    )
