"""A replica whose disk stalls: it goes on telling that it is there, and what it has seen."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from engine.controller import watch as watching
from engine.controller.driver import Controller
from tests.engine.cluster import Cluster, cluster, until

STALLING = """
import os, pathlib, sys, time

real = os.fdatasync

def fdatasync(fd):
    while pathlib.Path(sys.argv[2]).exists():
        time.sleep(0.01)
    real(fd)

os.fdatasync = fdatasync
from engine.replica.__main__ import main
sys.exit(main(sys.argv[1:2]))
"""


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Cluster]:
    """The disk of r1 stalls while there is a file "stall"."""
    with cluster(tmp_path, replicas=2, tcp=True) as made:
        made.kill("r1")
        with (tmp_path / "r1.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", STALLING, str(tmp_path / "r1.json"), str(tmp_path / "stall")],
                stdout=subprocess.PIPE,
                stderr=log,
            )
        made.processes["r1"] = process
        assert process.stdout is not None
        assert b"listening" in process.stdout.readline()
        yield made


@asynccontextmanager
async def settled(two: Cluster, request_timeout: float) -> AsyncIterator[Controller]:
    """Attached, with watches, and with an engine that expects a flush behind each write."""
    async with two.attached(request_timeout, right_lasts=1.0) as volume:
        with trio.fail_after(10):
            while any(connection.watch is None for connection in volume.connected(-1)):
                await trio.sleep(0.01)
        for _ in range(50):
            await step(volume)
        yield volume


async def step(volume: Controller) -> None:
    await volume.write(0, os.urandom(4096))
    await volume.flush()


async def test_a_disk_that_stalls_costs_neither_the_right_nor_the_replica(two: Cluster, tmp_path: Path) -> None:
    stall = tmp_path / "stall"
    async with settled(two, request_timeout=1.0) as volume:
        for _ in range(20):
            stall.touch()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(step, volume)
                # it does nothing else, unless the disk was slow lately
                with trio.move_on_after(0.5) as waited:
                    await two.status("r1")
                if not waited.cancelled_caught:
                    stall.unlink()
                    continue
                await still_trusted(volume)
                stall.unlink()
            break
        else:
            pytest.fail("no flush was synced in place")
        assert volume.record.in_sync == ("r1", "r2")
        assert volume.core.reason("r1") == ""
    two.stop()
    two.assert_identical()


async def still_trusted(volume: Controller) -> None:
    """For longer than the right lasts, and a ping may take."""
    for _ in range(40):
        await trio.sleep(0.1)
        assert volume.right.right.until > time.monotonic()
    assert volume.record.in_sync == ("r1", "r2")


async def test_a_process_that_stands_still_is_left_after_a_ping(two: Cluster) -> None:
    async with settled(two, request_timeout=1.0) as volume:
        two.processes["r1"].send_signal(signal.SIGSTOP)
        with trio.fail_after(6):
            await step(volume)
        assert set(volume.record.in_sync) == {"r2"}
        two.processes["r1"].send_signal(signal.SIGCONT)
        await until(lambda: set(volume.record.in_sync) == {"r1", "r2"})
    two.stop()
    two.assert_identical()


async def test_a_watch_that_ends_is_replaced_and_costs_nothing(two: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "PAUSE_SECONDS", 0.05)
    async with settled(two, request_timeout=1.0) as volume:
        connection = volume.connection("r1")
        assert connection is not None
        for _ in range(5):
            before = connection.watch
            assert isinstance(before, watching.Watch)
            # on its way there when it ends
            assert before.ping(1 << 40, b"")
            before.close()
            await until(lambda before=before: connection.watch not in (None, before))
            await step(volume)
        assert not connection.closed
        assert volume.record.in_sync == ("r1", "r2")
