"""Counts and latencies per operation."""

from __future__ import annotations

from bisect import bisect_left

from engine.client import LATENCY_BOUNDS, OperationStats


class Health:
    """What is known of a replica's disk since the engine started; `scrubbed_at` in seconds since 1970, 0 for never."""

    __slots__ = ("damaged", "repaired", "scrubbed_at")

    def __init__(self) -> None:
        self.damaged = 0
        self.repaired = 0
        self.scrubbed_at = 0.0


class Operation:
    __slots__ = ("buckets", "bytes", "count", "errors", "seconds")

    def __init__(self) -> None:
        self.count = 0
        self.bytes = 0
        self.errors = 0
        self.seconds = 0.0
        self.buckets = [0] * (len(LATENCY_BOUNDS) + 1)

    def add(self, seconds: float, size: int, error: int) -> None:
        self.count += 1
        self.seconds += seconds
        self.buckets[bisect_left(LATENCY_BOUNDS, seconds)] += 1
        if error:
            self.errors += 1
        else:
            self.bytes += size

    def snapshot(self) -> OperationStats:
        return OperationStats(
            count=self.count,
            bytes=self.bytes,
            errors=self.errors,
            seconds=self.seconds,
            buckets=tuple(self.buckets),
        )
