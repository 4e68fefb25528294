"""Replica servers and an engine inside the test's own process, over real sockets: for tests that need many of them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import trio

from engine.address import Address
from engine.replica import Server, listen
from engine.store import Store


@contextlib.asynccontextmanager
async def served(directory: Path, address: str, key: bytes) -> AsyncIterator[Server]:
    """Serve the replica there until the block ends, as abruptly as a killed process. Raises EngineError."""
    store = Store.open(directory)
    listener = listen(Address.parse(address))
    server = Server(store, key)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.serve, listener)
            yield server
            nursery.cancel_scope.cancel()
    finally:
        listener.close()
        store.close()
