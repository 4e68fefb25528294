"""What is measured: each target is a context that holds something with a path, and gives it back."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from engine.store import IoMode
from share_manager.bench.engines import engine_file
from share_manager.bench.model import LOCAL_WORKLOADS, Workload
from share_manager.bench.nfs.client import NfsClient
from share_manager.bench.processes import Server, UnavailableError, run, serving
from share_manager.errors import CommandError, KernelFeatureError, TimeoutProblem
from share_manager.share.filesystem import mount_options
from share_manager.share.loop import attach_loop, detach_loop

START_SECONDS = 60.0
DETACH_SECONDS = 10.0


@dataclass(frozen=True)
class Place:
    """Where a bench keeps its files, how large each target is in bytes, and who mounts what is exported."""

    directory: Path
    size: int
    token: str
    client: NfsClient | None = None


@dataclass(frozen=True)
class Opened:
    """A target that is ready: a file or device (a directory for file workloads), and the roots of its processes.

    With `client` the path is a place that this NFS client knows."""

    path: Path
    pids: tuple[int, ...] = ()
    client: NfsClient | None = None


@dataclass(frozen=True)
class BlockTarget:
    """`copies` is how many times its size it occupies on disk."""

    name: str
    title: str
    copies: int
    open: Callable[[Place], AbstractAsyncContextManager[Opened]] = field(repr=False)


@dataclass(frozen=True)
class FileTarget:
    """`device` names the block target whose device gets a filesystem, if it is not ours alone; `bases` the targets to
    which its ratios are. With `nfs` it needs an NFS client."""

    name: str
    title: str
    copies: int
    device: str | None
    open: Callable[[Place, Opened | None], AbstractAsyncContextManager[Opened]] = field(repr=False)
    workloads: tuple[Workload, ...] = LOCAL_WORKLOADS
    bases: tuple[str, ...] = ("directory", "ext4-loop")
    nfs: bool = False


def plain_file(place: Place, name: str) -> Path:
    path = place.directory / f"{name}.img"
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, place.size)
    return path


@contextlib.asynccontextmanager
async def loop_device(file: Path) -> AsyncIterator[Path]:
    """`file` as a block device of 4 KiB sectors, past the page cache. Raises UnavailableError."""
    try:
        with trio.CancelScope(shield=True):
            device = await attach_loop(file)
    except (CommandError, KernelFeatureError) as error:
        raise UnavailableError(f"no loop device with direct I/O: {error}") from error
    try:
        yield Path(device)
    finally:
        # lazy: whatever holds the device must be through before its file can go
        with trio.CancelScope(shield=True), contextlib.suppress(TimeoutProblem):
            await detach_loop(device, DETACH_SECONDS, below=file)


@contextlib.asynccontextmanager
async def _plain(place: Place) -> AsyncIterator[Opened]:
    path = plain_file(place, "plain")
    try:
        yield Opened(path)
    finally:
        path.unlink()


@contextlib.asynccontextmanager
async def _loop(place: Place) -> AsyncIterator[Opened]:
    path = plain_file(place, "loop")
    try:
        async with loop_device(path) as device:
            yield Opened(device)
    finally:
        path.unlink()


def own_command(*args: str) -> list[str]:
    return [sys.executable, "-m", "share_manager", *args]


async def ready_event(server: Server) -> dict[str, Any]:
    """The line in which a share-manager process says that it is ready. Raises UnavailableError."""
    with trio.move_on_after(START_SECONDS):
        while True:
            for line in server.stdout.read_text(errors="replace").splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    event = json.loads(line)
                    if isinstance(event, dict) and event.get("event") == "ready":
                        return event
            server.check()
            await trio.sleep(0.05)
    raise UnavailableError(f"{server.name} was not ready within {START_SECONDS:g} s: {server.why()}")


def _engine(
    name: str, replicas: int, io: IoMode = "buffered", unix: bool = False
) -> Callable[[Place], AbstractAsyncContextManager[Opened]]:
    @contextlib.asynccontextmanager
    async def opened(place: Place) -> AsyncIterator[Opened]:
        async with (
            engine_file(replicas, io=io, unix=unix)(place.directory, name, place.size) as (path, pids),
            loop_device(path) as device,
        ):
            yield Opened(device, pids)

    return opened


async def _mounted(path: Path, server: Server) -> None:
    """Wait until something is mounted on the file `path`. Raises UnavailableError."""
    # octal escapes of /proc/self/mountinfo, proc(5)
    wanted = str(path).replace("\\", "\\134").replace(" ", "\\040")
    with trio.move_on_after(START_SECONDS):
        while True:
            if any(line.split()[4] == wanted for line in Path("/proc/self/mountinfo").read_text().splitlines()):
                return
            server.check()
            await trio.sleep(0.02)
    raise UnavailableError(f"{server.name} did not mount within {START_SECONDS:g} s: {server.why()}")


@contextlib.asynccontextmanager
async def _fuse_file(place: Place, name: str, argv: Callable[[Path, Path], list[str]]) -> AsyncIterator[Opened]:
    """A server that shows a backing file as a FUSE file, seen through a loop device as the engine's is."""
    backing, mountpoint = plain_file(place, f"{name}-data"), place.directory / f"{name}-file"
    mountpoint.touch()
    try:
        async with serving(name, argv(backing, mountpoint), place.directory) as server:
            try:
                await _mounted(mountpoint, server)
                async with loop_device(mountpoint) as device:
                    yield Opened(device, (server.pid,))
            finally:
                # nbdfuse leaves its mount when it is ended while something is open
                with contextlib.suppress(CommandError):
                    await run(["umount", "--quiet", "--lazy", str(mountpoint)])
    finally:
        backing.unlink()
        mountpoint.unlink()


def _quoted(path: Path) -> str:
    """For a value of qemu's option syntax, where a comma ends it."""
    return str(path).replace(",", ",,")


def _qsd(place: Place) -> AbstractAsyncContextManager[Opened]:
    def argv(backing: Path, mountpoint: Path) -> list[str]:
        return [
            "qemu-storage-daemon",
            "--blockdev",
            f"driver=file,node-name=disk,filename={_quoted(backing)},cache.direct=on",
            "--export",
            f"type=fuse,id=export,node-name=disk,mountpoint={_quoted(mountpoint)},writable=on,growable=off",
        ]

    return _fuse_file(place, "qsd", argv)


def _nbdkit(place: Place) -> AbstractAsyncContextManager[Opened]:
    def argv(backing: Path, mountpoint: Path) -> list[str]:
        # fails early with a name that says more than nbdfuse's own message
        if not shutil.which("nbdkit"):
            raise UnavailableError("nbdkit is not installed")
        return ["nbdfuse", str(mountpoint), "--command", "nbdkit", "--exit-with-parent", "-s", "file", str(backing)]

    return _fuse_file(place, "nbdkit", argv)


@contextlib.asynccontextmanager
async def _directory(place: Place, _: Opened | None) -> AsyncIterator[Opened]:
    path = place.directory / "files"
    path.mkdir()
    try:
        yield Opened(path)
    finally:
        shutil.rmtree(path)


@contextlib.asynccontextmanager
async def ext4_mounted(device: Path, mountpoint: Path, dirsync: bool = True) -> AsyncIterator[Path]:
    """A new ext4 on `device`, mounted as a share mounts it. Raises CommandError."""
    mountpoint.mkdir()
    try:
        # no lazy initialisation: it would write in the background of the measurement
        lazy = "nodiscard,lazy_itable_init=0,lazy_journal_init=0"
        await run(["mkfs.ext4", "-q", "-F", "-E", lazy, str(device)])
        await run(["mount", "-t", "ext4", "-o", mount_options("ext4", dirsync), str(device), str(mountpoint)])
        try:
            yield mountpoint
        finally:
            await run(["umount", str(mountpoint)])
    finally:
        mountpoint.rmdir()


def _ext4(name: str) -> Callable[[Place, Opened | None], AbstractAsyncContextManager[Opened]]:
    @contextlib.asynccontextmanager
    async def opened(place: Place, device: Opened | None) -> AsyncIterator[Opened]:
        assert device is not None
        async with ext4_mounted(device.path, place.directory / f"{name}-mount") as mountpoint:
            yield Opened(mountpoint, device.pids)

    return opened


BLOCK_TARGETS = (
    BlockTarget("plain", "plain file", 1, _plain),
    BlockTarget("loop", "loop on a plain file", 1, _loop),
    BlockTarget("engine-1", "engine, 1 replica, TCP", 1, _engine("engine-1", 1)),
    BlockTarget("engine-2", "engine, 2 replicas, TCP", 2, _engine("engine-2", 2)),
    BlockTarget("engine-3", "engine, 3 replicas, TCP", 3, _engine("engine-3", 3)),
    BlockTarget("engine-1-direct", "engine, 1 replica, TCP, io=direct", 1, _engine("engine-1-direct", 1, "direct")),
    BlockTarget("engine-3-direct", "engine, 3 replicas, TCP, io=direct", 3, _engine("engine-3-direct", 3, "direct")),
    BlockTarget("engine-3-unix", "engine, 3 replicas, unix sockets", 3, _engine("engine-3-unix", 3, unix=True)),
    BlockTarget("qsd", "qemu-storage-daemon, FUSE", 1, _qsd),
    BlockTarget("nbdkit", "nbdkit, nbdfuse", 1, _nbdkit),
)
FILE_TARGETS = (
    FileTarget("directory", "the directory itself", 1, None, _directory),
    FileTarget("ext4-loop", "ext4 on loop on a plain file", 0, "loop", _ext4("ext4-loop")),
    FileTarget("ext4-engine-3", "ext4 on the engine, 3 replicas", 0, "engine-3", _ext4("ext4-engine-3")),
)
