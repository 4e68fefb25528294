"""What a supervisor needs to start the engine's processes: their configurations and argument vectors.

The processes are plain children: they never daemonise, log JSON lines to stderr, and leave on SIGTERM in order.
A replica is `python -m engine.replica CONFIG.json`, an engine `python -m engine CONFIG.json`.
"""

from __future__ import annotations

import enum
import sys
from pathlib import Path
from typing import Literal

import msgspec

from engine.durable import replace_file


class EngineExit(enum.IntEnum):
    """Exit statuses of the engine process. `NO_REPLICA`: no in-sync replica, at the attach or later."""

    CLEAN = 0
    ERROR = 1
    FENCED = 3
    NO_REPLICA = 4


class ReplicaConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One replica server. `listen` is `unix:/path` or `tcp:host:port`; `secret_file` holds the volume's key.

    `io` is how the head is read and written: through the page cache ("buffered"), past it ("direct"), or through it
    except for reads that would wait for the disk ("auto"). Where the other two do not work, as with snapshots, it is
    "buffered".
    """

    directory: str
    listen: str
    secret_file: str
    io: Literal["direct", "buffered", "auto"] = "buffered"


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One engine process: one attachment of one volume.

    `record` is the path of the volume record, whose epoch must be `epoch` already (see `engine.record.bump_epoch`).
    `fuse_fd` is an inherited descriptor of /dev/fuse that is mounted at `block_file` already (see `engine.frontend`);
    with `resume` an engine of a lower `incarnation` served it and is gone, and `instances` says which starts of the
    replicas' processes that one was connected to: what another start lacks, the page cache above takes for written.
    `control` is the path of the unix socket on which the engine answers its supervisor (see `engine.client`).
    Times are in seconds.
    """

    record: str
    secret_file: str
    epoch: int
    incarnation: int = 1
    resume: bool = False
    instances: dict[str, str] = {}
    frontend: str = "device"
    fuse_fd: int
    block_file: str
    control: str
    open_timeout: float = 1.0
    request_timeout: float = 8.0
    reconnect_interval: float = 0.5


def replica_argv(config: ReplicaConfig, config_file: Path) -> list[str]:
    """Write the configuration and return the command that runs it. Raises OSError."""
    replace_file(config_file, msgspec.json.encode(config), mode=0o600)
    return [sys.executable, "-m", "engine.replica", str(config_file)]


def engine_argv(config: EngineConfig, config_file: Path) -> list[str]:
    """Write the configuration and return the command that runs it. Raises OSError."""
    replace_file(config_file, msgspec.json.encode(config), mode=0o600)
    return [sys.executable, "-m", "engine", str(config_file)]
