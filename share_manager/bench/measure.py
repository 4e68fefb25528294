"""One run: open the targets, measure them in turn, keep what comes out.

Repeats are the outermost loop and targets the innermost, so that whatever else the machine does at some minute
falls on all targets alike.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import msgspec
import trio

from share_manager.bench import files, fio
from share_manager.bench.model import Cell, Sample, Workload
from share_manager.bench.processes import UnavailableError, cpu_between, cpu_seconds
from share_manager.bench.summary import rotated
from share_manager.bench.targets import BLOCK_TARGETS, BlockTarget, FileTarget, Opened, Place
from share_manager.errors import EnvironmentProblem, NotRootError, ShareManagerError, StorageError
from share_manager.units import format_size

# beside the targets' own sizes: replica metadata, logs, the small files of a workload
SLACK = 256 << 20
STUCK_SECONDS = 60.0


class FioMissingError(EnvironmentProblem):
    def __str__(self) -> str:
        return "the bench measures with fio, which is not installed: apt-get install fio"


class NoRoomError(StorageError):
    def __init__(self, directory: Path, needed: int, free: int) -> None:
        super().__init__(directory, needed, free)
        self.directory = directory
        self.needed = needed
        self.free = free

    def __str__(self) -> str:
        return (
            f"the bench needs {self.needed / (1 << 30):.1f} GiB in {self.directory}, where "
            f"{self.free / (1 << 30):.1f} GiB are free: give a smaller --size, fewer --targets or another --directory"
        )


@dataclass(frozen=True)
class Plan:
    """`size` in bytes of each target; `seconds` of load in each sample."""

    directory: Path
    size: int
    seconds: float
    repeats: int
    cells: tuple[Cell, ...]
    workloads: tuple[Workload, ...]
    block: tuple[BlockTarget, ...]
    files: tuple[FileTarget, ...]

    @property
    def devices(self) -> tuple[BlockTarget, ...]:
        """What must be opened: the block targets, and the devices that file targets need."""
        wanted = {target.name for target in self.block} | {target.device for target in self.files}
        return tuple(target for target in BLOCK_TARGETS if target.name in wanted)

    @property
    def targets(self) -> list[BlockTarget | FileTarget]:
        return [*self.block, *self.files]

    @property
    def steps(self) -> int:
        opened = len(self.devices) + len(self.files)
        samples = len(self.cells) * len(self.block) + len(self.workloads) * len(self.files)
        return opened + self.repeats * samples

    @property
    def bytes_needed(self) -> int:
        blocks = sum(target.copies for target in self.devices) + sum(target.copies for target in self.files)
        return blocks * self.size + SLACK


class Observer(Protocol):
    def doing(self, what: str) -> None: ...

    def done(self, steps: int = 1) -> None: ...


@dataclass
class Outcome:
    """`unavailable` gives the reason why a target has no samples, or none after some point."""

    cells: dict[tuple[str, Cell], list[Sample]] = field(default_factory=dict)
    workloads: dict[tuple[str, Workload], list[Sample]] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)


def check(plan: Plan) -> None:
    """Raises ShareManagerError when the plan cannot be carried out on this machine."""
    if plan.block and not shutil.which("fio"):
        raise FioMissingError
    if os.geteuid() and any(target.name not in ("plain", "directory") for target in plan.targets):
        raise NotRootError("share-manager bench")
    place = os.statvfs(plan.directory)
    free = place.f_bavail * place.f_frsize
    if free < plan.bytes_needed:
        raise NoRoomError(plan.directory, plan.bytes_needed, free)


@contextlib.contextmanager
def _scratch(directory: Path) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix=".share-manager-bench-", dir=directory.resolve()))
    try:
        yield path
    finally:
        # what a broken target left mounted in it must survive the removal: one filesystem only, and no mount point
        if not any(os.path.ismount(entry) for entry in path.iterdir()):
            shutil.rmtree(path, ignore_errors=True)


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or repr(error)


async def _with_cpu(opened: Opened, load: Callable[[], Awaitable[Sample]]) -> Sample:
    """The sample that `load` gives, with the processor time of the target's processes."""
    if not opened.pids:
        return await load()
    before = cpu_seconds(opened.pids)
    sample = await load()
    spent = cpu_between(before, cpu_seconds(opened.pids))
    return msgspec.structs.replace(sample, cpu_us=1e6 * spent / sample.operations if sample.operations else None)


async def measure(plan: Plan, observer: Observer) -> Outcome:
    """Carry out `plan`. Everything that it made is gone when this returns, raises or is cancelled."""
    check(plan)
    outcome = Outcome()
    with _scratch(plan.directory) as scratch:
        place = Place(scratch, plan.size, f"{os.getpid()}-{int(time.time()) % 100000}")
        async with AsyncExitStack() as stack:
            devices = await _open_devices(plan, place, stack, outcome, observer)
            await _measure_cells(plan, devices, outcome, observer)
            directories = await _open_directories(plan, place, devices, stack, outcome, observer)
            await _measure_workloads(plan, directories, outcome, observer)
            observer.doing("cleaning up")
    return outcome


async def _open_devices(
    plan: Plan, place: Place, stack: AsyncExitStack, outcome: Outcome, observer: Observer
) -> dict[str, Opened]:
    opened: dict[str, Opened] = {}
    for target in plan.devices:
        observer.doing(f"{target.name}: set up and fill {format_size(plan.size)}")
        try:
            ready = await stack.enter_async_context(target.open(place))
            if target in plan.block:
                await fio.run(fio.fill_argv(ready.path, plan.size), target.name)
            opened[target.name] = ready
        except (UnavailableError, ShareManagerError, OSError) as error:
            outcome.unavailable[target.name] = _reason(error)
        observer.done()
    return opened


async def _measure_cells(plan: Plan, devices: dict[str, Opened], outcome: Outcome, observer: Observer) -> None:
    for repeat in range(plan.repeats):
        for cell in plan.cells:
            for target in rotated(plan.block, repeat):
                if target.name not in outcome.unavailable:
                    observer.doing(
                        f"{target.name}: {cell.pattern} {format_size(cell.block_size)}B {cell.operation}, "
                        f"depth {cell.depth} ({repeat + 1}/{plan.repeats})"
                    )
                    try:
                        sample = await _cell(plan, cell, target, devices[target.name])
                        outcome.cells.setdefault((target.name, cell), []).append(sample)
                    except ShareManagerError as error:
                        outcome.unavailable[target.name] = _reason(error)
                observer.done()


async def _cell(plan: Plan, cell: Cell, target: BlockTarget, opened: Opened) -> Sample:
    async def load() -> Sample:
        argv = fio.cell_argv(cell, opened.path, plan.size, plan.seconds)
        with trio.move_on_after(plan.seconds + STUCK_SECONDS):
            output = await fio.run(argv, target.name)
            try:
                return fio.parse(output, cell.operation)
            except ValueError as error:
                raise fio.FioError(target.name, str(error)) from error
        raise fio.FioError(target.name, f"no end within {plan.seconds + STUCK_SECONDS:g} s")

    return await _with_cpu(opened, load)


async def _open_directories(
    plan: Plan,
    place: Place,
    devices: dict[str, Opened],
    stack: AsyncExitStack,
    outcome: Outcome,
    observer: Observer,
) -> dict[str, Opened]:
    opened: dict[str, Opened] = {}
    for target in plan.files:
        observer.doing(f"{target.name}: set up")
        try:
            if target.device and target.device in outcome.unavailable:
                raise UnavailableError(f"{target.device}: {outcome.unavailable[target.device]}")
            device = devices[target.device] if target.device else None
            opened[target.name] = await stack.enter_async_context(target.open(place, device))
        except (UnavailableError, ShareManagerError, OSError) as error:
            outcome.unavailable[target.name] = _reason(error)
        observer.done()
    return opened


async def _measure_workloads(plan: Plan, directories: dict[str, Opened], outcome: Outcome, observer: Observer) -> None:
    for repeat in range(plan.repeats):
        for workload in plan.workloads:
            for target in rotated(plan.files, repeat):
                if target.name not in outcome.unavailable:
                    observer.doing(f"{target.name}: {workload} ({repeat + 1}/{plan.repeats})")
                    try:
                        sample = await _workload(plan, workload, directories[target.name])
                        outcome.workloads.setdefault((target.name, workload), []).append(sample)
                    except OSError as error:
                        outcome.unavailable[target.name] = _reason(error)
                observer.done()


async def _workload(plan: Plan, workload: Workload, opened: Opened) -> Sample:
    async def load() -> Sample:
        return await trio.to_thread.run_sync(files.load, workload, opened.path, plan.seconds, plan.size)

    return await _with_cpu(opened, load)
