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
    APPEND = "append"
    STREAM = "stream"


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


SMALL, LARGE = 4 << 10, 128 << 10
CELLS = tuple(
    Cell(pattern, size, depth, operation)
    for pattern, size in ((Pattern.RANDOM, SMALL), (Pattern.SEQUENTIAL, LARGE))
    for depth in (1, 32)
    for operation in Operation
)
# an fsync behind every write leaves little to a queue: that is what a quick run goes without
QUICK_CELLS = tuple(cell for cell in CELLS if cell.depth == 1 or cell.operation is not Operation.WRITE_FSYNC)
