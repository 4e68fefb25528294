"""What is measured, and what a measurement gives. Values only."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Operation(StrEnum):
    READ = "read"
    WRITE = "write"
    WRITE_FSYNC = "write+fsync"


class Pattern(StrEnum):
    RANDOM = "random"
    SEQUENTIAL = "sequential"


class Cell(msgspec.Struct, frozen=True):
    """One way to load a block target. `block_size` in bytes, `depth` in requests kept outstanding."""

    pattern: Pattern
    block_size: int
    depth: int
    operation: Operation


class Workload(StrEnum):
    """One way to load a directory."""

    CREATE = "create"
    CREATE_CLOSE = "create+close"
    APPEND = "append"
    OVERWRITE = "overwrite"
    STREAM = "stream"


LOCAL_WORKLOADS = (Workload.CREATE, Workload.APPEND, Workload.STREAM)
NFS_WORKLOADS = (Workload.STREAM, Workload.OVERWRITE, Workload.APPEND, Workload.CREATE_CLOSE)


class Sample(msgspec.Struct, frozen=True):
    """One measurement of one cell or workload.

    `cpu_us` is processor time of the server's processes per operation, None when no process serves the target (the
    kernel's own threads are not counted). `latency_us` is of one request, with its fsync if it has one; `p99_us` is
    given for requests without.
    """

    operations: int
    per_second: float
    bytes_per_second: float
    cpu_us: float | None = None
    latency_us: float | None = None
    p99_us: float | None = None


class FlushSample(msgspec.Struct, frozen=True):
    """Mean times in microseconds.

    `plain_us`: a 4 KiB write and fdatasync on as many plain files as there are replicas, all at once, the slowest
    counting. `round_trip_us`: 4 KiB there and back over TCP on loopback. `engine_us`: a 4 KiB write and fsync on the
    engine's loop device.
    """

    plain_us: float
    round_trip_us: float
    engine_us: float

    @property
    def expected_us(self) -> float:
        return self.plain_us + self.round_trip_us


SMALL, LARGE = 4 << 10, 128 << 10
CELLS = tuple(
    Cell(pattern, size, depth, operation)
    for pattern, size in ((Pattern.RANDOM, SMALL), (Pattern.SEQUENTIAL, LARGE))
    for depth in ((1, 32) if size == SMALL else (1, 8))
    for operation in Operation
)
FLUSH_CELL = Cell(Pattern.RANDOM, SMALL, 1, Operation.WRITE_FSYNC)
# an fsync behind every write leaves little to a queue: that is what a quick run goes without
QUICK_CELLS = tuple(cell for cell in CELLS if cell.depth == 1 or cell.operation is not Operation.WRITE_FSYNC)
