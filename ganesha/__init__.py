"""Runs nfs-ganesha for one volume: configuration from typed values, readiness, clients, counters, client records."""

from ganesha.config import Export, LogLevel, ServerConfig, Squash
from ganesha.dbus import ExportStats, IoStats, NfsClient, ServerStats
from ganesha.errors import (
    ConfigError,
    DbusError,
    GaneshaError,
    HealthError,
    MissingProgramError,
    Nfs4Error,
    NotReadyError,
    RecoveryError,
    RpcError,
    StartError,
    StopError,
    UpdateError,
)
from ganesha.health import export_handle, handle_carries_uuid, null_call
from ganesha.leftovers import Leftover, find_leftovers, kill_leftovers
from ganesha.logs import EventKind, LogEvent
from ganesha.process import Ganesha, GraceState, run_ganesha
from ganesha.reach import Reach
from ganesha.recovery import ClientRecord, consolidate, drop_all, list_records, make_durable, prune_records
from ganesha.render import render

__all__ = [
    "ClientRecord",
    "ConfigError",
    "DbusError",
    "EventKind",
    "Export",
    "ExportStats",
    "Ganesha",
    "GaneshaError",
    "GraceState",
    "HealthError",
    "IoStats",
    "Leftover",
    "LogEvent",
    "LogLevel",
    "MissingProgramError",
    "Nfs4Error",
    "NfsClient",
    "NotReadyError",
    "Reach",
    "RecoveryError",
    "RpcError",
    "ServerConfig",
    "ServerStats",
    "Squash",
    "StartError",
    "StopError",
    "UpdateError",
    "consolidate",
    "drop_all",
    "export_handle",
    "find_leftovers",
    "handle_carries_uuid",
    "kill_leftovers",
    "list_records",
    "make_durable",
    "null_call",
    "prune_records",
    "render",
    "run_ganesha",
]
