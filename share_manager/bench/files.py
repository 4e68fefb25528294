"""Load for a directory, as small files and logs make it: every operation ends on stable storage.

Stdlib only: clients on other machines run this file with whatever Python they have.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

SMALL, CHUNK = 4 << 10, 1 << 20
OVERWRITTEN = 16 << 20
STOP_INTERVAL = 0.1  # s: asking costs a client that is slow at system calls something


class Load(NamedTuple):
    """What was done: operations, the seconds that they took, the bytes written in them."""

    operations: int
    seconds: float
    bytes: int


Stopped = Callable[[], bool]


def _until(seconds: float, step: Callable[[int], None], stopped: Stopped) -> tuple[int, float]:
    """How often `step` ran in `seconds`, and the seconds that passed."""
    started = time.monotonic()
    asked = 0.0
    for count in itertools.count():
        passed = time.monotonic() - started
        if passed >= seconds:
            return count, passed
        if passed - asked >= STOP_INTERVAL:
            asked = passed
            if stopped():
                return count, passed
        step(count)
    raise AssertionError("unreachable")


def create(directory: Path, seconds: float, stopped: Stopped, sync: bool) -> Load:
    """Create, write 4 KiB, with `sync` fsync, close. On NFS the close alone brings the data to the server's disk."""
    body = os.urandom(SMALL)

    def step(number: int) -> None:
        fd = os.open(directory / f"{number:08}", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            os.write(fd, body)
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)

    count, passed = _until(seconds, step, stopped)
    return Load(count, passed, count * SMALL)


def append(directory: Path, seconds: float, stopped: Stopped) -> Load:
    """Append 4 KiB to one open file and fsync."""
    body = os.urandom(SMALL)
    fd = os.open(directory / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def step(_: int) -> None:
        os.write(fd, body)
        os.fsync(fd)

    try:
        count, passed = _until(seconds, step, stopped)
    finally:
        os.close(fd)
    return Load(count, passed, count * SMALL)


def overwrite(directory: Path, seconds: float, stopped: Stopped) -> Load:
    """Write 4 KiB somewhere in a file that was written before, and fsync."""
    body = os.urandom(SMALL)
    fd = os.open(directory / "pages", os.O_RDWR | os.O_CREAT)
    places = random.Random(0)

    def step(_: int) -> None:
        os.pwrite(fd, body, places.randrange(OVERWRITTEN // SMALL) * SMALL)
        os.fsync(fd)

    try:
        for offset in range(0, OVERWRITTEN, CHUNK):
            os.pwrite(fd, os.urandom(CHUNK), offset)
        os.fsync(fd)
        count, passed = _until(seconds, step, stopped)
    finally:
        os.close(fd)
    return Load(count, passed, count * SMALL)


def stream(directory: Path, seconds: float, stopped: Stopped, limit: int) -> Load:
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
        count, _ = _until(seconds, step, stopped)
        os.fsync(fd)
        passed = time.monotonic() - started
    finally:
        os.close(fd)
    return Load(count, passed, count * CHUNK)


def load(workload: str, directory: Path, seconds: float, size: int, stopped: Stopped) -> Load:
    """Run one workload (a value of `Workload`) in a directory of its own, on a filesystem of about `size` bytes.

    `stopped` is asked ten times a second whether to end early; then the files stay. Raises OSError.
    """
    loads: dict[str, Callable[[Path], Load]] = {
        "create": lambda place: create(place, seconds, stopped, sync=True),
        "create+close": lambda place: create(place, seconds, stopped, sync=False),
        "append": lambda place: append(place, seconds, stopped),
        "overwrite": lambda place: overwrite(place, seconds, stopped),
        "stream": lambda place: stream(place, seconds, stopped, size // 4),
    }
    place = directory / workload
    place.mkdir()
    try:
        return loads[workload](place)
    finally:
        # who is stopped loses the whole filesystem next, faster than thousands of files are removed from it
        if not stopped():
            for entry in place.iterdir():
                entry.unlink()
            place.rmdir()
