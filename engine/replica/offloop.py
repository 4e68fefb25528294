"""What of direct I/O has to wait, in threads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog
import trio

from engine.replica.aio import Ring
from engine.replica.direct import SLOTS, WRITE_LAYER, Direct
from engine.wire.frame import Frame

if TYPE_CHECKING:
    from engine.replica.layers import LayerRequests
    from engine.store import IoMode, Store

log = structlog.get_logger()


def open_ring(store: Store, io: IoMode) -> Ring | None:
    """What `Direct` needs for this store; None when it is to be read and written through the page cache.

    Raises OSError when `io` is "direct" and there is no AIO.
    """
    if store.direct < 0:
        return None
    try:
        return Ring(SLOTS)
    except OSError as error:
        if io == "direct":
            raise
        log.warning("no asynchronous I/O, going through the page cache", reason=str(error))
        return None


async def run(direct: Direct, store: Store, layers: LayerRequests) -> None:
    """Until cancelled."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_submit_again, direct)
        nursery.start_soon(_punch, direct, store, layers)


async def _submit_again(direct: Direct) -> None:
    while True:
        while not direct.again:
            direct.wake_again = trio.Event()
            await direct.wake_again.wait()
        slots, direct.again = direct.again, []
        # slots in this list belong to nobody else until their completion
        await trio.to_thread.run_sync(direct.ring.submit_all, slots)


async def _punch(direct: Direct, store: Store, layers: LayerRequests) -> None:
    while True:
        while not direct.unmaps:
            direct.wake_unmaps = trio.Event()
            await direct.wake_unmaps.wait()
        batch, direct.unmaps = direct.unmaps, []
        frames = [frame for (_, frame), _ in batch]
        errors = await trio.to_thread.run_sync(_punch_all, frames, store, layers)
        for frame, error in zip(frames, errors, strict=True):
            if frame[0] == WRITE_LAYER and error is None:
                layers.wrote_head(frame)
        direct.punched(batch, errors)


def _punch_all(frames: list[Frame], store: Store, layers: LayerRequests) -> list[OSError | None]:
    errors: list[OSError | None] = []
    for frame in frames:
        try:
            if frame[0] == WRITE_LAYER:
                layers.write_head(frame)
            else:
                store.unmap(frame[3], frame[4])
        except OSError as error:
            errors.append(error)
        else:
            errors.append(None)
    return errors
