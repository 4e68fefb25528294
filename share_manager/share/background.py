"""Tasks that must outlast a cancellation of what runs beside them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVarTuple, Unpack

import trio

Args = TypeVarTuple("Args")


class Background:
    """While a block is being left in order, what supervises it still has to run: made by `background`."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._scopes: set[trio.CancelScope] = set()
        self._stopped = False

    def start_soon(self, task: Callable[[Unpack[Args]], Awaitable[None]], *args: *Args) -> None:
        async def shielded() -> None:
            scope = trio.CancelScope(shield=True)
            if self._stopped:
                return
            self._scopes.add(scope)
            try:
                with scope:
                    await task(*args)
            finally:
                self._scopes.discard(scope)

        self._nursery.start_soon(shielded, name=task)

    def stop(self) -> None:
        self._stopped = True
        for scope in self._scopes:
            scope.cancel()


@contextlib.asynccontextmanager
async def background() -> AsyncIterator[Background]:
    """Tasks run until the block has been left, cancelled or not. One that fails cancels the block."""
    async with trio.open_nursery() as nursery:
        tasks = Background(nursery)
        try:
            yield tasks
        finally:
            tasks.stop()
