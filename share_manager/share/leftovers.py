"""What an earlier run left behind, and how it goes: looked for in the kernel, not only in what that run wrote down.

A share manager that was killed leaves its processes serving. They are asked to leave in the order of the data path
while the engine lives; once it is dead whatever hangs on it is killed first, so that nobody sees an I/O error.
"""

from __future__ import annotations

import contextlib
import enum
import itertools
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import msgspec
import trio

from engine.errors import FrontendError
from engine.frontend.fuse_device import FuseDevice
from share_manager.errors import CommandError, LeftoverError, TimeoutProblem, VolumeBusyError
from share_manager.paths import VolumePaths
from share_manager.share.commands import run
from share_manager.share.cryptsetup import mapping_path
from share_manager.share.freeze import THAW_TIMEOUT, thaw
from share_manager.share.loop import detach_loop
from share_manager.share.mapping import close_mapping, mappings_of
from share_manager.share.onvolume import on_volume
from share_manager.share.procfs import (
    ProcessId,
    command_line,
    identify,
    is_alive,
    loops_below,
    mounts_of,
    processes_naming,
    start_time,
)
from share_manager.share.state import read_state

GANESHA_TIMEOUT = 15.0
ENGINE_TIMEOUT = 20.0
REPLICA_TIMEOUT = 15.0
UNMOUNT_TIMEOUT = 30.0
KILL_TIMEOUT = 10.0
_HELPERS = frozenset(
    {
        *("blkid", "cryptsetup", "dbus-daemon", "dmsetup", "e2fsck", "losetup", "mkfs.ext4", "mke2fs", "mkfs.xfs"),
        *("fstrim", "mount", "resize2fs", "sync", "tune2fs", "umount", "xfs_admin", "xfs_db", "xfs_growfs", "xfs_io"),
    }
)


class Leftovers(msgspec.Struct, frozen=True, kw_only=True):
    """`mounts` in the order of mounting, the block file's own left out; `helpers` are short-lived programs."""

    ganesha: tuple[ProcessId, ...] = ()
    engine: tuple[ProcessId, ...] = ()
    replicas: tuple[ProcessId, ...] = ()
    helpers: tuple[ProcessId, ...] = ()
    mounts: tuple[Path, ...] = ()
    mappings: tuple[str, ...] = ()
    loops: tuple[str, ...] = ()
    block_file: bool = False

    @property
    def empty(self) -> bool:
        return self == Leftovers()

    @property
    def alive(self) -> bool:
        return bool(self.ganesha or self.engine or self.replicas)


class Step(enum.Enum):
    """In words, what is done."""

    KILL_HELPERS = "end unfinished programs"
    ASK_GANESHA = "ask ganesha to leave"
    KILL_GANESHA = "kill ganesha"
    THAW = "thaw a frozen filesystem"
    ABORT_BLOCK_FILE = "abort the block file"
    AWAIT_GANESHA = "wait for ganesha's exit"
    UNMOUNT = "unmount"
    CLOSE_MAPPINGS = "close encrypted devices"
    DETACH_LOOPS = "detach loop devices"
    ASK_ENGINE = "ask the engine to leave"
    UNMOUNT_BLOCK_FILE = "unmount the block file"
    ASK_REPLICAS = "ask replicas to leave"


def plan(found: Leftovers) -> list[Step]:
    """The order of leaving. Without engine or replicas requests hang, so ganesha dies before they are failed."""
    steps = []
    orderly = bool(found.engine and found.replicas)
    if found.mounts and orderly:
        # killed while it took a snapshot: ganesha's writers cannot leave before
        steps.append(Step.THAW)
    if found.ganesha:
        steps.append(Step.ASK_GANESHA if orderly else Step.KILL_GANESHA)
    if found.helpers:
        steps.append(Step.KILL_HELPERS)
    if not orderly and (found.block_file or found.loops or found.mappings or found.mounts):
        steps.append(Step.ABORT_BLOCK_FILE)
    if found.mounts and not orderly:
        steps.append(Step.THAW)
    if found.ganesha and not orderly:
        steps.append(Step.AWAIT_GANESHA)
    if found.mounts:
        steps.append(Step.UNMOUNT)
    if found.mappings:
        steps.append(Step.CLOSE_MAPPINGS)
    if found.loops:
        steps.append(Step.DETACH_LOOPS)
    if found.engine:
        steps.append(Step.ASK_ENGINE)
    if found.block_file:
        steps.append(Step.UNMOUNT_BLOCK_FILE)
    if found.replicas:
        steps.append(Step.ASK_REPLICAS)
    return steps


def classify(argv: list[str]) -> str | None:
    """What a process that names our runtime directory or loop device is; None for somebody's editor or shell."""
    program = Path(argv[0]).name
    modules = [argument for flag, argument in itertools.pairwise(argv) if flag == "-m"]
    if "engine.replica" in modules:
        return "replicas"
    if "engine" in modules:
        return "engine"
    if "engine.browse" in modules:
        return "helpers"
    if program == "ganesha.nfsd":
        return "ganesha"
    return "helpers" if program in _HELPERS else None


def refuse_orphan(paths: VolumePaths, wanted: str) -> None:
    """Raises VolumeBusyError, which ends with `wanted`, when a killed run left the volume in use."""
    found = observe(paths)
    if found.alive or found.mounts:
        processes = found.ganesha + found.engine + found.replicas
        raise VolumeBusyError(paths.volume, processes[0].pid if processes else None, wanted)


def observe(paths: VolumePaths) -> Leftovers:
    loops = loops_below(paths.run)
    mappings = mappings_of(paths)
    devices = [*loops, *mappings, *map(mapping_path, mappings)]
    mounts = [mount.target for mount in mounts_of(paths.run, devices)]
    groups: dict[str, list[ProcessId]] = {"ganesha": [], "engine": [], "replicas": [], "helpers": []}
    candidates = processes_naming(paths.run)
    for device in devices:
        candidates.update(processes_naming_device(device))
    for pid, argv in sorted(candidates.items()):
        kind, found = classify(argv), identify(pid)
        if kind is not None and found is not None:
            groups[kind].append(found)
    state = read_state(paths.state)
    for name, process in state.processes.items() if state else ():
        # a pid that was reused has another start time
        kind = {"engine": "engine", "ganesha": "ganesha", "share-manager": ""}.get(name, "replicas")
        if kind and is_alive(process) and process not in groups[kind]:
            groups[kind].append(process)
    return Leftovers(
        ganesha=tuple(groups["ganesha"]),
        engine=tuple(groups["engine"]),
        replicas=tuple(groups["replicas"]),
        helpers=tuple(groups["helpers"]),
        mounts=tuple(target for target in mounts if target != paths.block_file),
        mappings=tuple(mappings),
        loops=tuple(loops),
        block_file=paths.block_file in mounts,
    )


def processes_naming_device(device: str) -> dict[int, list[str]]:
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            argv = command_line(int(entry))
            if device in argv[1:] and start_time(int(entry)) is not None:
                found[int(entry)] = argv
    return found


def send(process: ProcessId, number: signal.Signals) -> None:
    """Signal exactly this process, or nobody."""
    try:
        fd = os.pidfd_open(process.pid)
    except OSError:
        return
    try:
        # the descriptor now names one process for good; is it the one that is meant?
        if is_alive(process):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, number)
    finally:
        os.close(fd)


async def gone(processes: tuple[ProcessId, ...], timeout: float) -> bool:
    with trio.move_on_after(timeout):
        while any(is_alive(process) for process in processes):  # noqa: ASYNC110 - not our children
            await trio.sleep(0.02)
        return True
    return False


async def ask(processes: tuple[ProcessId, ...], timeout: float) -> None:
    """SIGTERM, then SIGKILL."""
    for process in processes:
        send(process, signal.SIGTERM)
    if not await gone(processes, timeout):
        for process in processes:
            send(process, signal.SIGKILL)
        await gone(processes, KILL_TIMEOUT)


async def clear(paths: VolumePaths, report: Callable[[str], None] = lambda step: None) -> bool:
    """Remove everything that an earlier run of this volume left; whether there was anything. The caller holds the
    volume's lock. Raises LeftoverError."""
    found = observe(paths)
    if found.empty and not paths.run.exists():
        return False
    for step in plan(found):
        if step is not Step.THAW:  # there is hardly ever anything to thaw, and only trying tells
            report(step.value)
        await _do(step, found, paths)
    remaining = observe(paths)
    if remaining.mounts or remaining.mappings or remaining.loops or remaining.block_file:
        await _force(paths, remaining)
        remaining = observe(paths)
    if remaining.alive:
        processes = remaining.ganesha + remaining.engine + remaining.replicas
        raise LeftoverError(
            f"process {', '.join(str(process.pid) for process in processes)}", "it survives SIGKILL; look at dmesg"
        )
    if remaining.mounts:
        raise LeftoverError(f"the mount at {remaining.mounts[-1]}", "see who uses it with `fuser -vm`")
    _keep_logs(paths)
    shutil.rmtree(paths.run, ignore_errors=True)
    return not found.empty


def _keep_logs(paths: VolumePaths) -> None:
    for name in ("ganesha.log", "ganesha.log.1"):
        with contextlib.suppress(OSError):
            shutil.copyfile(paths.ganesha / name, paths.log / name)


async def _do(step: Step, found: Leftovers, paths: VolumePaths) -> None:
    match step:
        case Step.KILL_HELPERS:
            for process in found.helpers:
                send(process, signal.SIGKILL)
        case Step.ASK_GANESHA:
            await ask(found.ganesha, GANESHA_TIMEOUT)
        case Step.KILL_GANESHA:
            for process in found.ganesha:
                send(process, signal.SIGKILL)
        case Step.THAW:
            for target in found.mounts:
                with contextlib.suppress(OSError), trio.move_on_after(THAW_TIMEOUT):
                    await on_volume(thaw, target)
        case Step.ABORT_BLOCK_FILE:
            abort_block_file(paths.block_file)
        case Step.AWAIT_GANESHA:
            await gone(found.ganesha, KILL_TIMEOUT)
        case Step.UNMOUNT:
            await _unmount_all(paths, found.mounts)
        case Step.CLOSE_MAPPINGS:
            await _close_mappings(paths, found.mappings)
        case Step.DETACH_LOOPS:
            for device in reversed(found.loops):
                with contextlib.suppress(TimeoutProblem, CommandError):
                    await detach_loop(device, below=paths.run)
        case Step.ASK_ENGINE:
            await ask(found.engine, ENGINE_TIMEOUT)
        case Step.UNMOUNT_BLOCK_FILE:
            abort_block_file(paths.block_file)
            FuseDevice(paths.block_file, -1).unmount()
        case Step.ASK_REPLICAS:
            await ask(found.replicas, REPLICA_TIMEOUT)


async def _unmount_all(paths: VolumePaths, mounts: tuple[Path, ...]) -> None:
    for attempt in range(2):
        stuck = False
        for target in reversed(mounts):
            try:
                # a loop device over a file inside keeps the mount busy
                for device in loops_below(target):
                    await detach_loop(device, below=target)
                await run("umount", "--no-canonicalize", str(target), ok=(0, 32), timeout=UNMOUNT_TIMEOUT)
            except (CommandError, TimeoutProblem):
                stuck = True
        if not stuck or attempt:
            return
        # the engine lives and yet nothing moves: fail the requests, nobody exports them any more
        abort_block_file(paths.block_file)


async def _close_mappings(paths: VolumePaths, names: tuple[str, ...]) -> None:
    for name in names:
        await close_mapping(name, lambda reason: abort_block_file(paths.block_file))


async def _force(paths: VolumePaths, remaining: Leftovers) -> None:
    """The last resort: let the kernel finish when the last user is gone."""
    for process in remaining.ganesha + remaining.engine + remaining.helpers:
        send(process, signal.SIGKILL)
    abort_block_file(paths.block_file)
    await gone(remaining.ganesha + remaining.engine, KILL_TIMEOUT)
    for target in reversed(remaining.mounts):
        with contextlib.suppress(CommandError, TimeoutProblem):
            await run("umount", "--no-canonicalize", "--lazy", str(target), ok=(0, 1, 32), timeout=UNMOUNT_TIMEOUT)
    await _close_mappings(paths, remaining.mappings)
    for device in reversed(remaining.loops):
        with contextlib.suppress(TimeoutProblem, CommandError):
            await detach_loop(device, timeout=5, below=paths.run)
    with contextlib.suppress(FrontendError):
        FuseDevice(paths.block_file, -1).unmount()


def abort_block_file(path: Path) -> None:
    with contextlib.suppress(FrontendError):
        FuseDevice(path, -1).abort()
