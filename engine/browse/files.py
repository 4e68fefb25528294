"""A directory of snapshots, each a read-only file `NAME.img` with the volume's content of then; through pyfuse3."""

from __future__ import annotations

import datetime
import errno
import os
import stat
from pathlib import Path

import msgspec
import pyfuse3
import structlog
import trio

from engine.browse.reader import SnapshotGoneError, SnapshotReader
from engine.client import EngineClient, EngineOperationError, EngineUnreachableError
from engine.operations import SnapshotList, SnapshotsListed
from engine.wire.messages import SnapshotEntry

log = structlog.get_logger()

SUFFIX = ".img"
# for how long the kernel need not ask again; a snapshot that is deleted meanwhile cannot be opened any more
_KNOWN_FOR = 1.0


class SnapshotFiles(pyfuse3.Operations):
    """`only` restricts it to one snapshot. A snapshot that has an open file cannot be deleted."""

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(self, control: Path, nursery: trio.Nursery, only: str = "") -> None:
        super().__init__()
        self._control = control
        self._only = only
        self._nursery = nursery
        self._inodes: dict[tuple[str, str], int] = {}
        self._entries: dict[int, SnapshotEntry] = {}
        self._listed: tuple[float, list[SnapshotEntry]] = (-_KNOWN_FOR, [])
        self._readers: dict[int, SnapshotReader] = {}
        self._users: dict[int, int] = {}
        self._opening = trio.Lock()

    async def listing(self) -> list[SnapshotEntry]:
        now = trio.current_time()
        if now - self._listed[0] >= _KNOWN_FOR:
            try:
                found = await EngineClient(self._control).run(SnapshotList(), SnapshotsListed)
            except (EngineUnreachableError, EngineOperationError, msgspec.DecodeError) as error:
                log.warning("snapshots cannot be listed", reason=str(error))
                raise pyfuse3.FUSEError(errno.EIO) from error
            entries = [one for one in found.snapshots if not one.removed and self._only in ("", one.name)]
            self._listed = (now, entries)
            for entry in entries:
                self._entries[self._inode(entry)] = entry
        return self._listed[1]

    def _inode(self, entry: SnapshotEntry) -> int:
        # one that is made anew under an old name is another file
        return self._inodes.setdefault((entry.name, entry.created), pyfuse3.ROOT_INODE + 1 + len(self._inodes))

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        attributes = pyfuse3.EntryAttributes()
        attributes.st_ino = inode
        attributes.st_uid, attributes.st_gid = os.getuid(), os.getgid()
        attributes.st_blksize = 4096
        attributes.attr_timeout = attributes.entry_timeout = _KNOWN_FOR
        if inode == pyfuse3.ROOT_INODE:
            attributes.st_mode = stat.S_IFDIR | 0o500
            attributes.st_nlink = 2
            return attributes
        entry = self._entries.get(inode)
        if entry is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        attributes.st_mode = stat.S_IFREG | 0o400
        attributes.st_nlink = 1
        attributes.st_size = entry.size
        attributes.st_blocks = self._allocated(entry) // 512
        attributes.st_mtime_ns = attributes.st_ctime_ns = attributes.st_atime_ns = _nanoseconds(entry.created)
        return attributes

    def _allocated(self, entry: SnapshotEntry) -> int:
        """About what has data, so that programs look for holes."""
        known = {one.name: one for one in self._listed[1]}
        total, at = 0, entry
        while True:
            total += at.allocated
            if at.parent not in known:
                return min(total, entry.size)
            at = known[at.parent]

    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext | None = None) -> pyfuse3.EntryAttributes:
        return self._attributes(inode)

    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext | None = None
    ) -> pyfuse3.EntryAttributes:
        for entry in await self.listing():
            if os.fsencode(entry.name + SUFFIX) == name:
                return self._attributes(self._inode(entry))
        raise pyfuse3.FUSEError(errno.ENOENT)

    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        return inode

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        for number, entry in enumerate((await self.listing())[start_id:], start_id + 1):
            name = os.fsencode(entry.name + SUFFIX)
            if not pyfuse3.readdir_reply(token, name, self._attributes(self._inode(entry)), number):
                break

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise pyfuse3.FUSEError(errno.EROFS)
        entry = self._entries.get(inode)
        if entry is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        async with self._opening:
            if inode not in self._readers:
                reader = SnapshotReader(self._control, entry.name, self._nursery)
                try:
                    await reader.connect()
                except SnapshotGoneError as error:
                    log.warning("snapshot cannot be opened", snapshot=entry.name, reason=str(error))
                    raise pyfuse3.FUSEError(errno.ENOENT) from error
                except OSError as error:
                    raise pyfuse3.FUSEError(error.errno or errno.EIO) from error
                self._readers[inode] = reader
            self._users[inode] = self._users.get(inode, 0) + 1
        # it never changes, so what the kernel has of it stays right
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        try:
            return await self._readers[fh].read(off, size)
        except OSError as error:
            log.warning("snapshot cannot be read", snapshot=self._entries[fh].name, offset=off, reason=str(error))
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None

    async def release(self, fh: int) -> None:
        self._users[fh] -= 1
        if not self._users[fh]:
            self._readers.pop(fh).close()

    async def forget(self, inode_list: object) -> None:
        return

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_namemax = 255
        return data


def _nanoseconds(created: str) -> int:
    """Of RFC 3339 in UTC, which has no fraction or one of any length."""
    whole, _, fraction = created.removesuffix("Z").partition(".")
    try:
        seconds = int(datetime.datetime.fromisoformat(whole + "+00:00").timestamp())
        return seconds * 10**9 + int(fraction[:9].ljust(9, "0") if fraction else 0)
    except ValueError:
        return 0
