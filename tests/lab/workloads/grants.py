"""What a server that has just started gives to whoever asks for something new: an open, and a lock that another had."""

from __future__ import annotations

import os
import time

from tests.lab.workloads import locks


def opened(path: str) -> float:
    """When a new file could be made and opened, in seconds since 1970."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    done = time.time()
    os.close(fd)
    return done


def locked(path: str, patience: float = 180.0) -> float:
    """When a lock of the whole file could be had (released at once). Raises TimeoutError after `patience` seconds."""
    fd = os.open(path, os.O_RDWR)
    try:
        locks.acquire(fd, patience, interval=0.05)
        done = time.time()
        locks.release(fd)
    finally:
        os.close(fd)
    return done
