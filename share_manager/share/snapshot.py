"""The present state of a share's parts, gathered for `status` and metrics."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import msgspec

from ganesha import DbusError, Ganesha, RecoveryError
from share_manager.errors import NetworkError
from share_manager.share.attachment import Attachment
from share_manager.share.home import Hostings
from share_manager.share.network import ClientAddress, ShareNetwork
from share_manager.share.status import ClientInfo, NfsIo, ReplicaInfo


class NfsStatus(msgspec.Struct, frozen=True, kw_only=True):
    in_grace: bool | None = None
    grace_ends_at: float | None = None
    clients: tuple[ClientInfo, ...] = ()
    io: NfsIo | None = None


async def nfs_status(server: Ganesha | None) -> NfsStatus:
    """What the NFS server says; nothing while there is none, or it does not answer."""
    if server is None:
        return NfsStatus()
    found = NfsStatus()
    with contextlib.suppress(DbusError, RecoveryError):
        grace = await server.grace()
        found = NfsStatus(in_grace=grace.active, grace_ends_at=grace.ends_at)
        clients = tuple(
            ClientInfo(
                address=client.address,
                versions=client.versions,
                last_seen=client.last_seen,
                client_ids=client.client_ids,
            )
            for client in await server.clients()
            # others only asked and hold nothing
            if client.client_ids
        )
        exports = (await server.stats()).exports
        io = NfsIo(
            read_bytes=sum(export.read.bytes_transferred for export in exports),
            write_bytes=sum(export.write.bytes_transferred for export in exports),
            read_operations=sum(export.read.operations for export in exports),
            write_operations=sum(export.write.operations for export in exports),
        )
        found = msgspec.structs.replace(found, clients=clients, io=io)
    return found


def located(clients: tuple[ClientInfo, ...], network: ShareNetwork, within: float) -> tuple[ClientInfo, ...]:
    """With their real addresses, where ganesha does not see them: who sent something `within` seconds."""
    found: tuple[ClientAddress, ...] | None = ()
    with contextlib.suppress(NetworkError):
        found = network.clients()
    if found is None or not clients:
        return clients
    versions = tuple(sorted({version for client in clients for version in client.versions}))
    ids = tuple(identity for client in clients for identity in client.client_ids)
    newest = max((client.last_seen for client in found), default=0.0)
    recent = [client for client in found if client.last_seen >= newest - within]
    return tuple(
        ClientInfo(
            address=client.address,
            versions=versions,
            last_seen=client.last_seen,
            client_ids=ids if len(recent) == 1 else (),
        )
        for client in recent
    )


def metrics_url(host: str, port: int) -> str | None:
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}/metrics" if port else None


def used_bytes(root: Path) -> int | None:
    try:
        found = os.statvfs(root)
    except OSError:
        return None
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def replica_infos(servers: Hostings | None, attachment: Attachment | None) -> tuple[ReplicaInfo, ...]:
    """What the supervisor knows of the processes, and the engine of their data."""
    known = (
        {replica.name: replica for replica in attachment.status.replicas} if attachment and attachment.status else {}
    )
    infos = []
    for server in servers or ():
        seen = known.get(server.name)
        state = seen.state if seen else ("out" if server.pid or not server.known else "down")
        infos.append(
            ReplicaInfo(
                name=server.name,
                address=server.record.address,
                directory=server.record.directory,
                pid=server.pid,
                state="down" if server.known and server.pid is None and state == "out" else state,
                reason=(seen.reason if seen else "") or ("" if server.listening else server.failure),
                resync_done=seen.resync_done if seen else 0,
                resync_total=seen.resync_total if seen else 0,
                resync_rate=seen.resync_rate if seen else 0.0,
                resync_left=seen.resync_left if seen else None,
                phase=seen.phase if seen else "",
                restarts=server.restarts,
                damaged=seen.damaged if seen else 0,
                repaired=seen.repaired if seen else 0,
                scrubbed_at=seen.scrubbed_at if seen else 0.0,
            )
        )
    return tuple(infos)
