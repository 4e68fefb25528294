"""What the controllers of volumes and shares do as far as the driver can see it: by the real API, without any data."""

from __future__ import annotations

import contextlib

import msgspec
import trio

from share_manager.controllers.service import service
from share_manager.kube.client import Client
from share_manager.kube.core import Service
from share_manager.kube.errors import ApiAwayError, ConflictError, ExistsError, NotFoundError
from share_manager.kube.meta import Condition, ObjectMeta
from share_manager.kube.resources import ShareManager, Volume, VolumeStatus


class Keeper:
    """`held` volumes stay as they were made, with `problem` for a reason."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.held = False
        self.problem = "no node has room for replica 3: add a node, or space"

    async def run(self) -> None:
        while True:
            try:
                for volume in (await self._client.list(Volume)).items:
                    with contextlib.suppress(ConflictError, NotFoundError):
                        await self._keep(volume)
            except ApiAwayError:
                pass
            await trio.sleep(0.05)

    async def _keep(self, volume: Volume) -> None:
        if volume.deleting:
            if volume.metadata.finalizers:
                return
        elif self.held:
            condition = Condition(
                type="Scheduled",
                status="False",
                reason="NoRoom",
                message=self.problem,
                last_transition_time="2026-01-01T00:00:00Z",
            )
            await self._status(volume, VolumeStatus(state="creating", conditions=(condition,)))
        elif volume.status.state != "ready":
            meta = ObjectMeta(name=volume.name, owner_references=(volume.reference(controller=True),))
            with contextlib.suppress(ExistsError):
                await self._client.create_json(Service, service(volume))
            await self._client.ensure(ShareManager(metadata=meta))
            await self._status(volume, VolumeStatus(state="ready"))

    async def _status(self, volume: Volume, status: VolumeStatus) -> None:
        await self._client.update_status(volume, msgspec.structs.replace(volume, status=status))
