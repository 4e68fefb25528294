"""Full volumes, unstable writes, and what the client counted on the wire."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import random
from pathlib import Path
from typing import Any

from tests.lab.workloads import channel

BLOCK = 1 << 20
SYNC_FILE_RANGE_WAIT_AFTER = 4


def fill(path: str, most: int) -> dict[str, Any]:
    """Write into one file until the volume is full or `most` bytes are there. What ended it, and how far it came."""
    written = 0
    block = os.urandom(BLOCK)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    number = 0
    try:
        while written < most:
            written += os.write(fd, block)
            if written % (16 * BLOCK) == 0:
                os.fsync(fd)
        os.fsync(fd)
    except OSError as error:
        number = error.errno or -1
    try:
        os.close(fd)
    except OSError as error:
        number = number or error.errno or -1
    return {"errno": errno.errorcode.get(number, str(number)), "written": written, "size": os.stat(path).st_size}


def space(path: str) -> dict[str, int]:
    found = os.statvfs(path)
    return {"size": found.f_blocks * found.f_frsize, "free": found.f_bavail * found.f_frsize}


def counted(mountpoint: str) -> dict[str, int]:
    """How many operations of each kind the client has sent for this mount."""
    operations: dict[str, int] = {}
    mine = False
    for text in Path("/proc/self/mountstats").read_text().splitlines():
        if text.startswith("device "):
            mine = f" mounted on {mountpoint} " in text
        elif mine and text.startswith("\t"):
            name, _, rest = text.strip().partition(": ")
            if name.isupper() and rest:
                operations[name] = int(rest.split()[0])
    return operations


def unstable(path: str, mountpoint: str, seed: int, size: int) -> dict[str, Any]:
    """Write `size` bytes that the server answers but is not asked to keep; when told to, fsync.

    Emits `pushed` with the operations counted so far, once every write is answered. Needs a mount with `write=eager`:
    otherwise the client sends a COMMIT as soon as it has written. Its periodic writeback, which would do the same, is
    put off meanwhile (0 would mean at once).
    """
    lazy = {"dirty_writeback_centisecs": "60000", "dirty_background_ratio": "80", "dirty_ratio": "90"}
    usual = {name: Path("/proc/sys/vm", name).read_text() for name in lazy}
    try:
        for name, value in lazy.items():
            Path("/proc/sys/vm", name).write_text(value)
        return _unstable(path, mountpoint, seed, size)
    finally:
        for name, value in usual.items():
            Path("/proc/sys/vm", name).write_text(value)


def _unstable(path: str, mountpoint: str, seed: int, size: int) -> dict[str, Any]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    chance = random.Random(seed)
    data = b"".join(chance.randbytes(BLOCK) for _ in range(size // BLOCK))
    for _ in range(8):
        before = counted(mountpoint)
        # in one piece: a write that fits into one WRITE would be sent as a stable one
        os.pwrite(fd, data, 0)
        _wait(fd)
        pushed = counted(mountpoint)
        if pushed["COMMIT"] == before["COMMIT"]:
            break
        os.fsync(fd)
    else:
        raise RuntimeError("the client sent a COMMIT by itself each time")
    channel.emit("pushed", before=before, after=pushed)
    while not channel.stopping(1.0):
        pass
    os.fsync(fd)
    after = counted(mountpoint)
    os.close(fd)
    return {"before": before, "pushed": pushed, "after": after}


def _wait(fd: int) -> None:
    """Wait for the answers to what is under way."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.sync_file_range(fd, ctypes.c_long(0), ctypes.c_long(0), SYNC_FILE_RANGE_WAIT_AFTER) != 0:
        raise OSError(ctypes.get_errno(), "sync_file_range")


def expected_digest(seed: int, size: int) -> str:
    """The SHA-256 of what `unstable` writes."""
    chance = random.Random(seed)
    found = hashlib.sha256()
    for _ in range(size // BLOCK):
        found.update(chance.randbytes(BLOCK))
    return found.hexdigest()
