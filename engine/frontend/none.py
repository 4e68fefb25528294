"""No file: for work on a volume that nobody uses, such as snapshots and rebuilds."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import trio

from engine.frontend.base import BlockVolume


class _Session:
    resumable = False

    def __init__(self) -> None:
        self.ended = trio.Event()


class NoFrontend:
    name = "none"

    @contextlib.asynccontextmanager
    async def serve(self, volume: BlockVolume, fuse_fd: int, *, resume: bool = False) -> AsyncIterator[_Session]:
        yield _Session()
