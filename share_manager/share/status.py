"""What a share says of itself, and what can be said of one that does not run."""

from __future__ import annotations

import msgspec

from engine.client import EngineStatus, OperationStats


class ProcessInfo(msgspec.Struct, frozen=True, kw_only=True):
    pid: int


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """`operations` keyed read, write, flush, unmap, counted since the engine started."""

    pid: int | None = None
    state: str = "stopped"
    block_file: str = ""
    frontend: str = ""
    incarnation: int = 0
    dirty_regions: int = 0
    requests_in_flight: int = 0
    operations: dict[str, OperationStats] = {}


class GaneshaInfo(msgspec.Struct, frozen=True, kw_only=True):
    """`epoch` is the number of this start (`-E`)."""

    pid: int | None = None
    epoch: int = 0


class ReplicaInfo(msgspec.Struct, frozen=True, kw_only=True):
    """`state`: in_sync, resyncing, leaving, out, or down (its process does not run). `resync_*` in bytes."""

    name: str
    address: str
    directory: str
    state: str
    pid: int | None = None
    reason: str = ""
    resync_done: int = 0
    resync_total: int = 0
    restarts: int = 0


class ClientInfo(msgspec.Struct, frozen=True, kw_only=True):
    address: str
    versions: tuple[str, ...] = ()
    last_seen: float = 0.0
    client_ids: tuple[str, ...] = ()


class Restarts(msgspec.Struct, frozen=True, kw_only=True):
    """Repairs since this share manager started."""

    ganesha: int = 0
    engine: int = 0
    replicas: int = 0


class NfsIo(msgspec.Struct, frozen=True, kw_only=True):
    """What clients read and wrote since ganesha started, in bytes and calls."""

    read_bytes: int = 0
    write_bytes: int = 0
    read_operations: int = 0
    write_operations: int = 0


class ShareStatus(msgspec.Struct, frozen=True, kw_only=True):
    """`state`: stopped, starting, running, repairing, stopping; orphaned when a killed share manager left processes.

    `kind`: serve or attach, empty when stopped. `clients` hold a lease. `replicas` states of a stopped volume are those
    of its record.
    """

    volume: str
    state: str
    kind: str = ""
    endpoint: str | None = None
    mount_command: str | None = None
    uuid: str = ""
    epoch: int = 0
    size_bytes: int = 0
    filesystem: str | None = None
    used_bytes: int | None = None
    in_grace: bool | None = None
    grace_ends_at: float | None = None
    clients: tuple[ClientInfo, ...] = ()
    share_manager: ProcessInfo | None = None
    engine: EngineInfo = EngineInfo()
    device: str | None = None
    mountpoint: str | None = None
    ganesha: GaneshaInfo = GaneshaInfo()
    replicas: tuple[ReplicaInfo, ...] = ()
    restarts: Restarts = Restarts()
    nfs: NfsIo | None = None
    started_at: float | None = None
    data_dir_free_bytes: int | None = None
    metrics: str | None = None
    last_failure: str = ""


def engine_info(status: EngineStatus | None, pid: int | None, block_file: str) -> EngineInfo:
    if status is None or pid is None:
        return EngineInfo(pid=pid, block_file=block_file, state="starting" if pid else "stopped")
    return EngineInfo(
        pid=pid,
        state=status.state,
        block_file=block_file,
        frontend=status.frontend,
        incarnation=status.incarnation,
        dirty_regions=status.dirty_regions,
        requests_in_flight=status.requests_in_flight,
        operations=status.operations,
    )
