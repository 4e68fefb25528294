"""What a run found: as values, as JSON, as tables."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from share_manager.bench.flush import FlushTarget
from share_manager.bench.measure import Outcome, Plan
from share_manager.bench.model import (
    LOCAL_WORKLOADS,
    NFS_WORKLOADS,
    Cell,
    FlushSample,
    Operation,
    Pattern,
    Sample,
    Workload,
)
from share_manager.bench.summary import Spread, ratio, spread, spread_of
from share_manager.bench.targets import BlockTarget, FileTarget

FORMAT = 1
Kind = Literal["block", "fsync", "files", "nfs"]
BLOCK_BASES = ("plain", "loop", "qsd")


class Measured(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Medians and ends over the repeats. `ratios` is keyed by the target that the median is divided by."""

    per_second: Spread
    bytes_per_second: Spread
    cpu_us: Spread | None = None
    latency_us: Spread | None = None
    p99_us: Spread | None = None
    ratios: dict[str, float]


class CellResult(msgspec.Struct, frozen=True, kw_only=True):
    target: str
    cell: Cell
    measured: Measured


class WorkloadResult(msgspec.Struct, frozen=True, kw_only=True):
    target: str
    workload: Workload
    measured: Measured


class FlushResult(msgspec.Struct, frozen=True, kw_only=True):
    """Times in microseconds, as in `FlushSample`. `ratio`: engine over the sum of the others, each repeat."""

    target: str
    replicas: int
    plain_us: Spread
    round_trip_us: Spread
    expected_us: Spread
    engine_us: Spread
    ratio: Spread


class TargetNote(msgspec.Struct, frozen=True, kw_only=True):
    """`unavailable` is empty for a target that was measured to the end."""

    name: str
    kind: Kind
    title: str
    unavailable: str = ""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    cpus: int
    kernel: str
    filesystem: str


class Report(msgspec.Struct, frozen=True, kw_only=True):
    format: int = FORMAT
    machine: Machine
    directory: str
    size_bytes: int
    seconds: float
    repeats: int
    targets: tuple[TargetNote, ...]
    cells: tuple[CellResult, ...]
    workloads: tuple[WorkloadResult, ...]
    flushes: tuple[FlushResult, ...] = ()


def filesystem_of(path: Path, mountinfo: str) -> str:
    """Type of the filesystem that holds `path`, from the text of /proc/self/mountinfo (proc(5))."""
    found, longest = "unknown", -1
    for line in mountinfo.splitlines():
        fields = line.split()
        mountpoint = fields[4].replace("\\040", " ")
        # of two mounts on one place the later one is seen
        if len(mountpoint) >= longest and path.is_relative_to(mountpoint):
            found, longest = fields[fields.index("-") + 1], len(mountpoint)
    return found


def summarise(samples: Sequence[Sample], bases: dict[str, Sequence[Sample]]) -> Measured:
    rate = spread([sample.per_second for sample in samples])
    ratios = {
        name: found
        for name, base in bases.items()
        if base and (found := ratio(rate.median, spread([sample.per_second for sample in base]).median)) is not None
    }
    return Measured(
        per_second=rate,
        bytes_per_second=spread([sample.bytes_per_second for sample in samples]),
        cpu_us=spread_of(sample.cpu_us for sample in samples),
        latency_us=spread_of(sample.latency_us for sample in samples),
        p99_us=spread_of(sample.p99_us for sample in samples),
        ratios=ratios,
    )


def report(plan: Plan, outcome: Outcome) -> Report:
    """Ratios are to those of each target's bases that the run had."""
    block_bases = [target.name for target in plan.block if target.name in BLOCK_BASES]
    names = {target.name for target in plan.files}
    file_bases = {target.name: [base for base in target.bases if base in names] for target in plan.files}
    return Report(
        machine=Machine(
            cpus=len(os.sched_getaffinity(0)),
            kernel=platform.release(),
            filesystem=filesystem_of(plan.directory.resolve(), Path("/proc/self/mountinfo").read_text()),
        ),
        directory=str(plan.directory.resolve()),
        size_bytes=plan.size,
        seconds=plan.seconds,
        repeats=plan.repeats,
        targets=tuple(
            TargetNote(
                name=target.name,
                kind=_kind(target),
                title=target.title,
                unavailable=outcome.unavailable.get(target.name, ""),
            )
            for target in plan.targets
        ),
        cells=tuple(
            CellResult(
                target=name,
                cell=cell,
                measured=summarise(samples, {base: outcome.cells.get((base, cell), ()) for base in block_bases}),
            )
            for (name, cell), samples in outcome.cells.items()
        ),
        workloads=tuple(
            WorkloadResult(
                target=name,
                workload=workload,
                measured=summarise(
                    samples, {base: outcome.workloads.get((base, workload), ()) for base in file_bases[name]}
                ),
            )
            for (name, workload), samples in outcome.workloads.items()
        ),
        flushes=tuple(
            _flushed(target, outcome.flushes[target.name])
            for target in plan.flushes
            if outcome.flushes.get(target.name)
        ),
    )


def _kind(target: BlockTarget | FileTarget | FlushTarget) -> Kind:
    match target:
        case BlockTarget():
            return "block"
        case FlushTarget():
            return "fsync"
        case FileTarget():
            return "nfs" if target.nfs else "files"


def _flushed(target: FlushTarget, samples: Sequence[FlushSample]) -> FlushResult:
    return FlushResult(
        target=target.name,
        replicas=target.replicas,
        plain_us=spread([sample.plain_us for sample in samples]),
        round_trip_us=spread([sample.round_trip_us for sample in samples]),
        expected_us=spread([sample.expected_us for sample in samples]),
        engine_us=spread([sample.engine_us for sample in samples]),
        ratio=spread([sample.engine_us / sample.expected_us for sample in samples]),
    )


def compact(value: float) -> str:
    """Three digits that matter: 845, 9.12k, 12.3k, 208k."""
    for factor, unit in ((1e6, "M"), (1e3, "k")):
        if value >= factor * 0.9995:
            scaled = value / factor
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f}{unit}"
    return f"{value:.{0 if value >= 99.5 else 1}f}"


def _mebibytes(value: float) -> str:
    mebibytes = value / (1 << 20)
    return f"{mebibytes:.{0 if mebibytes >= 99.5 else 1}f}"


def _entry(measured: Measured | None, in_bytes: bool) -> str:
    if measured is None:
        return "-"
    values = measured.bytes_per_second if in_bytes else measured.per_second
    show = _mebibytes if in_bytes else compact
    ratios = " ".join(f"{value:.2f}" for value in measured.ratios.values())
    return _shown(values, show, ratios)


def _shown(values: Spread, show: Callable[[float], str], beside: str = "") -> str:
    return f"[bold]{show(values.median)}[/bold] {beside}\n[dim]{show(values.min)}..{show(values.max)}[/dim]"


def _cpu(measured: Sequence[Measured | None]) -> str:
    each = ["-" if one is None or one.cpu_us is None else f"{one.cpu_us.median:.0f}" for one in measured]
    return "-" if set(each) == {"-"} else "/".join(each)


_TABLE_STYLE: Any = {
    "title_justify": "left",
    "title_style": "bold",
    "box": box.SIMPLE_HEAD,
    "pad_edge": False,
    "padding": (0, 1),
}


@dataclass(frozen=True)
class _Column:
    title: str
    in_bytes: bool


def _table(title: str, columns: Sequence[_Column], rows: dict[str, list[Measured | None]]) -> Table:
    table = Table(title=title, **_TABLE_STYLE)
    table.add_column("target", no_wrap=True)
    for column in columns:
        table.add_column(column.title, no_wrap=True)
    table.add_column("CPU µs/op", no_wrap=True)
    for name, measured in rows.items():
        if any(measured):
            entries = (_entry(one, column.in_bytes) for one, column in zip(measured, columns, strict=True))
            table.add_row(name, *entries, _cpu(measured))
    return table


_WORKLOADS = {
    Workload.CREATE: _Column("create files/s", in_bytes=False),
    Workload.CREATE_CLOSE: _Column("create files/s", in_bytes=False),
    Workload.APPEND: _Column("append /s", in_bytes=False),
    Workload.OVERWRITE: _Column("overwrite /s", in_bytes=False),
    Workload.STREAM: _Column("stream MiB/s", in_bytes=True),
}
_FILE_TABLES: tuple[tuple[Kind, str, tuple[Workload, ...]], ...] = (
    (
        "files",
        "files: create+write 4 KiB+fsync; append 4 KiB+fsync; stream of 1 MiB writes, fsync at the end",
        LOCAL_WORKLOADS,
    ),
    (
        "nfs",
        "NFS: stream of 1 MiB writes and an fsync; overwrite or append 4 KiB+fsync; create+write 4 KiB+close",
        NFS_WORKLOADS,
    ),
)


def _flush_table(flushes: Sequence[FlushResult]) -> Table:
    table = Table(title="4 KiB write+fsync, depth 1: µs; ratio of the engine to fdatasync + round trip", **_TABLE_STYLE)
    for name in ("target", "fdatasync", "round trip", "sum", "engine", "ratio"):
        table.add_column(name, no_wrap=True)
    for one in flushes:
        times = (one.plain_us, one.round_trip_us, one.expected_us, one.engine_us)
        table.add_row(one.target, *(_shown(value, compact) for value in times), _shown(one.ratio, "{:.2f}".format))
    return table


def tables(found: Report) -> list[Table]:
    """One for each load of block targets, one for their flushes, one for directories and one for NFS."""
    out: list[Table] = []
    names = [target.name for target in found.targets]
    cells = {(one.target, one.cell): one.measured for one in found.cells}
    for pattern, size, depth in dict.fromkeys((cell.pattern, cell.block_size, cell.depth) for _, cell in cells):
        operations = [one for one in Operation if any(cell == Cell(pattern, size, depth, one) for _, cell in cells)]
        in_bytes = pattern is Pattern.SEQUENTIAL
        out.append(
            _table(
                f"{size >> 10} KiB {pattern}, depth {depth}: {'MiB/s' if in_bytes else 'operations/s'}",
                [_Column(str(operation), in_bytes) for operation in operations],
                {name: [cells.get((name, Cell(pattern, size, depth, one))) for one in operations] for name in names},
            )
        )
    if found.flushes:
        out.append(_flush_table(found.flushes))
    loads = {(one.target, one.workload): one.measured for one in found.workloads}
    for kind, title, workloads in _FILE_TABLES:
        rows = {
            target.name: [loads.get((target.name, workload)) for workload in workloads]
            for target in found.targets
            if target.kind == kind
        }
        if any(any(row) for row in rows.values()):
            out.append(_table(title, [_WORKLOADS[workload] for workload in workloads], rows))
    return out


def print_report(found: Report, console: Console) -> None:
    machine = f"{found.machine.cpus} CPUs, Linux {found.machine.kernel}"
    console.print(f"{machine}; {found.machine.filesystem} in {escape(found.directory)}", highlight=False)
    console.print(
        f"{found.size_bytes >> 20} MiB per target, {found.seconds:g} s per sample, median of {found.repeats}",
        highlight=False,
    )
    console.print(
        "Each entry: median, its ratios to plain, loop and qsd (files: to directory and ext4-loop; NFS: to the stock\n"
        "row with the same mount options) as far as the run has them; below it, least..most.\n"
        "CPU: of the processes that serve the target, for the columns in their order.\n",
        style="dim",
    )
    for table in tables(found):
        console.print(table)
    width = max(len(target.name) for target in found.targets)
    for target in found.targets:
        reason = f"[yellow]not measured: {escape(target.unavailable)}[/yellow]" if target.unavailable else ""
        console.print(f"  {target.name:{width}} {target.title}  {reason}".rstrip(), highlight=False)
