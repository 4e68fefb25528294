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
