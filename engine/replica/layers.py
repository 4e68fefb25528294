"""Requests about single images of the chain, with which one replica is filled from another.

Reading an image and writing a snapshot's have threads of their own and wait for nothing else. What is written to the
head is a write like any other: it waits for its intent bits, and a flush waits for it.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import msgspec
import structlog
import trio

from engine.errors import StoreError
from engine.store import SnapshotInfo
from engine.wire import messages
from engine.wire.frame import Frame, FrameType
from engine.wire.layers import BLOCK, MAX_RANGE, decode_layer, encode_layer, layer_name

if TYPE_CHECKING:
    from engine.replica.exchange import Exchange
    from engine.replica.server import Server
    from engine.replica.snapshots import Work

log = structlog.get_logger()

THREADS = 2


class LayerRequests:
    def __init__(self, server: Server) -> None:
        self._server = server
        self._threads = trio.CapacityLimiter(THREADS)

    async def begin(self, connection: Exchange, frame: Frame, wanted: messages.BeginRebuild) -> None:
        """BEGIN_REBUILD. Raises StoreError, OSError."""
        server = self._server
        await server.quiesce()
        async with server.whole():
            if server.refused(connection, frame):
                return
            infos = [SnapshotInfo(**msgspec.structs.asdict(entry)) for entry in wanted.snapshots]
            change = server.store.begin_rebuild(infos)
            # nobody applies anything meanwhile: the owner's frames wait, and a new owner's OPEN waits for the lock
            try:
                await trio.to_thread.run_sync(change.run)
                server.store.finish_rebuild(change)
            except (OSError, StoreError) as error:
                # part of it may be done, and only an open finds out which
                server.fail_parked(f"cannot begin the rebuild: {error}")
                raise
            await trio.to_thread.run_sync(change.release)
            if server.refused(connection, frame):
                return
        state = change.state
        log.info("rebuilding", snapshots=len(infos), kept=sum(layer.filled >= layer.size for layer in state.layers))
        answer = messages.RebuildState(
            snapshots={layer.name: messages.Filled(cursor=layer.filled, copied=layer.copied) for layer in state.layers},
            head=state.head,
        )
        connection.reply(frame[0], 0, frame[2], payload=messages.encode(answer))

    # the head's data

    def write_head(self, frame: Frame) -> None:
        """In any thread; `wrote_head` follows where the store is used. Raises OSError."""
        found, data = decode_layer(frame[5], frame[4])
        self._server.store.write_head(frame[3], frame[4], found, data)

    def wrote_head(self, frame: Frame) -> None:
        _, _, seq, offset, length, payload = frame
        store, counters = self._server.store, self._server.counters
        store.changed(offset, length)
        store.maps.filled(offset, length, seq)
        counters.writes += 1
        counters.written_bytes += len(payload)

    # requests that nothing waits for

    def work(self, connection: Exchange, frame: Frame) -> Work:
        """What answers a READ_LAYER, a WRITE_LAYER of a snapshot or a REBUILD_STATE. Raises ProtocolError."""
        kind, _, _, _, length, payload = frame
        if kind == FrameType.READ_LAYER:
            return partial(self._read, connection, frame, messages.decode(payload, messages.ReadLayer))
        if kind == FrameType.WRITE_LAYER:
            decode_layer(payload, length)
            return partial(self._write, connection, frame, layer_name(payload))
        return partial(self._save, connection, frame, messages.decode(payload, messages.RebuildState))

    async def _read(self, connection: Exchange, frame: Frame, wanted: messages.ReadLayer) -> bytes | None:
        server, (kind, _, seq, offset, length, _) = self._server, frame
        if offset % BLOCK or length % BLOCK or length > MAX_RANGE:
            raise StoreError(server.store.directory, f"{offset}+{length} is not whole blocks of {BLOCK} bytes")
        if server.refused(connection, frame):
            return None
        found, data, covered = await trio.to_thread.run_sync(
            server.store.read_layer, wanted.name, offset, length, limiter=self._threads
        )
        if server.refused(connection, frame):
            return None
        server.counters.reads += 1
        server.counters.read_bytes += len(data)
        connection.reply(kind, 0, seq, offset=offset, length=covered, payload=encode_layer(wanted.name, found, data))
        return None

    async def _write(self, connection: Exchange, frame: Frame, name: str) -> bytes | None:
        server, (_, _, _, offset, length, payload) = self._server, frame
        if server.refused(connection, frame):
            return None
        found, data = decode_layer(payload, length)
        await trio.to_thread.run_sync(
            server.store.write_layer, name, offset, length, found, data, limiter=self._threads
        )
        server.store.changed(offset, length)
        server.counters.writes += 1
        server.counters.written_bytes += len(data)
        return None if server.refused(connection, frame) else b""

    async def _save(self, connection: Exchange, frame: Frame, told: messages.RebuildState) -> bytes | None:
        server = self._server
        async with server.whole():
            if server.refused(connection, frame):
                return None
            store = server.store
            if store.rebuild is None:
                raise StoreError(store.directory, "it is not being rebuilt")
            layers = []
            for layer in store.rebuild.layers:
                filled = told.snapshots.get(layer.name)
                if filled is not None:
                    layer = msgspec.structs.replace(layer, filled=filled.cursor, copied=filled.copied)
                layers.append(layer)
            state = msgspec.structs.replace(store.rebuild, layers=tuple(layers), head=told.head)
            taken = store.maps.take_filled()
            try:
                await trio.to_thread.run_sync(store.sync_filled)
            except OSError as error:
                server.fail_parked(f"fdatasync failed: {error}")
                raise
            # a cursor that is lost to a full disk only has something copied twice
            await trio.to_thread.run_sync(store.save_rebuild, state)
            store.maps.fill_synced(taken)
            return None if server.refused(connection, frame) else b""
