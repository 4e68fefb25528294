"""Engines that are measured."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest
import trio

from share_manager.bench.engines import engine_file


@pytest.mark.system
async def test_an_engine_that_dies_fails_whoever_uses_its_file(tmp_path: Path) -> None:
    async with engine_file(1)(tmp_path, "engine", 8 << 20) as (file, pids):
        fd = os.open(file, os.O_RDWR)
        try:
            assert os.pread(fd, 4096, 0) == bytes(4096)
            os.kill(pids[-1], signal.SIGKILL)
            with trio.fail_after(30), pytest.raises(OSError, match=r"endpoint|abort|I/O"):
                while True:
                    await trio.to_thread.run_sync(os.pread, fd, 4096, 4096, abandon_on_cancel=True)
        finally:
            with contextlib.suppress(OSError):  # says so too
                os.close(fd)
