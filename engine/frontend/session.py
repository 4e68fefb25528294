"""One file of /dev/fuse, served many requests per wake-up, with no task, thread or stream per request.

The kernel's side of the protocol is include/uapi/linux/fuse.h (7.31 and later). A request is read with one readv: its
first 80 bytes, which are a whole write header, into one buffer, what follows into another, so that the data of a
write stands by itself. Answers leave with one write each, from wherever they come due.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import struct
from collections.abc import Callable
from typing import Final

import structlog
import trio

from engine.buffers import BufferPool
from engine.errors import FrontendError
from engine.frontend.base import BlockVolume
from engine.frontend.fuse_device import MAX_IO
from engine.ops import FLUSH, READ, UNMAP, WRITE, BlockRequest, Data
from engine.wire.frame import BULK

log = structlog.get_logger()

# Requests that are taken from the kernel before they are sent on: all that are there at once would keep the replicas
# idle while they are read, and the engine idle while they are carried out.
_BATCH: Final = 16
# Bytes of large writes that are read and not answered yet; what is more waits in the kernel. Read all at once, they
# would have left the processor's caches before they are summed and sent: 1.85 ms of system time for 1 MiB, not 1.1.
_MAX_BULK = 8 << 20
_MAX_BACKGROUND = 128
# a discard of a whole volume is cut into pieces, so many of which are on their way at a time
_UNMAP_PIECE = 1 << 20
_UNMAP_AT_ONCE = 16

_READ: Final = 15
_WRITE: Final = 16
_FSYNC: Final = 20
_FORGET, _GETATTR, _SETATTR, _OPEN, _STATFS, _RELEASE = 2, 3, 4, 14, 17, 18
_FLUSH, _INIT, _INTERRUPT, _DESTROY, _BATCH_FORGET, _FALLOCATE = 25, 26, 36, 38, 42, 43

# opcode and unique of fuse_in_header, then offset and size of what follows, as in fuse_read_in and fuse_write_in
_REQUEST = struct.Struct("<4xIQ32xQI")
_BODY = 40
_HEAD = 80
_OUT = struct.Struct("<IiQ")
_WRITE_OUT = struct.Struct("<IiQII")
_OPEN_OUT = struct.Struct("<QII")
_ATTR_OUT = struct.Struct("<QII6Q10I")
_STATFS_OUT = struct.Struct("<5Q4I24x")
_INIT_IN = struct.Struct("<5I")
_INIT_OUT = struct.Struct("<4I2H2I2HI28x")
_FALLOCATE_IN = struct.Struct("<3QII")

_MINOR = 38
_ASYNC_READ, _BIG_WRITES, _ASYNC_DIO, _MAX_PAGES = 1 << 0, 1 << 5, 1 << 15, 1 << 22
_WANTED = _ASYNC_READ | _BIG_WRITES | _ASYNC_DIO | _MAX_PAGES
# Linux 6.9: a server that takes over asks for what was read and not answered; those come with the top bit set
_INIT_EXT, _HAS_RESEND, _NOTIFY_RESEND = 1 << 30, 1 << 7, 7
_NOTIFY_INVAL_INODE = 2
_INVAL_INODE = struct.Struct("<IiQQqq")
_FOPEN_DIRECT_IO, _FOPEN_PARALLEL_DIRECT_WRITES = 1 << 0, 1 << 6
_FATTR_SIZE = 1 << 3
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 0x01, 0x02, 0x10


class _FuseRequest(BlockRequest):
    """One READ, WRITE or FSYNC of the kernel's."""

    __slots__ = ("session", "unique")

    def __init__(self, session: Session, unique: int, op: int, offset: int, length: int, payload: Data = b"") -> None:
        super().__init__(op, offset, length, payload)
        self.session = session
        self.unique = unique

    def finish(self, error: int, data: Data) -> None:
        session = self.session
        session.pending -= 1
        if error:
            _answer_error(session.fd, self.unique, error)
        elif self.op == WRITE:
            _send(session.fd, _WRITE_OUT.pack(24, 0, self.unique, self.length, 0))
        elif data:
            _send_with(session.fd, _OUT.pack(16 + len(data), 0, self.unique), data)
        else:
            _answer(session.fd, self.unique)


class _BulkWrite(_FuseRequest):
    """A WRITE whose payload is large enough to be left where it was read."""

    __slots__ = ()

    def finish(self, error: int, data: Data) -> None:
        super().finish(error, data)
        self.session.bulk_done(self.length)


class _Piece(BlockRequest):
    """A part of a discard."""

    __slots__ = ("discard",)

    def __init__(self, discard: _Discard, offset: int, length: int) -> None:
        super().__init__(UNMAP, offset, length)
        self.discard = discard

    def finish(self, error: int, data: Data) -> None:
        self.discard.piece_done(error)


class _Discard:
    """One FALLOCATE, answered when all its pieces are."""

    def __init__(self, fd: int, unique: int, volume: BlockVolume, offset: int, end: int) -> None:
        self._fd = fd
        self._unique = unique
        self._volume = volume
        self._next = offset
        self._end = end
        self._under_way = 0
        self._error = 0

    def start(self) -> None:
        while self._next < self._end and self._under_way < _UNMAP_AT_ONCE and not self._error:
            # pieces end where regions end, whatever the discard starts with
            length = min(_UNMAP_PIECE - self._next % _UNMAP_PIECE, self._end - self._next)
            piece = _Piece(self, self._next, length)
            self._next += length
            self._under_way += 1
            self._volume.submit(piece)

    def piece_done(self, error: int) -> None:
        self._under_way -= 1
        self._error = self._error or error
        self.start()
        if not self._under_way:
            if self._error:
                _answer_error(self._fd, self._unique, self._error)
            else:
                _answer(self._fd, self._unique)


# the kernel may have given the request up (ENOENT) or the connection (ENODEV): the reader learns of the latter


def _send(fd: int, answer: bytes) -> None:
    try:  # noqa: SIM105 - suppress() costs as much as the call
        os.write(fd, answer)
    except OSError:
        pass


def _send_with(fd: int, head: bytes, data: Data) -> None:
    try:  # noqa: SIM105
        os.writev(fd, (head, data))
    except OSError:
        pass


def forget_attributes(fd: int) -> None:
    """Have the kernel ask for the file's attributes again, and so for its size."""
    # ENOENT: it does not know the file yet; offset -1: attributes alone, nothing that could wait for us
    _send(fd, _INVAL_INODE.pack(_INVAL_INODE.size, _NOTIFY_INVAL_INODE, 0, 1, -1, 0))


def ask_again(fd: int) -> None:
    """Have the kernel send what was read by a process before this one and not answered. Raises FrontendError."""
    try:
        os.write(fd, _OUT.pack(_OUT.size, _NOTIFY_RESEND, 0))
    except OSError as error:
        raise FrontendError(f"the kernel does not send requests again: {error.strerror}") from error


def _answer(fd: int, unique: int, body: bytes = b"") -> None:
    _send(fd, _OUT.pack(16 + len(body), 0, unique) + body)


def _answer_error(fd: int, unique: int, code: int) -> None:
    _send(fd, _OUT.pack(16, -code, unique))


class Session:
    def __init__(self, volume: BlockVolume, fd: int, resumed: bool) -> None:
        self.ended = trio.Event()
        self.resumable = resumed
        self.pending = 0
        self._volume = volume
        self.fd = fd
        self._head = bytearray(_HEAD)
        # page-aligned, so that the kernel copies whole pages; a large payload stays where it is, and the next request
        # is read elsewhere
        self._pool = BufferPool(MAX_IO)
        self._bulk = 0
        self._data = self._pool.take()
        self._iov: list[bytearray | memoryview] = [self._head, self._data]
        self._rare: dict[int, Callable[[int], None]] = {
            _INIT: self._init,
            _GETATTR: self._getattr,
            _SETATTR: self._setattr,
            _OPEN: self._open,
            _STATFS: self._statfs,
            _FALLOCATE: self._fallocate,
            _RELEASE: self._nothing,
            # close(2) has nothing to say to a volume: after one ENOSYS the kernel does not ask again, and whoever
            # closes the file while no engine runs is not held up
            _FLUSH: self._unknown,
            _DESTROY: self._destroy,
        }

    def bulk_done(self, length: int) -> None:
        """A large payload is not needed any more."""
        paused = self._bulk >= _MAX_BULK
        self._bulk -= length
        if paused and self._bulk < _MAX_BULK and not self.ended.is_set():
            self._volume.poller.add(self.fd, self.readable, linger=True)

    def readable(self) -> None:
        self._drain()
        self._volume.kick()
        if self.ended.is_set():
            self._volume.poller.remove(self.fd)

    def _drain(self) -> None:
        fd, head, data, iov = self.fd, self._head, self._data, self._iov
        volume, size = self._volume, self._volume.size
        unpack, readv = _REQUEST.unpack_from, os.readv
        # who has one request at a time has no second one to be looked for
        left = _BATCH if self.pending else 1
        while left > 0:
            left -= 1
            try:
                readv(fd, iov)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.ENODEV:
                    self.ended.set()
                    return
                if error.errno in (errno.ENOENT, errno.EINTR):
                    continue
                raise
            opcode, unique, offset, length = unpack(head)
            if opcode == _WRITE:
                if offset + length > size:
                    _answer_error(fd, unique, errno.ENOSPC)
                elif length >= BULK:
                    self.pending += 1
                    volume.submit(_BulkWrite(self, unique, WRITE, offset, length, data[:length]))
                    data = self._data = iov[1] = self._pool.take()
                    self._bulk += length
                    # what is large is bounded by its bytes
                    left += left > 0
                    if self._bulk >= _MAX_BULK:
                        self._volume.poller.remove(fd)
                        return
                else:
                    self.pending += 1
                    volume.submit(_FuseRequest(self, unique, WRITE, offset, length, bytes(data[:length])))
            elif opcode == _READ:
                length = min(length, size - offset)
                if length <= 0:
                    _answer(fd, unique)
                else:
                    self.pending += 1
                    volume.submit(_FuseRequest(self, unique, READ, offset, length))
            elif opcode == _FSYNC:
                # never ENOSYS: the kernel would take every later flush for granted
                self.pending += 1
                volume.submit(_FuseRequest(self, unique, FLUSH, 0, 0))
            elif opcode in (_FORGET, _BATCH_FORGET, _INTERRUPT):
                # no answer is expected; an interrupted request is finished as any other
                continue
            else:
                self._rare.get(opcode, self._unknown)(unique)

    def _unknown(self, unique: int) -> None:
        _answer_error(self.fd, unique, errno.ENOSYS)

    def _nothing(self, unique: int) -> None:
        _answer(self.fd, unique)

    def _destroy(self, unique: int) -> None:
        _answer(self.fd, unique)
        self.ended.set()

    def _init(self, unique: int) -> None:
        major, minor, readahead, flags, flags2 = _INIT_IN.unpack_from(self._head, _BODY)
        if major != 7 or minor < 31:
            _answer_error(self.fd, unique, errno.EPROTO)
            raise FrontendError(f"the kernel speaks FUSE {major}.{minor}; 7.31 or later is needed")
        extended = flags & _INIT_EXT
        wanted2 = flags2 & _HAS_RESEND if extended else 0
        self.resumable = bool(wanted2)
        body = _INIT_OUT.pack(
            7,
            min(minor, _MINOR),
            readahead,
            flags & (_WANTED | _INIT_EXT),
            _MAX_BACKGROUND,
            _MAX_BACKGROUND * 3 // 4,
            MAX_IO,
            1,
            MAX_IO // mmap.PAGESIZE,
            0,
            wanted2,
        )
        _answer(self.fd, unique, body)

    def _attributes(self) -> bytes:
        size = self._volume.size
        times = (0, 0, 0)
        return _ATTR_OUT.pack(
            3600,
            0,
            0,
            1,
            size,
            size // 512,
            *times,
            0,
            0,
            0,
            stat.S_IFREG | 0o600,
            1,
            os.getuid(),
            os.getgid(),
            0,
            4096,
            0,
        )

    def _getattr(self, unique: int) -> None:
        _answer(self.fd, unique, self._attributes())

    def _setattr(self, unique: int) -> None:
        valid, _, _, size = struct.unpack_from("<IIQQ", self._head, _BODY)
        if valid & _FATTR_SIZE and size != self._volume.size:
            # a block device does not change its size by truncate
            _answer_error(self.fd, unique, errno.EPERM)
        else:
            _answer(self.fd, unique, self._attributes())

    def _open(self, unique: int) -> None:
        # no page cache in between: the loop driver would pay for a copy, and a stale page could outlive a resync
        _answer(self.fd, unique, _OPEN_OUT.pack(1, _FOPEN_DIRECT_IO | _FOPEN_PARALLEL_DIRECT_WRITES, 0))

    def _statfs(self, unique: int) -> None:
        blocks = self._volume.size // 4096
        _answer(self.fd, unique, _STATFS_OUT.pack(blocks, 0, 0, 0, 0, 4096, 255, 4096, 0))

    def _fallocate(self, unique: int) -> None:
        _, offset, length, mode, _ = _FALLOCATE_IN.unpack_from(self._head, _BODY)
        # an unmapped range reads as zeros, so both kinds are one
        if mode not in (_PUNCH_HOLE | _KEEP_SIZE, _ZERO_RANGE | _KEEP_SIZE):
            _answer_error(self.fd, unique, errno.EOPNOTSUPP)
            return
        end = min(offset + length, self._volume.size)
        if end <= offset:
            _answer(self.fd, unique)
            return
        _Discard(self.fd, unique, self._volume, offset, end).start()
