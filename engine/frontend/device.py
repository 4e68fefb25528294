"""The fast frontend: reads /dev/fuse itself (see `Session`)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator

from engine.frontend.base import BlockVolume
from engine.frontend.session import Session, ask_again, forget_attributes


class DeviceFrontend:
    name = "device"

    @contextlib.asynccontextmanager
    async def serve(self, volume: BlockVolume, fuse_fd: int, *, resume: bool = False) -> AsyncIterator[Session]:
        os.set_blocking(fuse_fd, False)
        session = Session(volume, fuse_fd, resume)
        if resume:
            ask_again(fuse_fd)
            # the one before may have gone between growing the volume and saying so
            forget_attributes(fuse_fd)
        volume.watch_size(lambda: forget_attributes(fuse_fd))
        volume.poller.add(fuse_fd, session.readable, linger=True)
        try:
            yield session
        finally:
            session.ended.set()
            volume.poller.remove(fuse_fd)
