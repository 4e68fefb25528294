"""Freezing a mounted filesystem around a snapshot, so that the snapshot needs no journal replay, and thawing it always.

The calls wait for the volume: they run in threads that a cancellation leaves behind, and a thread that comes too late
with its freeze undoes it by itself.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import trio

from share_manager.errors import FilesystemError, TimeoutProblem
from share_manager.share.onvolume import on_volume

# linux/fs.h: _IOWR('X', 119, int), _IOWR('X', 120, int)
_FIFREEZE, _FITHAW = 0xC0045877, 0xC0045878
FREEZE_TIMEOUT = 10.0
THAW_TIMEOUT = 10.0


class _Freeze:
    """One freeze, shared by the threads that make and undo it. Its descriptor keeps the mount from going away."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._fd = -1
        self._given_up = False

    def freeze(self) -> None:
        """Returns when nothing is written any more and all of it is on the volume. Raises OSError."""
        fd = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, _FIFREEZE, 0)
        except OSError:
            os.close(fd)
            raise
        with self._lock:
            self._fd = fd
            late = self._given_up
        if late:
            self.thaw()

    def thaw(self) -> None:
        """Also for a freeze that is still to come. Raises OSError."""
        with self._lock:
            self._given_up = True
            fd, self._fd = self._fd, -1
        if fd >= 0:
            try:
                fcntl.ioctl(fd, _FITHAW, 0)
            finally:
                os.close(fd)


@contextlib.asynccontextmanager
async def frozen(root: Path, timeout: float = FREEZE_TIMEOUT) -> AsyncIterator[None]:
    """Inside the block the filesystem mounted at `root` is at rest; whoever writes waits.

    Raises TimeoutProblem after `timeout` seconds, FilesystemError.
    """
    freeze = _Freeze(root)
    try:
        with trio.move_on_after(timeout) as limit:
            try:
                await on_volume(freeze.freeze)
            except OSError as error:
                why = "somebody else has frozen it" if error.errno == errno.EBUSY else error.strerror or str(error)
                raise FilesystemError(str(root), f"it cannot be frozen for a snapshot: {why}") from error
        if limit.cancelled_caught:
            raise TimeoutProblem("freezing the filesystem for a snapshot", timeout)
        yield
    finally:
        # a thaw that waits for a lost engine ends when its requests are failed; its thread is left to do that
        with trio.CancelScope(shield=True), trio.move_on_after(THAW_TIMEOUT), contextlib.suppress(OSError):
            await on_volume(freeze.thaw)


def thaw(root: Path) -> None:
    """Undo a freeze that somebody left behind. Raises OSError, EINVAL when there is none."""
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _FITHAW, 0)
    finally:
        os.close(fd)
