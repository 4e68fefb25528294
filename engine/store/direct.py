"""Whether an image can be read and written past the page cache (O_DIRECT, open(2)), and how it is opened so."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from pathlib import Path

# The least alignment that is used. Smaller ones, where a disk offers them, make ext4 take its lock exclusively.
ALIGN = 4096

_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000  # linux/stat.h, since Linux 6.1
_MASK = struct.Struct("=I")
_ALIGNMENTS = struct.Struct("=II")  # stx_dio_mem_align, stx_dio_offset_align
_ALIGNMENTS_AT = 152

_CACHESTAT = 451  # of every architecture, since Linux 6.5; man page cachestat(2)
PAGE = 4096
READ_AHEAD = 64 << 10

_libc = ctypes.CDLL(None, use_errno=True)


def _alignments(fd: int) -> tuple[int, int] | None:
    """Of memory and of offsets, zeros where direct I/O does not work; None when the system does not say."""
    if not hasattr(_libc, "statx"):
        return None
    found = ctypes.create_string_buffer(256)
    if _libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, found):
        return None
    if not _MASK.unpack_from(found)[0] & _STATX_DIOALIGN:
        return None
    memory, offset = _ALIGNMENTS.unpack_from(found, _ALIGNMENTS_AT)
    return memory, offset


def _fits(alignment: int) -> bool:
    return alignment > 0 and ALIGN % alignment == 0


def open_direct(image: Path, *, insist: bool) -> int:
    """A descriptor for aligned reads and writes past the page cache, or -1 where that is not known to work.

    Not known means: Linux before 6.1, or a file system (tmpfs, some stacked ones) that takes the flag and ignores it.
    With `insist` the flag and one read that succeeds are enough. Raises OSError; with `insist` also for "not here".
    """
    try:
        fd = os.open(image, os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT)
    except OSError as error:
        if insist or error.errno != errno.EINVAL:
            raise
        return -1
    try:
        if insist:
            with mmap.mmap(-1, ALIGN) as block:
                os.preadv(fd, [block], 0)
            return fd
        alignments = _alignments(fd)
    except OSError:
        os.close(fd)
        raise
    if alignments is None or not all(map(_fits, alignments)):
        os.close(fd)
        return -1
    return fd


class Cache:
    """What of an image is in the page cache, and reading only that.

    A small read with RWF_NOWAIT alone would not do: where it finds nothing it starts to read ahead, so that whoever
    then reads past the cache has the disk read twice. A large one is likely part of a sequence and wants just that: on
    a cold file it doubles the rate of 128 KiB reads at depth 8.
    """

    def __init__(self, fd: int, largest: int) -> None:
        """Raises OSError: this kernel cannot tell. `largest` is the length of the longest read."""
        self._fd = fd
        self._memory = mmap.mmap(-1, largest)
        self._view = memoryview(self._memory)
        self._range = (ctypes.c_uint64 * 2)()
        self._found = (ctypes.c_uint64 * 5)()  # cached, dirty, under writeback, evicted, evicted lately
        self._call = (
            ctypes.c_long(_CACHESTAT),
            ctypes.c_long(fd),
            ctypes.byref(self._range),
            ctypes.byref(self._found),
            ctypes.c_long(0),
        )
        self._range[1] = PAGE
        if _libc.syscall(*self._call):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def read(self, offset: int, length: int) -> bytes | None:
        """None when the disk would be needed for it. Raises OSError."""
        self._range[0], self._range[1] = offset, length
        if length < READ_AHEAD and (
            _libc.syscall(*self._call) or self._found[0] <= (offset + length - 1) // PAGE - offset // PAGE
        ):
            return None
        try:
            if os.preadv(self._fd, (self._view[:length],), offset, os.RWF_NOWAIT) != length:
                return None
        except BlockingIOError:
            return None
        return self._memory[:length]
