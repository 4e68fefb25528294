"""The descriptor of a FUSE mount that is one regular file, owned apart from the process that serves it.

Whoever keeps `fd` open keeps the connection alive: while a supervisor holds a duplicate, a dead server makes
requests wait instead of fail. The mount itself is made here with mount(2) (options: fs/fuse/inode.c of Linux), so
that the serving process only inherits a descriptor.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

from engine.errors import FrontendError

MAX_IO = 1 << 20
_MNT_FORCE = 1
_MNT_DETACH = 2
_MS_NOSUID = 2
_MS_NODEV = 4
_libc = ctypes.CDLL(None, use_errno=True)


def _mount(target: Path, options: str) -> None:
    flags = _MS_NOSUID | _MS_NODEV
    if _libc.mount(b"share-manager", os.fsencode(target), b"fuse.share-manager", flags, options.encode()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(target))


def _unmount(target: Path, flags: int) -> None:
    if _libc.umount2(os.fsencode(target), flags):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(target))


class FuseDevice:
    """One FUSE file. `fd` is the descriptor of /dev/fuse; close-on-exec, so pass it on explicitly."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.fd = fd

    @classmethod
    def open(cls, path: Path) -> FuseDevice:
        """One that is to be mounted at `path`, by `mount_here`. Raises FrontendError."""
        try:
            fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise FrontendError(f"cannot open /dev/fuse: {error.strerror}; the kernel needs FUSE") from error
        return cls(path, fd)

    @classmethod
    def mount(cls, path: Path) -> FuseDevice:
        """Mount a file at `path`, which is created if missing. Raises FrontendError."""
        device = cls.open(path)
        try:
            device.mount_here()
        except FrontendError:
            device.close()
            raise
        return device

    def mount_here(self) -> None:
        """Raises FrontendError."""
        options = f"fd={self.fd},rootmode=100000,user_id={os.getuid()},group_id={os.getgid()},allow_other"
        try:
            self.path.touch(mode=0o600)
            _mount(self.path, f"{options},max_read={MAX_IO}")
        except OSError as error:
            raise FrontendError(f"cannot mount FUSE at {self.path}: {error.strerror}") from error

    def abort(self) -> None:
        """End every waiting and every later request with an error, whoever holds the descriptor."""
        try:
            _unmount(self.path, _MNT_FORCE)
        except OSError as error:
            # EBUSY is the usual answer while a loop device holds the file: the connection is aborted all the same
            if error.errno not in (errno.EBUSY, errno.EINVAL):
                raise FrontendError(f"cannot abort FUSE at {self.path}: {error.strerror}") from error

    def unmount(self) -> None:
        """Take the file out of the tree; it ends when its last user closes it. Does nothing when it is not mounted."""
        try:
            _unmount(self.path, _MNT_DETACH)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise FrontendError(f"cannot unmount {self.path}: {error.strerror}") from error

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
