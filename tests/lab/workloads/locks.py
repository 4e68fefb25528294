"""Byte-range locks, from one client and against another."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
from typing import Any, TypedDict

from tests.lab.workloads import channel

FLOCK = struct.Struct("hhqqi4x")


class Watched(TypedDict):
    denied: int
    violations: list[dict[str, Any]]
    errors: list[dict[str, Any]]


def _flock(kind: int, start: int, length: int) -> bytes:
    return FLOCK.pack(kind, os.SEEK_SET, start, length, 0)


def _holder(fd: int, start: int, length: int) -> int:
    """F_GETLK: the kind of lock that stands in the way of an exclusive one, F_UNLCK for none."""
    answer = fcntl.fcntl(fd, fcntl.F_GETLK, _flock(fcntl.F_WRLCK, start, length))
    return int(FLOCK.unpack(answer)[0])


def _try(fd: int, start: int, length: int, kind: int = fcntl.F_WRLCK) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_SETLK, _flock(kind, start, length))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def probe(path: str, start: int = 0, length: int = 0) -> dict[str, bool]:
    """Whether others hold the range: what F_GETLK says, and what an attempt to take it says (released at once)."""
    fd = os.open(path, os.O_RDWR)
    try:
        said = _holder(fd, start, length) != fcntl.F_UNLCK
        taken = _try(fd, start, length)
        if taken:
            fcntl.fcntl(fd, fcntl.F_SETLK, _flock(fcntl.F_UNLCK, start, length))
        return {"getlk": said, "setlk": not taken}
    finally:
        os.close(fd)


def watch(path: str, start: int = 0, length: int = 0, interval: float = 0.1) -> Watched:
    """Try a range that others hold again and again until told to stop. Emits `violation` when it could be taken."""
    watched: Watched = {"denied": 0, "violations": [], "errors": []}
    fd = os.open(path, os.O_RDWR)
    channel.emit("watching")
    while not channel.stopping(interval):
        began = time.time()
        try:
            said = _holder(fd, start, length) != fcntl.F_UNLCK
            taken = _try(fd, start, length)
            if taken:
                fcntl.fcntl(fd, fcntl.F_SETLK, _flock(fcntl.F_UNLCK, start, length))
        except OSError as error:
            watched["errors"].append({"errno": error.errno, "time": began})
            continue
        if said and not taken:
            watched["denied"] += 1
        else:
            watched["violations"].append({"getlk": said, "taken": taken, "time": began})
            channel.emit("violation", taken=taken)
    os.close(fd)
    return watched


def hold(path: str, start: int = 0, length: int = 0, shared: bool = False) -> float:
    """Take the range (waiting for it), emit `held`, keep it until told to stop. How long it took to get, in seconds."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    began = time.monotonic()
    channel.emit("asking")
    fcntl.fcntl(fd, fcntl.F_SETLKW, _flock(fcntl.F_RDLCK if shared else fcntl.F_WRLCK, start, length))
    took = time.monotonic() - began
    channel.emit("held", seconds=took)
    while not channel.stopping(1.0):
        pass
    fcntl.fcntl(fd, fcntl.F_SETLK, _flock(fcntl.F_UNLCK, start, length))
    os.close(fd)
    return took


def try_shared(path: str, start: int = 0, length: int = 0) -> bool:
    """Whether a shared lock on the range can be had now (released at once)."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return _try(fd, start, length, fcntl.F_RDLCK)
    finally:
        os.close(fd)


def acquire(fd: int, patience: float = 60.0, interval: float = 0.004) -> None:
    """Lock the whole file by asking again and again: the kernel's own waiting asks only every 1 to 30 seconds."""
    end = time.monotonic() + patience
    while not _try(fd, 0, 0):
        if time.monotonic() > end:
            raise TimeoutError(f"no lock in {patience} s")
        time.sleep(interval)


def release(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_SETLK, _flock(fcntl.F_UNLCK, 0, 0))


def count(path: str, rounds: int, locked: bool = True, think: float = 0.0) -> int:
    """Add one to the number in the file, `rounds` times, each under the lock. The last number written.

    Thinks `think` seconds between reading and writing. Without the lock, which is how the lab proves that it
    notices, two counters lose each other's additions.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    number = 0
    for _ in range(rounds):
        if locked:
            acquire(fd)
        number = int(os.pread(fd, 32, 0).strip() or b"0") + 1
        time.sleep(think)
        os.pwrite(fd, b"%020d\n" % number, 0)
        if locked:
            release(fd)
        else:
            os.fsync(fd)
    os.close(fd)
    return number


class Added(TypedDict):
    added: int
    errors: list[dict[str, Any]]


def add(path: str, pause: float = 0.05, patience: float = 120.0) -> Added:
    """Add one to the number in the file until told to stop, each time under the lock that others want as well. How
    often, which is what the number must have grown by. Emits `adding` after the first."""
    made: Added = {"added": 0, "errors": []}
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    while not channel.stopping(pause):
        try:
            acquire(fd, patience, interval=0.02)
            number = int(os.pread(fd, 32, 0).strip() or b"0") + 1
            os.pwrite(fd, b"%020d\n" % number, 0)
            os.fsync(fd)
            release(fd)
        except OSError as error:
            made["errors"].append({"errno": error.errno, "added": made["added"], "time": time.time()})
            break
        made["added"] += 1
        if made["added"] == 1:
            channel.emit("adding")
    os.close(fd)
    return made


def rename_and_hold(old: str, new: str) -> None:
    """Make a file, give it another name, lock it, emit `held`, and keep it until told to stop."""
    fd = os.open(old, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    os.rename(old, new)
    fcntl.fcntl(fd, fcntl.F_SETLK, _flock(fcntl.F_WRLCK, 0, 0))
    channel.emit("held")
    while not channel.stopping(1.0):
        pass
    release(fd)
    os.close(fd)
