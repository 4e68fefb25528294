"""fio: the command for a cell, and the numbers in its JSON (fio(1), section "JSON OUTPUT")."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import msgspec
import trio

from share_manager.bench.model import Cell, Operation, Pattern, Sample
from share_manager.errors import RuntimeProblem

_MODES = {
    (Pattern.RANDOM, False): "randread",
    (Pattern.RANDOM, True): "randwrite",
    (Pattern.SEQUENTIAL, False): "read",
    (Pattern.SEQUENTIAL, True): "write",
}


class FioError(RuntimeProblem):
    def __init__(self, target: str, reason: str) -> None:
        super().__init__(target, reason)
        self.target = target
        self.reason = reason

    def __str__(self) -> str:
        return f"fio on {self.target} failed: {self.reason}"


def cell_argv(cell: Cell, path: Path, size: int, seconds: float) -> list[str]:
    writes = cell.operation is not Operation.READ
    return [
        *_argv(path, size),
        f"--rw={_MODES[cell.pattern, writes]}",
        f"--bs={cell.block_size}",
        f"--iodepth={cell.depth}",
        f"--fsync={int(cell.operation is Operation.WRITE_FSYNC)}",
        "--time_based",
        f"--runtime={round(seconds * 1000)}ms",
    ]


def fill_argv(path: Path, size: int) -> list[str]:
    """Write every block once, so that later reads find data and later writes need no allocation."""
    return [*_argv(path, size), "--rw=write", f"--bs={1 << 20}", "--iodepth=8", "--end_fsync=1"]


def _argv(path: Path, size: int) -> list[str]:
    return [
        "fio",
        "--name=cell",
        # fio splits names at colons
        f"--filename={str(path).replace(':', chr(92) + ':')}",
        f"--size={size}",
        "--ioengine=libaio",
        "--direct=1",
        # a job that is a process of its own survives fio when it is killed
        "--thread",
        "--allow_file_create=0",
        "--eta=never",
        "--output-format=json",
    ]


def parse(output: str, operation: Operation) -> Sample:
    """The sample in what fio printed. Raises ValueError when there is none, or fio counted errors."""
    start = output.find("{")
    try:
        job: dict[str, Any] = msgspec.json.decode(output[max(start, 0) :])["jobs"][0]
        if job["error"]:
            raise ValueError(f"error {job['error']}")
        side = job["read" if operation is Operation.READ else "write"]
        if not side["total_ios"]:
            raise ValueError("no request was completed")
        latency, p99 = side["lat_ns"]["mean"], side["clat_ns"].get("percentile", {}).get("99.000000")
        if operation is Operation.WRITE_FSYNC:
            # fio starts the clock of an fsync when it has submitted the write, and waits for that one first
            latency, p99 = side["slat_ns"]["mean"] + job["sync"]["lat_ns"]["mean"], None
        return Sample(
            operations=side["total_ios"],
            per_second=float(side["iops"]),
            bytes_per_second=float(side["bw_bytes"]),
            latency_us=latency / 1000,
            p99_us=None if p99 is None else p99 / 1000,
        )
    except (msgspec.DecodeError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"not fio's JSON: {error!r}") from error


async def run(argv: list[str], target: str) -> str:
    """fio's output. Ended with its caller's scope. Raises FioError."""
    # a session of its own: Ctrl-C is answered by whoever cancels this, in the right order
    process = await trio.run_process(
        argv, capture_stdout=True, capture_stderr=True, check=False, start_new_session=True, stdin=subprocess.DEVNULL
    )
    output = process.stdout.decode(errors="replace")
    if process.returncode:
        said = (process.stderr.decode(errors="replace") + output[: max(output.find("{"), 0)]).strip().splitlines()
        raise FioError(target, said[-1] if said else f"exit status {process.returncode}")
    return output
