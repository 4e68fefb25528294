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
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import msgspec
import trio

from share_manager.bench import files, fio, flush
from share_manager.bench.flush import SPAN, FlushTarget
from share_manager.bench.model import FLUSH_CELL, Cell, FlushSample, Sample, Workload
from share_manager.bench.nfs.client import nfs_client
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
    """`size` in bytes of each target; `seconds` of load in each sample; `nfs_client` the command of a program that has
    one, None for this kernel's."""

    directory: Path
    size: int
    seconds: float
    repeats: int
    cells: tuple[Cell, ...]
    block: tuple[BlockTarget, ...]
    files: tuple[FileTarget, ...]
    flushes: tuple[FlushTarget, ...] = ()
    nfs_client: str | None = None

    @property
    def devices(self) -> tuple[BlockTarget, ...]:
        """What must be opened: the block targets, and the devices that other targets need."""
        wanted = {*self.filled, *(target.device for target in self.files)}
        return tuple(target for target in BLOCK_TARGETS if target.name in wanted)

    @property
    def targets(self) -> list[BlockTarget | FileTarget | FlushTarget]:
        return [*self.block, *self.flushes, *self.files]

    @property
    def filled(self) -> set[str]:
        """Devices whose every block is written before they are measured."""
        return {target.name for target in self.block} | {target.device for target in self.flushes}

    @property
    def steps(self) -> int:
        opened = len(self.devices) + len(self.files)
        samples = len(self.cells) * len(self.block) + len(self.flushes)
        samples += sum(len(target.workloads) for target in self.files)
        return opened + self.repeats * samples

    @property
    def bytes_needed(self) -> int:
        blocks = sum(target.copies for target in self.devices) + sum(target.copies for target in self.files)
        return blocks * self.size + max((target.replicas for target in self.flushes), default=0) * SPAN + SLACK


class Observer(Protocol):
    def doing(self, what: str) -> None: ...

    def done(self, steps: int = 1) -> None: ...


@dataclass
class Outcome:
    """`unavailable` gives the reason why a target has no samples, or none after some point."""

    cells: dict[tuple[str, Cell], list[Sample]] = field(default_factory=dict)
    workloads: dict[tuple[str, Workload], list[Sample]] = field(default_factory=dict)
    flushes: dict[str, list[FlushSample]] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)


def check(plan: Plan) -> None:
    """Raises ShareManagerError when the plan cannot be carried out on this machine."""
    if (plan.filled or any(target.nfs for target in plan.files)) and not shutil.which("fio"):
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
            await _measure_flushes(plan, scratch, devices, outcome, observer)
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
            if target.name in plan.filled:
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
    return await _with_cpu(opened, lambda: _fio(plan, cell, target.name, opened, plan.size))


async def _fio(plan: Plan, cell: Cell, name: str, opened: Opened, size: int) -> Sample:
    argv = fio.cell_argv(cell, opened.path, size, plan.seconds)
    with trio.move_on_after(plan.seconds + STUCK_SECONDS):
        output = await fio.run(argv, name)
        try:
            return fio.parse(output, cell.operation)
        except ValueError as error:
            raise fio.FioError(name, str(error)) from error
    raise fio.FioError(name, f"no end within {plan.seconds + STUCK_SECONDS:g} s")


async def _measure_flushes(
    plan: Plan, scratch: Path, devices: dict[str, Opened], outcome: Outcome, observer: Observer
) -> None:
    files = []
    if plan.flushes:
        most = max(target.replicas for target in plan.flushes)
        files = await trio.to_thread.run_sync(flush.plain_files, scratch, most)
    for repeat in range(plan.repeats):
        for target in rotated(plan.flushes, repeat):
            if target.device in outcome.unavailable:
                outcome.unavailable[target.name] = f"{target.device}: {outcome.unavailable[target.device]}"
            if target.name not in outcome.unavailable:
                observer.doing(f"{target.name} ({repeat + 1}/{plan.repeats})")
                try:
                    sample = await _flush(plan, files[: target.replicas], target, devices[target.device])
                    outcome.flushes.setdefault(target.name, []).append(sample)
                except (ShareManagerError, OSError) as error:
                    outcome.unavailable[target.name] = _reason(error)
            observer.done()


async def _flush(plan: Plan, files: Sequence[Path], target: FlushTarget, opened: Opened) -> FlushSample:
    """The three of them one after the other, so that they meet the same disk."""
    plain_us = await trio.to_thread.run_sync(flush.plain_us, files, plan.seconds, _cancelled)
    round_trip_us = await trio.to_thread.run_sync(flush.round_trip_us, plan.seconds / 3, _cancelled)
    engine = await _fio(plan, FLUSH_CELL, target.name, opened, min(SPAN, plan.size))
    assert engine.latency_us is not None
    return FlushSample(plain_us, round_trip_us, engine.latency_us)


def _cancelled() -> bool:
    """For loads in a worker thread: raises trio.Cancelled there when its task is cancelled."""
    trio.from_thread.check_cancelled()
    return False


async def _open_directories(
    plan: Plan,
    place: Place,
    devices: dict[str, Opened],
    stack: AsyncExitStack,
    outcome: Outcome,
    observer: Observer,
) -> dict[str, Opened]:
    opened: dict[str, Opened] = {}
    no_client = ""
    if any(target.nfs for target in plan.files):
        observer.doing("NFS client: set up")
        try:
            client = await stack.enter_async_context(nfs_client(plan.nfs_client, place.directory))
            place = replace(place, client=client)
        except UnavailableError as error:
            no_client = _reason(error)
    for target in plan.files:
        observer.doing(f"{target.name}: set up")
        try:
            if target.nfs and no_client:
                raise UnavailableError(no_client)
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
        for workload in Workload:
            takers = [target for target in plan.files if workload in target.workloads]
            for target in rotated(takers, repeat):
                if target.name not in outcome.unavailable:
                    observer.doing(f"{target.name}: {workload} ({repeat + 1}/{plan.repeats})")
                    try:
                        sample = await _workload(plan, workload, directories[target.name])
                        outcome.workloads.setdefault((target.name, workload), []).append(sample)
                    except (UnavailableError, OSError) as error:
                        outcome.unavailable[target.name] = _reason(error)
                observer.done()


async def _workload(plan: Plan, workload: Workload, opened: Opened) -> Sample:
    async def load() -> Sample:
        if opened.client is not None:
            done = await opened.client.run(str(opened.path), workload, plan.seconds, plan.size)
        else:
            done = await trio.to_thread.run_sync(
                files.load, str(workload), opened.path, plan.seconds, plan.size, _cancelled
            )
        return Sample(done.operations, done.operations / done.seconds, done.bytes / done.seconds)

    return await _with_cpu(opened, load)
