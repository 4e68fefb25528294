"""`share-manager move`: a volume to another node, while clients use it."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from share_manager import cluster, units
from share_manager.cli.common import ClusterSecret, Records, Steps, VolumeName, reporter
from share_manager.errors import InvalidValueError


def move(
    volume: VolumeName,
    /,
    *,
    to: Annotated[str, Parameter(help="Node that stands by for the volume.")],
    records: Records,
    secret_file: ClusterSecret,
    timeout: Annotated[float, Parameter(help="Seconds to wait until it serves there.")] = 60.0,
    output: Steps = "text",
) -> None:
    """Have another node serve a volume: the one that does leaves in order, the other takes over at once.

    Clients notice a pause, and keep locks and open files. Where the other node does not come, the one before takes the
    volume back.

    For example:

    share-manager move vol1 --to b --records 192.0.2.1:7420 --secret-file /etc/share-manager/secret
    """
    units.parse_name(volume)
    node = units.parse_node(to, "--to")
    if timeout <= 0:
        raise InvalidValueError("--timeout", str(timeout), "a number of seconds above 0")
    report = reporter(output)
    with cluster.open_client(units.parse_records(records), secret_file) as client:
        cluster.move(client, volume, node, timeout, report)
