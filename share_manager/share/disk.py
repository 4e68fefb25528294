"""Room on the disk below the replicas."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable
from pathlib import Path

import trio

from share_manager.errors import DiskError
from share_manager.events import Reporter

_FULL = 4 << 20
_LOW = 256 << 20
_INTERVAL = 10.0


def free_bytes(directory: Path) -> int:
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize


def known_free_bytes(directory: Path) -> int | None:
    """The same; None when the directory is gone or cannot be reached, which is not for us to fail of."""
    with contextlib.suppress(OSError):
        return free_bytes(directory)
    return None


def is_full(directory: Path) -> bool:
    return free_bytes(directory) < _FULL


def full_disk(directories: Iterable[Path]) -> Path | None:
    """The first of these that is on a full disk."""
    for directory in directories:
        with contextlib.suppress(OSError):
            if is_full(directory):
                return directory
    return None


def disk_full(directory: Path) -> DiskError:
    return DiskError(directory, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


async def watch_disk(directory: Path, report: Reporter) -> None:
    """Say so when the disk below the replicas runs full: clients then get ENOSPC from a volume that is not full."""
    low = False
    while True:
        free = known_free_bytes(directory)
        if free is None:
            await trio.sleep(_INTERVAL)
            continue
        if free < _LOW and not low:
            message = f"only {free >> 20} MiB free in {directory}: clients get errors when it is full; free some space"
            report.warn("disk_low", message, free_bytes=free, data_dir=str(directory))
        elif free > 2 * _LOW and low:
            report.emit("disk_ok", f"{free >> 20} MiB free in {directory}", free_bytes=free, data_dir=str(directory))
        low = free < _LOW or (low and free <= 2 * _LOW)
        await trio.sleep(_INTERVAL)
