"""What is measured: each target is a context that holds something with a path, and gives it back."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from share_manager.bench.processes import Server, UnavailableError, run, serving
from share_manager.errors import CommandError

START_SECONDS = 60.0


@dataclass(frozen=True)
class Place:
    """Where a bench keeps its files, and how large each target is in bytes."""

    directory: Path
    size: int
    token: str


@dataclass(frozen=True)
class Opened:
    """A target that is ready: a file or device (a directory for file workloads), and the roots of its processes."""

    path: Path
    pids: tuple[int, ...] = ()


@dataclass(frozen=True)
class BlockTarget:
    """`copies` is how many times its size it occupies on disk."""

    name: str
    title: str
    copies: int
    open: Callable[[Place], AbstractAsyncContextManager[Opened]] = field(repr=False)


@dataclass(frozen=True)
class FileTarget:
    """`device` names the block target whose device gets a filesystem, if it is not ours alone."""

    name: str
    title: str
    copies: int
    device: str | None
    open: Callable[[Place, Opened | None], AbstractAsyncContextManager[Opened]] = field(repr=False)


def _plain_file(place: Place, name: str) -> Path:
    path = place.directory / f"{name}.img"
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, place.size)
    return path


@contextlib.asynccontextmanager
async def loop_device(file: Path) -> AsyncIterator[Path]:
    """`file` as a block device of 4 KiB sectors, past the page cache. Raises UnavailableError."""
    try:
        device = await run(["losetup", "--find", "--show", "--direct-io=on", "--sector-size=4096", str(file)])
    except CommandError as error:
        raise UnavailableError(f"no loop device with direct I/O: {error.output.strip()}") from error
    try:
        if Path("/sys/block", Path(device).name, "loop/dio").read_text().strip() != "1":
            raise UnavailableError("the loop driver refuses direct I/O on this filesystem")
        yield Path(device)
    finally:
        await run(["losetup", "--detach", device])
        await _detached(device)


async def _detached(device: str) -> None:
    """Detaching is lazy: whatever holds the device must be through before its file can go."""
    backing = Path("/sys/block", Path(device).name, "loop/backing_file")
    with trio.CancelScope(shield=True), trio.move_on_after(10):
        while backing.exists():  # noqa: ASYNC110 - sysfs gives no notice
            await trio.sleep(0.02)


@contextlib.asynccontextmanager
async def _plain(place: Place) -> AsyncIterator[Opened]:
    path = _plain_file(place, "plain")
    try:
        yield Opened(path)
    finally:
        path.unlink()


@contextlib.asynccontextmanager
async def _loop(place: Place) -> AsyncIterator[Opened]:
    path = _plain_file(place, "loop")
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


def _engine(replicas: int) -> Callable[[Place], AbstractAsyncContextManager[Opened]]:
    @contextlib.asynccontextmanager
    async def opened(place: Place) -> AsyncIterator[Opened]:
        name = f"engine-{replicas}"
        data = place.directory / name
        data.mkdir()
        argv = own_command(
            *("attach", f"bench-{place.token}-{replicas}", f"--size={place.size}", f"--data-dir={data}"),
            *(f"--replicas={replicas}", "--output=json"),
        )
        try:
            async with serving(name, argv, place.directory) as server:
                event = await ready_event(server)
                async with loop_device(Path(event["block_file"])) as device:
                    yield Opened(device, (server.pid,))
        finally:
            shutil.rmtree(data, ignore_errors=True)

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
    backing, mountpoint = _plain_file(place, f"{name}-data"), place.directory / f"{name}-file"
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


def _ext4(name: str) -> Callable[[Place, Opened | None], AbstractAsyncContextManager[Opened]]:
    @contextlib.asynccontextmanager
    async def opened(place: Place, device: Opened | None) -> AsyncIterator[Opened]:
        assert device is not None
        mountpoint = place.directory / f"{name}-mount"
        mountpoint.mkdir()
        try:
            # no lazy initialisation: it would write in the background of the measurement
            lazy = "nodiscard,lazy_itable_init=0,lazy_journal_init=0"
            await run(["mkfs.ext4", "-q", "-F", "-E", lazy, str(device.path)])
            # as a share mounts it
            await run(["mount", "-t", "ext4", "-o", "noatime,dirsync", str(device.path), str(mountpoint)])
            try:
                yield Opened(mountpoint, device.pids)
            finally:
                await run(["umount", str(mountpoint)])
        finally:
            mountpoint.rmdir()

    return opened


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def has_nfs_client() -> bool:
    """Whether this kernel can mount NFSv4, its module loaded if there is one."""
    with contextlib.suppress(CommandError, UnavailableError):
        await run(["modprobe", "--quiet", "nfsv4"])
    return any(line.split()[-1] == "nfs4" for line in Path("/proc/filesystems").read_text().splitlines())


@contextlib.asynccontextmanager
async def _nfs(place: Place, _: Opened | None) -> AsyncIterator[Opened]:
    if not await has_nfs_client():
        raise UnavailableError("this kernel has no NFSv4 client")
    data, mountpoint = place.directory / "nfs", place.directory / "nfs-mount"
    data.mkdir()
    mountpoint.mkdir()
    port = _free_port()
    argv = own_command(
        *("serve", f"bench-{place.token}-nfs", f"--size={place.size}", f"--data-dir={data}", "--replicas=3"),
        *("--bind=127.0.0.1", f"--port={port}", f"--metrics-port={_free_port()}", "--output=json"),
    )
    try:
        async with serving("nfs", argv, place.directory) as server:
            await ready_event(server)
            share = f"127.0.0.1:/bench-{place.token}-nfs"
            await run(["mount", "-t", "nfs4", "-o", f"vers=4.2,port={port}", share, str(mountpoint)])
            try:
                yield Opened(mountpoint, (server.pid,))
            finally:
                await run(["umount", str(mountpoint)])
    finally:
        mountpoint.rmdir()
        shutil.rmtree(data, ignore_errors=True)


BLOCK_TARGETS = (
    BlockTarget("plain", "plain file", 1, _plain),
    BlockTarget("loop", "loop on a plain file", 1, _loop),
    BlockTarget("engine-1", "engine, 1 replica", 1, _engine(1)),
    BlockTarget("engine-2", "engine, 2 replicas", 2, _engine(2)),
    BlockTarget("engine-3", "engine, 3 replicas", 3, _engine(3)),
    BlockTarget("qsd", "qemu-storage-daemon, FUSE", 1, _qsd),
    BlockTarget("nbdkit", "nbdkit, nbdfuse", 1, _nbdkit),
)
FILE_TARGETS = (
    FileTarget("directory", "the directory itself", 1, None, _directory),
    FileTarget("ext4-loop", "ext4 on loop on a plain file", 0, "loop", _ext4("ext4-loop")),
    FileTarget("ext4-engine-3", "ext4 on the engine, 3 replicas", 0, "engine-3", _ext4("ext4-engine-3")),
    FileTarget("nfs", "NFSv4.2 on ext4 on the engine, 3 replicas", 3, None, _nfs),
)
