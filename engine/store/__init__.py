"""A replica on disk: layout, snapshot chain, fencing token and region maps. Synchronous; see docs/on-disk-format.md."""

from engine.store.layout import ReplicaInfo, adopt_replica, create_replica, inspect_replica, resize_replica
from engine.store.maps import RegionMaps
from engine.store.regions import REGION_SIZE
from engine.store.snapshots import SnapshotInfo
from engine.store.store import IoMode, Store

__all__ = [
    "REGION_SIZE",
    "IoMode",
    "RegionMaps",
    "ReplicaInfo",
    "SnapshotInfo",
    "Store",
    "adopt_replica",
    "create_replica",
    "inspect_replica",
    "resize_replica",
]
