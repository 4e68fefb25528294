"""Several writers append lines to one file, as the pods of a deployment do with a log that they share."""

from __future__ import annotations

import os
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Any, TypedDict

from tests.lab.workloads import channel, locks


class Written(TypedDict):
    lines: int
    errors: list[dict[str, Any]]
    longest: float


def line(writer: str, number: int) -> bytes:
    body = f"{writer} {number:06d} ".encode() + b"x" * (20 + (number * 37) % 400)
    return body + b" %08x\n" % zlib.crc32(body)


def write(path: str, writer: str, count: int, pieces: bool = False, pause: float = 0.0) -> Written:
    """Append `count` lines (0: until told to stop), each under a lock of the whole file.

    `pieces` writes each line in three parts at the end that the lock holder sees; otherwise O_APPEND and one write.
    Emits `writing` after the first line.
    """
    errors: list[dict[str, Any]] = []
    number = 0
    longest = 0.0
    fd = os.open(path, os.O_RDWR | os.O_CREAT | (0 if pieces else os.O_APPEND), 0o644)
    while (number < count) if count else not channel.stopping(pause):
        began = time.monotonic()
        data = line(writer, number)
        try:
            locks.acquire(fd)
            try:
                if pieces:
                    os.lseek(fd, 0, os.SEEK_END)
                    third = len(data) // 3
                    for part in (data[:third], data[third : 2 * third], data[2 * third :]):
                        os.write(fd, part)
                else:
                    os.write(fd, data)
                os.fsync(fd)
            finally:
                locks.release(fd)
        except OSError as error:
            errors.append({"errno": error.errno, "number": number, "time": time.time()})
            break
        longest = max(longest, time.monotonic() - began)
        number += 1
        if number == 1:
            channel.emit("writing")
    os.close(fd)
    return {"lines": number, "errors": errors, "longest": round(longest, 3)}


def verify(path: str, written: dict[str, int]) -> list[str]:
    """What is wrong with the file, when each writer wrote that many lines (up to ten complaints)."""
    content = Path(path).read_bytes()
    found = Counter(content.splitlines(keepends=True))
    wanted = {line(writer, number) for writer, count in written.items() for number in range(count)}
    complaints = [f"missing: {text[:40]!r}" for text in sorted(wanted - found.keys())]
    complaints += [f"not a line of anybody: {text[:60]!r}" for text in found if text not in wanted]
    complaints += [f"{times} times: {text[:40]!r}" for text, times in found.items() if times > 1]
    return complaints[:10]
