"""Starting and stopping the replica servers of a running share or attachment, from within and from outside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from share_manager.errors import NotReadyError
from share_manager.paths import VolumePaths
from share_manager.share.control import Handlers, ask
from share_manager.share.requests import ReplicaServed, StartReplica, StopReplica


class Servers(Protocol):
    """Who runs replica servers. Raises ShareManagerError."""

    async def start(self, name: str, directory: Path) -> None:
        """Serve a directory at the address of this replica, until it is stopped."""

    async def stop(self, name: str) -> None:
        """Harmless when there is none."""


class RemoteServers:
    """Those of the share manager of a volume. Raises VolumeNotServedError, RemoteProblem, RuntimeProblem."""

    def __init__(self, paths: VolumePaths) -> None:
        self._paths = paths

    async def start(self, name: str, directory: Path) -> None:
        await ask(self._paths, StartReplica(name=name, directory=str(directory)), ReplicaServed)

    async def stop(self, name: str) -> None:
        await ask(self._paths, StopReplica(name=name), ReplicaServed)


def server_handlers(volume: str, servers: Callable[[], Servers | None]) -> Handlers:
    """What answers those requests; `servers` is None while the volume is being started or left."""

    def running() -> Servers:
        found = servers()
        if found is None:
            raise NotReadyError(volume, "being started or left")
        return found

    async def start(request: StartReplica) -> ReplicaServed:
        await running().start(request.name, Path(request.directory))
        return ReplicaServed(name=request.name)

    async def stop(request: StopReplica) -> ReplicaServed:
        await running().stop(request.name)
        return ReplicaServed(name=request.name)

    return {StartReplica: start, StopReplica: stop}
