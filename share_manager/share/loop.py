"""A loop device over a file, with direct I/O so that nothing is cached twice."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Callable
from pathlib import Path

import trio

from share_manager.errors import CommandError, KernelFeatureError, TimeoutProblem
from share_manager.share.commands import run
from share_manager.share.onvolume import on_volume
from share_manager.share.procfs import loop_backing

BLOCK = 4096
# linux/loop.h
_LOOP_CLR_FD, _LOOP_CONFIGURE, _LOOP_CTL_GET_FREE = 0x4C01, 0x4C0A, 0x4C82
_READ_ONLY, _DIRECT_IO = 1, 16
_CONFIG = struct.Struct("=II 52xI64s112x 64x")
_ATTEMPTS = 8
LARGEST = 1 << 20
DETACH_TIMEOUT = 3.0


async def attach_loop(
    file: Path, before: Callable[[str], None] = lambda device: None, *, read_only: bool = False
) -> str:
    """Attach `file` with 4 KiB blocks and direct I/O and return the device. Raises KernelFeatureError, CommandError."""
    # the loop driver before Linux 6.16 believes the size that the kernel knows, which of a FUSE file is 0 at first
    await on_volume(os.stat, file)
    options = ["--direct-io=on", "--sector-size", str(BLOCK), *(["--read-only"] if read_only else [])]
    for attempt in range(_ATTEMPTS):
        try:
            device = await on_volume(_claim, file, read_only)
            if not device:
                _, output = await run("losetup", "--find", "--show", *options, str(file), timeout=30)
                device = output.strip().splitlines()[-1]
        except CommandError:
            # another process took the free device between losetup's question and its claim
            if attempt == _ATTEMPTS - 1:
                raise
            await trio.sleep(0.05 * (attempt + 1))
            continue
        before(device)
        if Path(f"/sys/block/{Path(device).name}/loop/dio").read_text().strip() != "1":
            await detach_loop(device)
            raise KernelFeatureError(
                f"the loop device of {file} has no direct I/O",
                "data would be cached twice and a flush would not reach the engine; use a kernel from 4.10 on",
            )
        await trio.to_thread.run_sync(_cut_at, device)
        return device
    raise AssertionError("unreachable")


def _claim(file: Path, read_only: bool) -> str:
    """As losetup does it, but without the time that a program takes to start; empty where that has to try, and to say
    why it fails."""
    how = os.O_RDONLY if read_only else os.O_RDWR
    with contextlib.ExitStack() as stack, contextlib.suppress(OSError):

        def opened(path: Path | str, how: int) -> int:
            fd = os.open(path, how | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            return fd

        backing, control = opened(file, how), opened("/dev/loop-control", os.O_RDWR)
        device = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
        flags = _DIRECT_IO | (_READ_ONLY if read_only else 0)
        config = _CONFIG.pack(backing, BLOCK, flags, os.fsencode(file)[:63])
        fcntl.ioctl(opened(device, how), _LOOP_CONFIGURE, config)
        return device
    return ""


def _cut_at(device: str) -> None:
    """Have no request larger than what one FUSE request takes: each of 1.25 MiB, the default, would become two."""
    with contextlib.suppress(OSError):
        Path(f"/sys/block/{Path(device).name}/queue/max_sectors_kb").write_text(str(LARGEST >> 10))


async def grow_loop(device: str, file: Path) -> None:
    """Have the device see that its file has grown. Raises CommandError."""
    # the loop driver before Linux 6.16 believes the size that the kernel knows already: have it ask for the new one
    await on_volume(os.stat, file)
    await run("losetup", "--set-capacity", device, timeout=30)


async def detach_loop(device: str, timeout: float = DETACH_TIMEOUT, *, below: Path | None = None) -> None:
    """Detach and wait until the file is released. Does nothing for a free device. Raises TimeoutProblem, CommandError.

    With `below` only what has a file at or below that path: a device that was let go of may be somebody else's by now.
    """
    backing = loop_backing(device)
    if backing is None or (below is not None and not (backing + "/").startswith(f"{below}/")):
        return
    with trio.move_on_after(timeout):
        while loop_backing(device) == backing:
            # a last user may keep it for a moment: the kernel clears it when that is gone
            try:
                await on_volume(_clear, device, backing)
            except OSError as error:
                raise CommandError(["losetup", "--detach", device], error.errno or 1, str(error)) from error
            if loop_backing(device) != backing:
                return
            await trio.sleep(0.02)
        return
    raise TimeoutProblem(f"detaching {device} (a process still uses it)", timeout)


def _clear(device: str, backing: str) -> None:
    """While it is open here it cannot become another one's between the look and the ioctl. Raises OSError."""
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if loop_backing(device) == backing:
            with contextlib.suppress(OSError):  # ENXIO: it has become free
                fcntl.ioctl(fd, _LOOP_CLR_FD)
    finally:
        os.close(fd)
