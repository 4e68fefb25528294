"""Load for a directory, as small files and logs make it: every operation ends on stable storage."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path

import trio

from share_manager.bench.model import SMALL, Sample, Workload

CHUNK = 1 << 20


def _until(seconds: float, step: Callable[[int], None]) -> tuple[int, float]:
    """How often `step` ran in `seconds`, and the seconds that passed. Called in a worker thread of trio."""
    started = time.monotonic()
    for count in itertools.count():
        passed = time.monotonic() - started
        if passed >= seconds:
            return count, passed
        trio.from_thread.check_cancelled()
        step(count)
    raise AssertionError("unreachable")


def create(directory: Path, seconds: float) -> Sample:
    """Create, write 4 KiB, fsync, close: files a second."""
    body = os.urandom(SMALL)

    def step(number: int) -> None:
        fd = os.open(directory / f"{number:08}", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            os.write(fd, body)
            os.fsync(fd)
        finally:
            os.close(fd)

    count, passed = _until(seconds, step)
    return Sample(count, count / passed, count * SMALL / passed)


def append(directory: Path, seconds: float) -> Sample:
    """Append 4 KiB to one open file and fsync: appends a second."""
    body = os.urandom(SMALL)
    fd = os.open(directory / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def step(_: int) -> None:
        os.write(fd, body)
        os.fsync(fd)

    try:
        count, passed = _until(seconds, step)
    finally:
        os.close(fd)
    return Sample(count, count / passed, count * SMALL / passed)


def stream(directory: Path, seconds: float, limit: int) -> Sample:
    """Write 1 MiB after another, over and over within `limit` bytes, and fsync at the end: that is inside the time."""
    body = os.urandom(CHUNK)
    room = max(limit // CHUNK, 1)
    fd = os.open(directory / "stream", os.O_WRONLY | os.O_CREAT)

    def step(number: int) -> None:
        # once round is on stable storage before it is written again, or the page cache would swallow the second round
        if number and number % room == 0:
            os.fsync(fd)
        os.pwrite(fd, body, number % room * CHUNK)

    try:
        started = time.monotonic()
        count, _ = _until(seconds, step)
        os.fsync(fd)
        passed = time.monotonic() - started
    finally:
        os.close(fd)
    return Sample(count, count / passed, count * CHUNK / passed)


def load(workload: Workload, directory: Path, seconds: float, size: int) -> Sample:
    """Run one workload in a directory of its own, on a filesystem of about `size` bytes. Raises OSError."""
    place = directory / str(workload)
    place.mkdir()
    try:
        if workload is Workload.CREATE:
            return create(place, seconds)
        if workload is Workload.APPEND:
            return append(place, seconds)
        return stream(place, seconds, size // 4)
    finally:
        for entry in place.iterdir():
            entry.unlink()
        place.rmdir()
