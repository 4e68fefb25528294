"""The checksums of a replica's images, as far as its server has to do with them: making them, digests, repairs."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import structlog
import trio

from engine.wire import messages
from engine.wire.frame import Frame

if TYPE_CHECKING:
    from engine.replica.exchange import Exchange
    from engine.replica.server import Server

log = structlog.get_logger()

# 4 MiB each time: some milliseconds of a thread, and at most 32 MiB a second beside the data
REGIONS_AT_A_TIME = 4
PAUSE = 0.125
IDLE_PAUSE = 2.0
PAUSE_AFTER_ERROR = 60.0


async def keep_sums(server: Server) -> None:
    """Make checksums of what is at rest, for ever. Without them nothing is lost but the look at what the disk says."""
    idle = min(IDLE_PAUSE, max(server.store.summing.rest / 4, PAUSE))
    pause = idle
    while not server.failed:
        await trio.sleep(pause)
        server.tick()
        store = server.store
        async with server.whole():
            pause = idle
            try:
                step = store.begin_sums(REGIONS_AT_A_TIME)
                if step is None:
                    continue
                try:
                    await trio.to_thread.run_sync(step.run)
                except OSError:
                    store.finish_sums(step, failed=True)
                    raise
                store.finish_sums(step)
                pause = PAUSE
            except OSError as error:
                log.warning("no checksums could be made", reason=str(error))
                pause = PAUSE_AFTER_ERROR


async def digest(server: Server, connection: Exchange, frame: Frame, wanted: messages.Digest) -> None:
    """Answer a DIGEST. Raises StoreError, OSError."""
    kind, _, seq, offset, length, _ = frame
    async with server.whole():
        if server.refused(connection, frame):
            return
        step = server.store.begin_digest(wanted.snapshot, offset, length, everything=wanted.everything)
        found = await trio.to_thread.run_sync(step.run)
        if server.refused(connection, frame):
            return
    body = struct.pack(f"<{len(found.sums)}I", *found.sums) + found.flags
    connection.reply(kind, 0, seq, offset=found.more, length=len(found.sums), payload=body)


async def mend(server: Server, connection: Exchange, frame: Frame, wanted: messages.Mend) -> bytes | None:
    """Carry out a MEND. Raises StoreError, OSError."""
    async with server.whole():
        if server.refused(connection, frame):
            return None
        step = server.store.begin_mend(wanted.snapshot, frame[3], wanted.data, force=wanted.force)
        await trio.to_thread.run_sync(step.run)
        server.store.finish_mend(step)
        if server.refused(connection, frame):
            return None
    log.warning("damaged blocks were put back", snapshot=wanted.snapshot, offset=frame[3], length=frame[4])
    return b""
