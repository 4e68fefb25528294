"""`python -m engine.replica CONFIG.json`: one replica server, a plain child of whoever supervises it.

Exit status: 0 left in order, 1 a sync failed and the replica must leave, 2 it could not start.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import msgspec
import structlog
import trio

from engine.address import Address
from engine.allocator import keep_freed_memory
from engine.errors import EngineError
from engine.launch import ReplicaConfig
from engine.replica.listener import Listener, listen
from engine.replica.log import configure_logging
from engine.replica.offloop import open_ring
from engine.replica.server import Server
from engine.replica.syncer import make_syncer
from engine.secret import read_secret
from engine.store import Store

log = structlog.get_logger()

FAILED = 1
NOT_STARTED = 2


async def _serve(server: Server, listener: Listener) -> bool:
    async with trio.open_nursery() as nursery:
        await nursery.start(server.stop_on_signal)
        line = msgspec.json.encode({"event": "listening", "address": str(listener.address)}) + b"\n"
        with contextlib.suppress(OSError):  # the supervisor may be gone already
            os.write(1, line)
        log.info(
            "listening",
            address=str(listener.address),
            replica=server.store.identity.replica,
            instance=server.instance,
            io=server.io,
        )
        clean = await server.serve(listener)
        nursery.cancel_scope.cancel()
    return clean


def main(arguments: list[str]) -> int:
    configure_logging()
    keep_freed_memory()
    if len(arguments) != 1:
        log.error("cannot start", reason="usage: python -m engine.replica CONFIG.json")
        return NOT_STARTED
    try:
        config = msgspec.json.decode(Path(arguments[0]).read_bytes(), type=ReplicaConfig)
        key = read_secret(Path(config.secret_file))
        address = Address.parse(config.listen)
        store = Store.open(Path(config.directory), config.io, config.rest)
    except (OSError, msgspec.DecodeError, EngineError) as error:
        log.error("cannot start", reason=str(error))
        return NOT_STARTED
    try:
        ring = open_ring(store, config.io)
        listener = listen(address)
    except (OSError, EngineError) as error:
        store.close()
        log.error("cannot start", reason=str(error))
        return NOT_STARTED
    clean = trio.run(_serve, Server(store, key, ring, make_syncer(store)), listener)
    listener.close()
    store.close()
    return 0 if clean else FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
