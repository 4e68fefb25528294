"""Which handler carries out which operation."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from engine.controller import clone, replicas, snapshots
from engine.controller.driver import Controller
from engine.controller.progress import Progress
from engine.controller.resize import resize
from engine.controller.scrub import scrub
from engine.errors import EngineError
from engine.operations import (
    CloneFinish,
    Operation,
    ReplicaAdd,
    ReplicaRemove,
    ReplicaWait,
    Resize,
    ResyncLimit,
    Scrub,
    SnapshotCreate,
    SnapshotDelete,
    SnapshotList,
    SnapshotPurge,
    SnapshotRevert,
)

Handler = Callable[[Controller, Any, Progress], Awaitable[msgspec.Struct]]

HANDLERS: dict[type[Operation], Handler] = {
    Resize: resize,
    SnapshotCreate: snapshots.create,
    SnapshotList: snapshots.list_snapshots,
    SnapshotDelete: snapshots.delete,
    SnapshotRevert: snapshots.revert,
    SnapshotPurge: snapshots.purge,
    ReplicaAdd: replicas.add,
    ReplicaRemove: replicas.remove,
    ReplicaWait: replicas.wait,
    ResyncLimit: replicas.limit,
    CloneFinish: clone.finish,
    Scrub: scrub,
}
_BY_NAME = {str(kind.__struct_config__.tag): kind for kind in HANDLERS}


class UnknownOperationError(EngineError):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return f"this engine does not know the operation {self.name!r}: it may be of an older release, upgrade it"


def decode(name: str, line: bytes) -> Operation:
    """Raises UnknownOperationError, and what `engine.decoding` lists."""
    kind = _BY_NAME.get(name)
    if kind is None:
        raise UnknownOperationError(name)
    return msgspec.json.decode(line, type=kind)


async def handle(controller: Controller, operation: Operation, progress: Progress) -> msgspec.Struct:
    """Raises EngineError."""
    return await HANDLERS[type(operation)](controller, operation, progress)
