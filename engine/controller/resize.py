"""Grow an attached volume: every replica that gets its writes, durably; then the record; then what clients may ask for.

Cut off anywhere, the volume works at its old or at its new size, and takes the same command again. A replica that is
away is grown when it comes back, before it gets its first write.
"""

from __future__ import annotations

import msgspec
import trio

from engine.controller.connection import ReplicaConnection, ReplicaRefusedError
from engine.controller.driver import Controller
from engine.controller.progress import Progress
from engine.errors import EngineError, FencedError, ResizeError
from engine.operations import Resize, Resized
from engine.record import VolumeRecord
from engine.wire import messages
from engine.wire.frame import FrameType

_BLOCK = 4096


async def resize(controller: Controller, request: Resize, progress: Progress) -> Resized:
    """Raises ResizeError, BusyError, FencedError."""
    async with controller.exclusive("a resize"):
        size, before, volume = request.size, controller.size, controller.record.volume
        if size % _BLOCK or size <= 0:
            raise ResizeError(volume, f"{size} bytes is not a positive multiple of {_BLOCK}")
        if size < before:
            raise ResizeError(volume, f"it has {before} bytes and can only grow, not shrink to {size}")
        if size > before:
            await _grow(controller, size)
        else:
            controller.tell_size()  # whoever asks again may not have seen it
        return Resized(size=controller.size, before=before)


async def _grow(controller: Controller, size: int) -> None:
    # from here on a replica that comes back is grown first
    controller.target_size = size
    try:
        await _grow_replicas(controller, size)
    except BaseException:
        controller.target_size = controller.size
        raise

    def larger(record: VolumeRecord) -> VolumeRecord:
        return msgspec.structs.replace(record, size=max(record.size, size))

    # the controller itself goes on at the new size with the record, even when nobody waits here any more
    await controller.change_record(larger)


async def _grow_replicas(controller: Controller, size: int) -> None:
    """Those that get every write, again until none was added meanwhile."""
    grown: set[ReplicaConnection] = set()
    refused: dict[str, str] = {}

    async def grow(connection: ReplicaConnection) -> None:
        try:
            with trio.fail_after(controller.request_timeout):
                await connection.call(FrameType.RESIZE, messages.Resize(size=size))
            grown.add(connection)
        except ReplicaRefusedError as error:
            reason = error.detail.decode(errors="replace") or str(error)
            if connection.bit & controller.core.in_sync:
                refused[connection.name] = reason
            else:
                controller.lose(connection, f"cannot grow: {reason}")
        except FencedError:
            raise
        except (EngineError, trio.TooSlowError) as error:
            reason = str(error) or f"did not grow within {controller.request_timeout:g} s"
            controller.lose(connection, reason)

    while missing := [one for one in controller.connected(controller.core.fanout) if one not in grown]:
        async with trio.open_nursery() as nursery:
            for connection in missing:
                nursery.start_soon(grow, connection)
        if controller.failure is not None:
            raise controller.failure
        if refused:
            reasons = "; ".join(f"replica {name}: {reason}" for name, reason in sorted(refused.items()))
            raise ResizeError(controller.record.volume, f"{reasons}. Mend that and ask again")
