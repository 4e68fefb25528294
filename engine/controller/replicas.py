"""Adding and removing replicas of an attached volume, and waiting for them."""

from __future__ import annotations

import trio

from engine.address import Address
from engine.controller.actions import ReplicaState
from engine.controller.driver import Controller
from engine.controller.progress import Progress
from engine.errors import LastReplicaError, ReplicaNameError
from engine.operations import (
    OperationProgress,
    ReplicaAdd,
    ReplicaRemove,
    ReplicaResult,
    ReplicaWait,
    ResyncLimit,
    ResyncLimited,
)
from engine.record import ReplicaRecord
from engine.store.maps import MAX_TRACKED, valid_name

_LOOK_EVERY = 0.1


def _names(controller: Controller) -> list[str]:
    return [replica.name for replica in controller.record.replicas]


def _result(controller: Controller) -> ReplicaResult:
    return ReplicaResult(replicas=tuple(_names(controller)), in_sync=controller.record.in_sync)


async def add(controller: Controller, request: ReplicaAdd, progress: Progress) -> ReplicaResult:
    """Raises ReplicaNameError, BusyError, EngineError."""
    volume, names = controller.record.volume, _names(controller)
    if request.name in names:
        raise ReplicaNameError(volume, request.name, f"it has a replica {request.name} already")
    if not valid_name(request.name):
        problem = f"{request.name!r} cannot be the name of a replica: up to 63 letters, digits, '.', '_' and '-'"
        raise ReplicaNameError(volume, request.name, problem)
    if len(names) >= MAX_TRACKED:
        raise ReplicaNameError(volume, request.name, f"it has {len(names)} replicas, and more are not possible")
    Address.parse(request.address)
    replica = ReplicaRecord(name=request.name, address=request.address, directory=request.directory)

    async def change() -> None:
        async with controller.exclusive(f"adding replica {request.name}"):
            await controller.add_replica(replica)

    await controller.to_the_end(change)
    return _result(controller)


async def remove(controller: Controller, request: ReplicaRemove, progress: Progress) -> ReplicaResult:
    """Raises ReplicaNameError, LastReplicaError, BusyError, EngineError."""
    name = request.name
    _check_removable(controller, name)

    async def change() -> None:
        # a rebuild of this very replica ends here
        await controller.stop_keeping(name)
        try:
            async with controller.exclusive(f"removing replica {name}"):
                _check_removable(controller, name)
                await controller.remove_replica(name)
        finally:
            if name in _names(controller):
                controller.keep(name)

    await controller.to_the_end(change)
    return _result(controller)


def _check_removable(controller: Controller, name: str) -> None:
    volume, names = controller.record.volume, _names(controller)
    if name not in names:
        raise ReplicaNameError(volume, name, f"it has no replica {name}; there are {', '.join(names)}")
    if not controller.core.in_sync & ~controller.core.bit(name):
        raise LastReplicaError(volume, name)


async def wait(controller: Controller, request: ReplicaWait, progress: Progress) -> ReplicaResult:
    """Raises ReplicaNameError."""
    while True:
        names = _names(controller)
        if request.name not in names:
            problem = f"it has no replica {request.name}; there are {', '.join(names)}"
            raise ReplicaNameError(controller.record.volume, request.name, problem)
        if controller.core.state(request.name) is ReplicaState.IN_SYNC:
            return _result(controller)
        now = controller.resync_progress(request.name)
        progress.latest = now or OperationProgress(message=controller.core.reason(request.name))
        await trio.sleep(_LOOK_EVERY)


async def limit(controller: Controller, request: ResyncLimit, progress: Progress) -> ResyncLimited:
    controller.limit_resync(max(request.rate, 0.0))
    return ResyncLimited(rate=max(request.rate, 0.0))
