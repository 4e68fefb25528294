"""File operations on the volume itself, from the process that must mend it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

import trio

_T = TypeVar("_T")
_Arguments = TypeVarTuple("_Arguments")


async def on_volume(act: Callable[[*_Arguments], _T], *arguments: *_Arguments) -> _T:
    """Run `act` in a thread that a cancellation leaves behind.

    While the engine is away such a call waits for it. Made on the loop it would keep us from noticing that the engine
    died, and from failing the very request that it waits for.
    """
    return await trio.to_thread.run_sync(act, *arguments, abandon_on_cancel=True)
