"""The portable frontend: the volume as one file through pyfuse3.

The mount exists already, its root is the file. libfuse takes an open descriptor as `/dev/fd/N`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import AsyncIterator

import pyfuse3
import trio

from engine.errors import FrontendError
from engine.frontend.base import BlockVolume

# the kernel may keep attributes for long: nobody but us changes them
_FOREVER = 3600.0
_FILE_HANDLE = 1
_WORKERS = 64


class _VolumeFile(pyfuse3.Operations):
    """One regular file, inode 1."""

    enable_writeback_cache = False

    def __init__(self, volume: BlockVolume) -> None:
        super().__init__()
        self._volume = volume

    def _attributes(self) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.ROOT_INODE
        entry.st_mode = stat.S_IFREG | 0o600
        entry.st_nlink = 1
        entry.st_uid = os.getuid()
        entry.st_gid = os.getgid()
        entry.st_size = self._volume.size
        entry.st_blksize = 4096
        entry.st_blocks = self._volume.size // 512
        entry.attr_timeout = _FOREVER
        entry.entry_timeout = _FOREVER
        return entry

    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext | None = None) -> pyfuse3.EntryAttributes:
        return self._attributes()

    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        if fields.update_size and attr.st_size != self._volume.size:
            # a block device does not change its size by truncate
            raise pyfuse3.FUSEError(errno.EPERM)
        return self._attributes()

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        # no page cache in between: the loop driver would pay for a copy, and a stale page could outlive a resync
        return pyfuse3.FileInfo(fh=_FILE_HANDLE, direct_io=True, keep_cache=False)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        size = min(size, self._volume.size - off)
        if size <= 0:
            return b""
        try:
            return await self._volume.read(off, size)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        if off + len(buf) > self._volume.size:
            raise pyfuse3.FUSEError(errno.ENOSPC)
        try:
            await self._volume.write(off, buf)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None
        return len(buf)

    async def fsync(self, fh: int, datasync: bool) -> None:
        # never ENOSYS: the kernel would take every later flush for granted
        try:
            await self._volume.flush()
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None

    async def flush(self, fh: int) -> None:
        # close(2) has nothing to say to a volume: after one ENOSYS the kernel does not ask again
        raise pyfuse3.FUSEError(errno.ENOSYS)

    async def release(self, fh: int) -> None:
        return

    async def forget(self, inode_list: object) -> None:
        return

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_blocks = self._volume.size // 4096
        data.f_namemax = 255
        return data


def _forget_attributes() -> None:
    """Have the kernel ask for the file's attributes again, and so for its size."""
    with contextlib.suppress(OSError):  # ENOENT: it does not know the file yet
        pyfuse3.invalidate_inode(pyfuse3.ROOT_INODE, attr_only=True)


class _Session:
    # libfuse takes no connection over
    resumable = False

    def __init__(self) -> None:
        self.ended = trio.Event()


class Pyfuse3Frontend:
    name = "pyfuse3"

    @contextlib.asynccontextmanager
    async def serve(self, volume: BlockVolume, fuse_fd: int, *, resume: bool = False) -> AsyncIterator[_Session]:
        if resume:
            raise FrontendError("the pyfuse3 frontend cannot take over from another server: attach again")
        session = _Session()
        options = {"fsname=share-manager"}
        # libfuse closes the descriptor that it is given
        pyfuse3.init(_VolumeFile(volume), f"/dev/fd/{os.dup(fuse_fd)}", options)
        volume.watch_size(_forget_attributes)
        try:
            async with trio.open_nursery() as nursery:

                async def loop() -> None:
                    await pyfuse3.main(min_tasks=1, max_tasks=_WORKERS)
                    session.ended.set()

                nursery.start_soon(loop)
                yield session
                nursery.cancel_scope.cancel()
        finally:
            pyfuse3.close(unmount=False)
