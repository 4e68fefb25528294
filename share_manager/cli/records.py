"""`share-manager records`: the server that keeps what no node may keep for itself, and the volumes on it."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Annotated

import msgspec
import trio
from cyclopts import App, Parameter

from engine.record import VolumeRecord
from engine.records import RecordsClient
from share_manager import cluster, units
from share_manager.cli.common import (
    DEFAULT_DATA_DIR,
    ClusterSecret,
    DataDir,
    Records,
    Steps,
    Table,
    VolumeName,
    plain_table,
    print_json,
    reporter,
    table_console,
)
from share_manager.cli.status import describe_failover
from share_manager.errors import UsageError
from share_manager.share.status import ShareStatus

app = App(name="records", help="Keep the records of volumes that several nodes share, and list, make and delete them.")


@app.command
def serve(
    *,
    listen: Annotated[str, Parameter(help="HOST:PORT to listen on.")],
    secret_file: ClusterSecret,
    data_dir: DataDir = DEFAULT_DATA_DIR / "records",
    output: Steps = "text",
) -> None:
    """Serve records and leases until Ctrl-C or SIGTERM.

    The secret is made when the file does not exist; every node needs a copy of it. While this server is away shares go
    on, but nothing changes: no replica leaves or comes back, no share moves.

    For example:

    share-manager records serve --listen 192.0.2.1:7420 --secret-file /etc/share-manager/secret
    """
    address = units.parse_records(listen, "--listen")
    key = cluster.read_or_make_secret(secret_file)
    trio.run(cluster.serve, data_dir.resolve(), key, address, reporter(output))


@app.command
def create(
    volume: VolumeName,
    /,
    *,
    records: Records,
    secret_file: ClusterSecret,
    replica: Annotated[
        list[str],
        Parameter(
            consume_multiple=True,
            negative=(),
            help="One for each replica: NODE=HOST:PORT, where that node is to listen for it.",
        ),
    ],
    size: Annotated[str, Parameter(help="Size of the volume, in Ki, Mi, Gi or Ti.")] = "10Gi",
) -> None:
    """Make the record of a new volume. The nodes that it names make its replicas.

    For example:

    share-manager records create vol1 --replica a=192.0.2.1:7500 b=192.0.2.2:7500 --records 192.0.2.1:7420 ...
    """
    wanted = units.check_size(units.parse_size(size, "--size"), "none", "--size")
    placed = [units.parse_placed(one) for one in replica]
    record = cluster.new_record(units.parse_name(volume), str(uuid.uuid4()), wanted, placed)
    with open_records(records, secret_file) as client:
        cluster.create(client, record)


@app.command(name="list")
def list_command(*, records: Records, secret_file: ClusterSecret, output: Table = "table") -> None:
    """List the volumes that a record server knows, and who serves them.

    For example:

    share-manager records list --records 192.0.2.1:7420 --secret-file /etc/share-manager/secret
    """
    with open_records(records, secret_file) as client:
        found = [(record, client.read_lease(record.volume)[0]) for record in client.list_records()]
    if output == "json":
        print_json([{"record": record, "lease": lease} for record, lease in found])
        return
    table = plain_table()
    for heading in ("VOLUME", "SIZE", "EPOCH", "IN SYNC", "NODE", "PHASE"):
        table.add_column(heading, overflow="fold")
    for record, lease in found:
        table.add_row(
            record.volume,
            units.format_size(record.size),
            str(record.epoch),
            _members(record),
            lease.holder or "-",
            lease.phase or "-",
        )
    table_console().print(table)


def _members(record: VolumeRecord) -> str:
    return f"{len(record.in_sync)}/{len(record.replicas)}"


@app.command
def show(volume: VolumeName, /, *, records: Records, secret_file: ClusterSecret, output: Table = "table") -> None:
    """Show a volume's lease, and the processes that serve it or stand by, on all nodes.

    For example:

    share-manager records show vol1 --records 192.0.2.1:7420 --secret-file /etc/share-manager/secret
    """
    with open_records(records, secret_file) as client:
        record = client.read_record(units.parse_name(volume))
        lease, _ = client.read_lease(volume)
        there = client.presences(volume)
    if output == "json":
        told = [{"node": one.node, "age": one.age, "status": msgspec.Raw(one.summary.encode())} for one in there]
        print_json({"record": record, "lease": lease, "processes": told})
        return
    table = plain_table()
    for heading in ("NODE", "STATE", "LAST SEEN", "LAST FAILOVER"):
        table.add_column(heading, overflow="fold")
    for one in there:
        last = msgspec.json.decode(one.summary, type=ShareStatus).node
        shown = describe_failover(last.last_failover) if last and last.last_failover else "-"
        table.add_row(one.node, one.state, f"{one.age:.1f} s ago", shown)
    table_console().print(table)


@app.command
def gone(
    volume: VolumeName,
    /,
    *,
    records: Records,
    secret_file: ClusterSecret,
    client: Annotated[
        list[str],
        Parameter(consume_multiple=True, negative=(), help="Host names of clients, or their whole NFS client ids."),
    ],
    output: Steps = "text",
) -> None:
    """Say that clients are gone for good, such as those on a node that died and was fenced, while nobody serves.

    Whoever takes the volume over forgets their locks and open files before the grace period begins, which then does not
    wait for them. Only for clients that cannot come back with what they had: one that does loses its locks.

    For example:

    share-manager records gone vol1 --client worker-3 --records 192.0.2.1:7420 --secret-file /etc/share-manager/secret
    """
    units.parse_name(volume)
    if not client or not all(client):
        raise UsageError("--client needs the name of a client")
    with open_records(records, secret_file) as opened:
        cluster.say_gone(opened, volume, client, reporter(output))


@app.command
def delete(volume: VolumeName, /, *, records: Records, secret_file: ClusterSecret) -> None:
    """Forget a volume that nobody serves. Its replicas' directories stay on their nodes.

    For example:

    share-manager records delete vol1 --records 192.0.2.1:7420 --secret-file /etc/share-manager/secret
    """
    with open_records(records, secret_file) as client:
        record = client.read_record(units.parse_name(volume))
        lease, _ = client.read_lease(volume)
        if lease.phase not in ("", "released"):
            raise UsageError(f"volume {volume} is served on node {lease.holder}: stop it there first")
        client.delete_record(volume, record.version)


def open_records(address: str, secret_file: Path) -> RecordsClient:
    """Raises InvalidValueError, EngineError."""
    return cluster.open_client(units.parse_records(address), secret_file)
