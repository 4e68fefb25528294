"""A record server in this process, on a port that was free, and a client of it for blocking work."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import trio

from engine.address import Address
from engine.records import RecordsClient, serve_records

SECRET = b"s" * 32


@contextlib.asynccontextmanager
async def serving(directory: Path) -> AsyncIterator[str]:
    async with trio.open_nursery() as nursery:
        address: Address = await nursery.start(serve_records, directory, SECRET, Address.parse("tcp:127.0.0.1:0"))
        yield str(address)
        nursery.cancel_scope.cancel()


async def use(
    work: Callable[[RecordsClient], None], directory: Path, secret: bytes = SECRET, timeout: float = 2.0
) -> None:
    async with serving(directory) as address:
        with RecordsClient(address, secret, timeout=timeout) as client:
            await trio.to_thread.run_sync(work, client)
