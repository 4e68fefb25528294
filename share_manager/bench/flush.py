"""What a write that must be on N disks costs without an engine: N plain files at once, and a round trip to them."""

from __future__ import annotations

import mmap
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from share_manager.bench import echo
from share_manager.bench.files import SMALL

# of each plain file, and what of the engine's is written: the same reach of the disk for both
SPAN = 64 << 20

Stopped = Callable[[], bool]


@dataclass(frozen=True)
class FlushTarget:
    """`replicas` plain files against the block target `device`."""

    name: str
    title: str
    replicas: int
    device: str


FLUSH_TARGETS = (
    FlushTarget("fsync-1", "4k write+fsync: engine-1 against a plain file's fdatasync", 1, "engine-1"),
    FlushTarget("fsync-3", "4k write+fsync: engine-3 against three concurrent fdatasyncs", 3, "engine-3"),
)


def plain_files(directory: Path, count: int) -> list[Path]:
    """That many new files of `SPAN` bytes, every block written. Raises OSError."""
    paths = [directory / f"fsync-{number}.img" for number in range(1, count + 1)]
    chunk = os.urandom(1 << 20)
    for path in paths:
        with path.open("wb") as file:
            for _ in range(SPAN // len(chunk)):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
    return paths


def plain_us(paths: Sequence[Path], seconds: float, stopped: Stopped) -> float:
    """Mean over rounds of the slowest of the files: a 4 KiB O_DIRECT write and its fdatasync on each at once.

    Each file's time is its own thread's, so that what the threads need to start together is not in it. Raises OSError.
    """
    slowest: list[float] = []
    times = [0.0] * len(paths)
    end = time.monotonic() + seconds
    over = False
    barrier = threading.Barrier(len(paths))
    failed: list[OSError] = []

    def work(index: int) -> None:
        nonlocal over
        try:
            with mmap.mmap(-1, SMALL) as block:
                block.write(os.urandom(SMALL))
                places = random.Random(index)
                fd = os.open(paths[index], os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
                try:
                    while True:
                        offset = places.randrange(SPAN // SMALL) * SMALL
                        # all are through; the first thread, which is the caller's, sums up and decides; all go on
                        barrier.wait()
                        if index == 0:
                            if times[0]:
                                slowest.append(max(times))
                            over = time.monotonic() >= end or stopped()
                        barrier.wait()
                        if over:
                            return
                        began = time.perf_counter()
                        os.pwrite(fd, block, offset)
                        os.fdatasync(fd)
                        times[index] = time.perf_counter() - began
                finally:
                    os.close(fd)
        except threading.BrokenBarrierError:
            pass
        except OSError as error:
            failed.append(error)
            barrier.abort()
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=work, args=(index,)) for index in range(1, len(paths))]
    for thread in threads:
        thread.start()
    try:
        work(0)
    finally:
        for thread in threads:
            thread.join()
    if failed:
        raise failed[0]
    if not slowest:
        raise OSError("not one write was done in time")
    return statistics.fmean(slowest) * 1e6


def round_trip_us(seconds: float, stopped: Stopped) -> float:
    """Mean of 4 KiB there and back over TCP on loopback, between two processes. Raises OSError."""
    # by its path: as a module it would import the whole package first
    argv = [sys.executable, echo.__file__]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            port = process.stdout.readline()
            if not port:
                raise OSError("the echo did not start")
            with socket.create_connection(("127.0.0.1", int(port))) as connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                frame = memoryview(bytearray(echo.FRAME))
                count, began = 0, time.perf_counter()
                while (passed := time.perf_counter() - began) < seconds and not (count % 100 == 0 and stopped()):
                    connection.sendall(frame)
                    if not echo.exactly(connection, frame):
                        raise OSError("the echo ended")
                    count += 1
        finally:
            process.kill()
    if not count:
        raise OSError("not one round trip was done in time")
    return passed / count * 1e6
