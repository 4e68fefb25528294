"""The workload of the kill tests: hold a byte-range lock, append numbered records, fsync each.

A record counts as acknowledged when its fsync has returned; that is logged in the guest's own memory, never on the
share. Nothing here retries on behalf of the server: every errno is reported.
"""

from __future__ import annotations

import fcntl
import os
import time
import zlib
from pathlib import Path
from typing import Any, TypedDict

from tests.lab.workloads import channel

RECORD = 128
GAP = 0.3
PROGRESS = 0.5
MOST_ERRORS = 20


class Gap(TypedDict):
    """No record was acknowledged between `start` and `end`, in seconds of the wall clock."""

    start: float
    end: float
    sequence: int


class Outcome(TypedDict):
    acknowledged: int
    gaps: list[Gap]
    errors: list[dict[str, Any]]
    median_ms: float
    seconds: float


def record(tag: str, sequence: int, size: int = RECORD) -> bytes:
    head = f"{tag} {sequence:010d} ".encode()
    body = head + bytes(33 + (sequence * 7 + i) % 90 for i in range(size - len(head) - 10))
    return body + b" %08x\n" % zlib.crc32(body)


def append(path: str, tag: str = "record", least: int = 10, pause: float = 0.01) -> Outcome:
    """Append until told to stop, at least `least` records. Pauses `pause` seconds after each: without, an appender and
    what it keeps busy take both cores from what is tested.

    Emits `running` after the first acknowledged record, `progress` about twice a second, `error` at each errno.
    """
    gaps: list[Gap] = []
    errors: list[dict[str, Any]] = []
    times: list[float] = []
    sequence = 0

    def failed(operation: str, error: OSError) -> None:
        errors.append({"operation": operation, "errno": error.errno, "sequence": sequence, "time": time.time()})
        channel.emit("error", **errors[-1])

    log = Path("/run/work", f"acknowledged-{os.getpid()}")
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    with log.open("w", buffering=1) as acknowledged:
        fcntl.lockf(fd, fcntl.LOCK_EX)
        started = last = told = time.time()
        while (not channel.stopping(pause) or sequence < least) and len(errors) < MOST_ERRORS:
            try:
                os.pwrite(fd, record(tag, sequence), sequence * RECORD)
                os.fsync(fd)
            except OSError as error:
                failed("append", error)
                time.sleep(0.2)
                continue
            now = time.time()
            times.append(now - last)
            if now - last > GAP and sequence > 0:
                gaps.append({"start": last, "end": now, "sequence": sequence})
            last = now
            acknowledged.write(f"{sequence} {now:.3f}\n")
            sequence += 1
            if sequence == 1:
                channel.emit("running")
            if now - told > PROGRESS:
                channel.emit("progress", time=now, sequence=sequence)
                told = now
        for operation, action in (("unlock", lambda: fcntl.lockf(fd, fcntl.LOCK_UN)), ("close", lambda: os.close(fd))):
            try:
                action()
            except OSError as error:
                failed(operation, error)
    log.unlink()
    times.sort()
    median = times[len(times) // 2] * 1000 if times else 0.0
    return {
        "acknowledged": sequence,
        "gaps": gaps,
        "errors": errors,
        "median_ms": round(median, 2),
        "seconds": round(time.time() - started, 2),
    }


def verify(path: str, acknowledged: int, tag: str = "record") -> list[str]:
    """What is wrong with the file, when that many records were acknowledged (up to ten complaints).

    One record more may be there: written, its acknowledgement not seen.
    """
    return verify_bytes(Path(path).read_bytes(), acknowledged, tag)


def verify_bytes(content: bytes, acknowledged: int, tag: str = "record") -> list[str]:
    complaints = []
    if len(content) < acknowledged * RECORD:
        complaints.append(f"{len(content)} bytes, {acknowledged} records of {RECORD} were acknowledged")
    if len(content) > (acknowledged + 1) * RECORD:
        complaints.append(f"{len(content)} bytes, more than were ever written")
    for sequence in range(acknowledged):
        found = content[sequence * RECORD : (sequence + 1) * RECORD]
        if found != record(tag, sequence):
            complaints.append(f"acknowledged record {sequence} is {found[:40]!r}")
            if len(complaints) >= 10:
                break
    return complaints
