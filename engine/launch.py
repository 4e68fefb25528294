"""What a supervisor needs to start the engine's processes: their configurations and argument vectors.

The processes are plain children: they never daemonise, log JSON lines to stderr, and leave on SIGTERM in order.
A replica is `python -m engine.replica CONFIG.json`, an engine `python -m engine CONFIG.json`, unless its records are
where only another module knows.
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


class Takeover(msgspec.Struct, frozen=True, kw_only=True):
    """The word for an engine that stands by: its predecessor is gone. `instances` as in `EngineConfig`; with an `epoch`
    it begins the attachment of that epoch, which was not known when it was started. `doubted` as in `EngineConfig`."""

    instances: dict[str, str]
    epoch: int = 0
    doubted: tuple[str, ...] = ()


class ReplicaConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One replica server. `listen` is `unix:/path` or `tcp:host:port`; `secret_file` holds the volume's key.

    `io` is how the head is read and written: through the page cache ("buffered"), past it ("direct"), or through it
    except for reads that would wait for the disk ("auto"). Where the other two do not work, as with snapshots, it is
    "buffered". What was not written for `rest` seconds gets checksums, by which later reads are checked.
    """

    directory: str
    listen: str
    secret_file: str
    io: Literal["direct", "buffered", "auto"] = "buffered"
    rest: float = 60.0


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One engine process: one attachment of one volume.

    `record` is the path of the volume record, whose epoch must be `epoch` already (see `engine.record.bump_epoch`);
    with `records` it is the name of the volume on the record server at that address, `records_secret_file` has the key.
    `fuse_fd` is an inherited descriptor of /dev/fuse that is mounted at `block_file` already (see `engine.frontend`);
    with `resume` an engine of a lower `incarnation` served it and is gone, and `instances` says which starts of the
    replicas' processes that one was connected to: what another start lacks, the page cache above takes for written.
    With `standby_fd`, an inherited descriptor, it loads all that it needs, says "standing_by", and goes on when a line
    with a `Takeover` comes from there; when that ends without one it leaves.
    The frontend "none" has no file, for work on a volume that nobody uses: `fuse_fd` is -1 then, `block_file` empty.
    `doubted` are replicas whose node has not been heard of: an attach waits for them a third of `open_timeout` only.
    `control` is the path of the unix socket on which the engine answers its supervisor (see `engine.client`).
    `right_lasts`: for how long a confirmation of all replicas gives the right to serve (engine/controller/right.py);
    0: they are not asked.
    `lifeline_fd`: an inherited end of a pipe. When nobody has the other one any more, everybody who could answer
    clients by this engine's right is dead: it leaves in order, and releases the lease of `lease_instance`, if there is
    one, so that another node need not wait for either.
    `resync_rate` bounds what replicas are brought up to date with, in bytes a second; 0: what clients leave.
    `module` is what is run as the engine: one that opens another kind of record store for `engine.__main__.main`.
    Times are in seconds.
    """

    module: str = "engine"
    record: str
    records: str = ""
    records_secret_file: str = ""
    secret_file: str
    epoch: int
    incarnation: int = 1
    resume: bool = False
    instances: dict[str, str] = {}
    frontend: str = "device"
    fuse_fd: int = -1
    block_file: str = ""
    control: str
    standby_fd: int = -1
    lifeline_fd: int = -1
    lease_instance: str = ""
    open_timeout: float = 1.0
    doubted: tuple[str, ...] = ()
    request_timeout: float = 8.0
    reconnect_interval: float = 0.5
    resync_rate: float = 0.0
    right_lasts: float = 0.0


class BrowseConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A process that serves snapshots as files: `control` is the engine's socket, `mountpoint` an empty directory,
    `source` what the mount table shows, `only` the name of the one snapshot that is to be seen; empty for all."""

    control: str
    mountpoint: str
    source: str = "share-manager"
    only: str = ""


def replica_argv(config: ReplicaConfig, config_file: Path) -> list[str]:
    """Write the configuration and return the command that runs it. Raises OSError."""
    replace_file(config_file, msgspec.json.encode(config), mode=0o600)
    return [sys.executable, "-m", "engine.replica", str(config_file)]


def engine_argv(config: EngineConfig, config_file: Path) -> list[str]:
    """Write the configuration and return the command that runs it. Raises OSError."""
    replace_file(config_file, msgspec.json.encode(config), mode=0o600)
    return [sys.executable, "-m", config.module, str(config_file)]


def browse_argv(config: BrowseConfig, config_file: Path) -> list[str]:
    """Write the configuration and return the command that runs it. Raises OSError."""
    replace_file(config_file, msgspec.json.encode(config), mode=0o600)
    return [sys.executable, "-m", "engine.browse", str(config_file)]
