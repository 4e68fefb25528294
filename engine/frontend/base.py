"""What a frontend needs from a volume, and what the engine needs from a frontend."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import trio

from engine.ops import BlockRequest
from engine.poller import Poller


class BlockVolume(Protocol):
    """A volume of `size` bytes. All methods raise OSError with the errno that the caller of the file should see.

    `poller` is run by the volume; a frontend may add its descriptor.
    """

    size: int
    poller: Poller

    async def read(self, offset: int, length: int) -> bytes: ...

    async def write(self, offset: int, data: bytes) -> None: ...

    async def unmap(self, offset: int, length: int) -> None: ...

    async def flush(self) -> None: ...

    def watch_size(self, changed: Callable[[], None]) -> None:
        """Have `changed` called whenever `size` has grown; it must not raise or block."""

    def submit(self, request: BlockRequest) -> None:
        """Queue a request; it is on its way after `kick`."""

    def kick(self) -> None:
        """Send what was submitted, all of it at once."""


class FrontendSession(Protocol):
    """A mounted file that is being served.

    `ended` is set when the kernel has let go of the mount. `resumable`: another server can take over on the same
    descriptor, and gets the requests that this one leaves unanswered.
    """

    ended: trio.Event
    resumable: bool


class Frontend(Protocol):
    """Serves the file mounted on a descriptor of /dev/fuse (see `FuseDevice`) until the block is left.

    With `resume` the descriptor was served before, by a process that is gone. Raises FrontendError.
    """

    name: str

    def serve(
        self, volume: BlockVolume, fuse_fd: int, *, resume: bool = False
    ) -> AbstractAsyncContextManager[FrontendSession]: ...
