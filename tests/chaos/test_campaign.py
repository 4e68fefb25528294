"""A short campaign in earnest, as `python -m tests.chaos` runs it for longer; and the parts of it that can fail."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import trio

from engine.store import Store, create_replica
from share_manager.share.commands import run
from tests.chaos.campaign import Options, campaign
from tests.chaos.disk import disks
from tests.chaos.faults import ENGINE, Fault, Held, Kind, kill
from tests.chaos.field import Field, differences, workplace
from tests.chaos.report import lines
from tests.conftest import Progress
from tests.engine.cluster import UUID

pytestmark = pytest.mark.system

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _root() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")


async def test_a_short_campaign_loses_nothing(progress: Progress) -> None:
    told: list[str] = []
    report = await campaign(Options(seconds=25.0, seed=4), told.append)
    for line in lines(report):
        progress(line)
    assert report.problems == [], "\n".join(told)
    assert report.survived == report.injected >= 5
    assert report.totals.verified > 50
    assert report.totals.syncs > 50
    assert report.fsck == "e2fsck -fn: clean"


async def test_a_disk_that_is_full_has_no_room_and_one_without_power_forgets_what_was_not_synced() -> None:
    with workplace() as (directory, _):
        async with disks(directory, ["r1"], 16 * MIB) as made:
            disk = made["r1"]
            disk.fill()
            with pytest.raises(OSError, match="No space"):
                (disk.place / "more").write_bytes(bytes(MIB))
            (disk.place / "more").unlink()
            disk.free()
            (disk.place / "synced").write_bytes(b"kept")
            fd = os.open(disk.place / "synced", os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
            (disk.place / "cached").write_bytes(b"gone")
            disk.cut()
            with pytest.raises(OSError):
                (disk.place / "later").write_bytes(b"x")
            await disk.release(lambda: None)
            await disk.mount()
            assert (disk.place / "synced").read_bytes() == b"kept"
            assert not (disk.place / "cached").exists()


async def test_a_single_differing_byte_is_found() -> None:
    with workplace() as (directory, _):
        async with disks(directory, ["r1", "r2"], 16 * MIB) as made:
            for name, disk in made.items():
                create_replica(disk.place / "replica", volume="vol", uuid=UUID, replica=name, size=4 * MIB)
            assert differences(made, 4 * MIB) == []
            store = Store.open(made["r2"].place / "replica")
            store.write(3 * MIB + 4096, bytes(99) + b"\1" + bytes(3996))
            store.close()
            assert differences(made, 4 * MIB) == [f"r2 differs from r1 at byte {3 * MIB + 4096 + 99}"]


async def test_a_campaign_that_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as errors:
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "tests.chaos", "--minutes", "5", "--seed", "1", "--output", "json"],
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
    with trio.fail_after(60):
        while b"FAULT" not in log.read_bytes():
            await trio.sleep(0.1)
        process.send_signal(signal.SIGINT)
        # it says so itself when it leaves something behind
        assert await process.wait() == 130, log.read_text()
    assert not list(Path("/tmp").glob(f"sm-lab-{process.pid}-*"))


async def test_a_volume_that_goes_back_in_time_fails_the_campaign() -> None:
    """All replicas alike fall back to what they held some seconds before: only the workload can know."""

    once = trio.Semaphore(1)

    async def go_back(field: Field, fault: Fault) -> bool:
        await once.acquire()
        with Held(field, [ENGINE, *field.names]) as held:
            held.send(signal.SIGSTOP)
            for disk in field.disks.values():
                await run("sync", "--file-system", str(disk.place))
                await run("cp", "--sparse=always", str(disk.image), f"{disk.image}.old")
            held.send(signal.SIGCONT)
        await trio.sleep(4.0)
        with trio.CancelScope(shield=True):
            kill(field, ENGINE, *field.names)
            for disk in field.disks.values():
                await disk.release(partial(kill, field, disk.name))
                Path(f"{disk.image}.old").rename(disk.image)
            for disk in field.disks.values():
                await disk.mount()
        return True

    told: list[str] = []
    report = await campaign(Options(seconds=9.0, seed=1, kinds=[Kind("go back", go_back, 1)], pace=10.0), told.append)
    assert report.totals.lost_bytes + report.totals.lost_names > 0, "\n".join(told)
    assert not report.ok
    assert "FAILED" in lines(report)[-1]
