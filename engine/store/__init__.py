"""A replica on disk: layout, snapshot chain, fencing token and region maps. Synchronous; see docs/on-disk-format.md."""

from engine.store.clone import Origin, link_replica, read_origin, snapshot_size
from engine.store.layout import (
    IDENTITY,
    ReplicaInfo,
    adopt_replica,
    create_replica,
    inspect_replica,
    read_identity,
)
from engine.store.maps import RegionMaps
from engine.store.regions import REGION_SIZE
from engine.store.resize import resize_replica
from engine.store.snapshots import SnapshotInfo
from engine.store.store import IoMode, Store

__all__ = [
    "IDENTITY",
    "REGION_SIZE",
    "IoMode",
    "Origin",
    "RegionMaps",
    "ReplicaInfo",
    "SnapshotInfo",
    "Store",
    "adopt_replica",
    "create_replica",
    "inspect_replica",
    "link_replica",
    "read_identity",
    "read_origin",
    "resize_replica",
    "snapshot_size",
]
