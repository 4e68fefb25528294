"""What a share says of itself, and what can be said of one that does not run."""

from __future__ import annotations

import msgspec

from engine.client import CloneStatus, EngineStatus, OperationStats


class ProcessInfo(msgspec.Struct, frozen=True, kw_only=True):
    pid: int


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """`operations` keyed read, write, flush, unmap, counted since the engine started. `clone`: what is still shared."""

    pid: int | None = None
    state: str = "stopped"
    block_file: str = ""
    frontend: str = ""
    incarnation: int = 0
    dirty_regions: int = 0
    requests_in_flight: int = 0
    operations: dict[str, OperationStats] = {}
    clone: CloneStatus | None = None


class GaneshaInfo(msgspec.Struct, frozen=True, kw_only=True):
    """`epoch` is the number of this start (`-E`)."""

    pid: int | None = None
    epoch: int = 0


class ReplicaInfo(msgspec.Struct, frozen=True, kw_only=True):
    """`state`: in_sync, resyncing, leaving, out, or down (its process does not run).

    `resync_done` and `resync_total` in bytes, `resync_rate` in bytes a second, `resync_left` in seconds; `phase` says
    what is copied: snapshots, head or changes. Since the engine started: `damaged` ranges found on its disk, those
    `repaired`, and when its last scrub ended, in seconds since 1970 (0: never).
    """

    name: str
    address: str
    directory: str
    state: str
    pid: int | None = None
    reason: str = ""
    resync_done: int = 0
    resync_total: int = 0
    resync_rate: float = 0.0
    resync_left: float | None = None
    phase: str = ""
    restarts: int = 0
    damaged: int = 0
    repaired: int = 0
    scrubbed_at: float = 0.0


class ClientInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Where the network has a gate, ganesha sees all clients at one address: their versions are those of all together,
    and the ids are known when there is one client only."""

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


class FailoverInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The last change of node. `duration`: seconds from the last sign of the node before until this one served. `id` is
    in every event of it, on all nodes."""

    id: str
    cause: str
    before: str
    after: str
    duration: float | None = None
    at: float = 0.0


class NodeInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A share of several nodes. `role`: standby, taking, serving, leaving, releasing, ended; `holder` is the node that
    has the lease, `phase` what that says. `records`: whether the record server answers."""

    name: str
    role: str
    holder: str = ""
    phase: str = ""
    address: str = ""
    last_failover: FailoverInfo | None = None
    records: bool = True


class ShareStatus(msgspec.Struct, frozen=True, kw_only=True):
    """`state`: stopped, starting, running, repairing, stopping, standby; orphaned when a killed share manager left
    processes.

    `kind`: serve, attach or share (of several nodes, see `node`), empty when stopped. `clients` hold a lease.
    `replicas` states of a stopped volume are those of its record. `phases`: seconds that each step of the last
    attachment took. `allow`: networks whose clients may use it, empty for everyone. `right_held`: whether clients may
    be answered at present; None where no right is needed.
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
    encrypted: bool = False
    used_bytes: int | None = None
    in_grace: bool | None = None
    grace_ends_at: float | None = None
    clients: tuple[ClientInfo, ...] = ()
    allow: tuple[str, ...] = ()
    network: str = ""
    right_held: bool | None = None
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
    node: NodeInfo | None = None
    phases: dict[str, float] = {}


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
        clone=status.clone,
    )
