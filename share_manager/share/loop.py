"""A loop device over a file, with direct I/O so that nothing is cached twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import trio

from share_manager.errors import CommandError, KernelFeatureError, TimeoutProblem
from share_manager.share.commands import run
from share_manager.share.procfs import loop_backing

BLOCK = 4096
_ATTEMPTS = 8
DETACH_TIMEOUT = 3.0


async def attach_loop(file: Path, before: Callable[[str], None] = lambda device: None) -> str:
    """Attach `file` with 4 KiB blocks and direct I/O and return the device. Raises KernelFeatureError, CommandError."""
    for attempt in range(_ATTEMPTS):
        try:
            _, output = await run(
                "losetup", "--find", "--show", "--direct-io=on", "--sector-size", str(BLOCK), str(file), timeout=30
            )
        except CommandError:
            # another process took the free device between losetup's question and its claim
            if attempt == _ATTEMPTS - 1:
                raise
            await trio.sleep(0.05 * (attempt + 1))
            continue
        device = output.strip().splitlines()[-1]
        before(device)
        if Path(f"/sys/block/{Path(device).name}/loop/dio").read_text().strip() != "1":
            await detach_loop(device)
            raise KernelFeatureError(
                f"the loop device of {file} has no direct I/O",
                "data would be cached twice and a flush would not reach the engine; use a kernel from 4.10 on",
            )
        return device
    raise AssertionError("unreachable")


async def detach_loop(device: str, timeout: float = DETACH_TIMEOUT) -> None:
    """Detach and wait until the file is released. Does nothing for a free device. Raises TimeoutProblem."""
    backing = loop_backing(device)
    if backing is None:
        return
    with trio.move_on_after(timeout):
        while loop_backing(device) == backing:
            # status 1: it was free already, or a last user keeps it for a moment (losetup then clears it lazily)
            await run("losetup", "--detach", device, ok=(0, 1), timeout=30)
            if loop_backing(device) != backing:
                return
            await trio.sleep(0.02)
        return
    raise TimeoutProblem(f"detaching {device} (a process still uses it)", timeout)
