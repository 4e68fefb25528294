"""What a command does with a record server: run one, ask one, make a volume on it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import trio

from engine.address import Address
from engine.record import ReplicaRecord, VolumeRecord
from engine.records import RecordsClient, serve_records
from engine.secret import create_secret, read_secret
from share_manager.errors import DiskError, MoveFailedError, UsageError
from share_manager.events import Reporter
from share_manager.share.gone import GONE, GoneClients, encode

PRESENT = 5.0
"""Seconds since it said so that a process counts as there."""
COMING_UP = 5.0
"""Seconds that `move` waits for a process that is there to stand by: it may have been started a moment ago."""
NOT_RENEWED = 1.0
"""Seconds after which a lease that nobody has renewed looks like one whose holder has died."""
UNFORMATTED = "unformatted"
"""Mark of a volume that no client was ever served: what is on it is the rest of an interrupted mkfs, or nothing."""
ENCRYPTED = "encrypted"
"""Mark of a volume with a LUKS header; its text is the header's UUID."""


def read_or_make_secret(path: Path) -> bytes:
    """Raises DiskError, EngineError."""
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            create_secret(path)
        except OSError as error:
            raise DiskError(path, error) from error
    return read_secret(path)


def open_client(address: str, secret_file: Path) -> RecordsClient:
    """Raises EngineError."""
    return RecordsClient(address, read_secret(secret_file))


def new_record(volume: str, uuid: str, size: int, placed: Sequence[tuple[str, str]]) -> VolumeRecord:
    """Of a volume that nobody has attached, with a replica on each node, which listens for it at an address.

    All of them are in sync, for nobody has written. Raises UsageError.
    """
    if not placed:
        raise UsageError(f"volume {volume} needs at least one --replica NODE=HOST:PORT")
    if len({node for node, _ in placed}) < len(placed):
        raise UsageError("two replicas of a volume on one node are lost together: name each node once")
    replicas = tuple(
        ReplicaRecord(name=f"r{number}", address=address, directory=f"replicas/{volume}/r{number}", node=node)
        for number, (node, address) in enumerate(placed, 1)
    )
    return VolumeRecord(
        volume=volume,
        uuid=uuid,
        size=size,
        replicas=replicas,
        in_sync=tuple(replica.name for replica in replicas),
    )


def create(client: RecordsClient, record: VolumeRecord) -> None:
    """Raises RecordError."""
    client.create_record(record)
    client.set_mark(record.volume, UNFORMATTED, "new")


async def serve(directory: Path, secret: bytes, address: str, report: Reporter) -> None:
    """Until SIGINT or SIGTERM. Raises EngineError, OSError."""
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            listening: Address = await nursery.start(serve_records, directory, secret, Address.parse(address))
            report.emit("ready", f"records are served at {listening}", address=str(listening), directory=str(directory))
            async for number in signals:
                report.emit("stopped", f"{signal.Signals(number).name}: stopped")
                nursery.cancel_scope.cancel()
                break


def say_gone(client: RecordsClient, volume: str, names: Sequence[str], report: Reporter) -> None:
    """Tell whoever serves the volume next that these clients, by host name or NFS client id, cannot come back with what
    they had. Only while nobody serves: else their leases end by themselves. Raises UsageError, RecordError."""
    lease, version = client.read_lease(volume)
    if lease.phase == "serving":
        lease, later = client.read_lease(volume, version, NOT_RENEWED)
        if later != version and lease.phase == "serving":
            raise UsageError(
                f"volume {volume} is served on node {lease.holder}, where the leases of clients that are gone end by "
                "themselves: say so when that node has died"
            )
    client.set_mark(volume, GONE, encode(GoneClients(epoch=lease.epoch, names=tuple(names))))
    if client.read_lease(volume)[0].epoch != lease.epoch:
        raise UsageError(f"volume {volume} is served again already, and waits for {', '.join(names)} by now")
    report.emit("gone", f"whoever serves volume {volume} next does not wait for {', '.join(names)}", volume=volume)


def move(client: RecordsClient, volume: str, node: str, timeout: float, report: Reporter) -> None:
    """Have `node` serve the volume, and wait until it does. Raises UsageError, MoveFailedError, RecordError."""
    began = time.monotonic()
    end = began + timeout
    failover = os.urandom(6).hex()
    while True:
        lease, version = client.read_lease(volume)
        if lease.holder == node and lease.phase in ("taking", "serving"):
            report.emit("moved", f"volume {volume} is on node {node} already", volume=volume, node=node)
            return
        present = {one.node: one.state for one in client.presences(volume) if one.age < PRESENT}
        there = {name for name, state in present.items() if state == "standby"}
        if node not in there:
            if node in present and time.monotonic() < min(end, began + COMING_UP):
                time.sleep(0.1)
                continue
            raise UsageError(
                f"node {node} does not stand by for volume {volume} (there: {', '.join(sorted(there)) or 'nobody'}): "
                f"run `share-manager share {volume} --standby` on it"
            )
        wanted = msgspec.structs.replace(lease.renewed(), wanted=node, failover=failover)
        done, lease, version = client.swap_lease(volume, version, wanted)
        if done:
            break
    report.emit(
        "moving", f"moving volume {volume} from {lease.holder or 'nobody'} to {node}", volume=volume, failover=failover
    )
    while True:
        left = end - time.monotonic()
        if left <= 0:
            raise MoveFailedError(volume, node, f"not within {timeout:g} s; {lease.holder} has it, {lease.phase}")
        lease, version = client.read_lease(volume, version, min(left, 5.0))
        if lease.phase == "serving" and lease.holder == node:
            report.emit("moved", f"volume {volume} is on node {node}", volume=volume, node=node, failover=failover)
            return
        if lease.phase == "serving" and lease.wanted != node:
            raise MoveFailedError(volume, node, f"{lease.holder} serves it: {lease.cause or 'see its events'}")
