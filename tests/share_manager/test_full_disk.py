"""A share whose replicas' disks run full: clients get errors, and the filesystem is whole when there is room again."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.disks import MIB, fill, move_onto, small_disk
from tests.share_manager.conftest import Running, run_command

pytestmark = pytest.mark.system


@pytest.fixture
def disks(root: None, tmp_path: Path) -> Iterator[list[Path]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(small_disk(tmp_path / name, 96 * MIB)) for name in ("r1", "r2")]


def try_to_write(path: Path, size: int) -> bool:
    try:
        with path.open("wb", buffering=0) as file:
            for _ in range(size // MIB):
                file.write(os.urandom(MIB))
                os.fsync(file.fileno())
    except OSError:
        return False
    return True


def test_the_filesystem_is_clean_after_all_disks_were_full(
    start: Callable[..., Running], tmp_path: Path, disks: list[Path], free_port: int
) -> None:
    place = ("--data-dir", str(tmp_path / "data"))
    serve = ("serve", "full", *place, "--port", str(free_port), "--lease-lifetime", "10", "--grace-period", "10")
    share = start(*serve, "--size", "256Mi", "--replicas", "2")
    share.wait_event("ready")
    assert share.stop() == (0, "")
    replicas = tmp_path / "data" / "volumes" / "full" / "replicas"
    for name, disk in zip(("r1", "r2"), disks, strict=True):
        move_onto(replicas / name, disk)
    share = start(*serve)
    data = Path(share.wait_event("ready")["mountpoint"]) / "data"
    kept = os.urandom(3 * MIB)
    (data / "kept").write_bytes(kept)
    with (data / "kept").open("rb") as file:
        os.fsync(file.fileno())
    for disk in disks:
        fill(disk, leave=8 * MIB)
    assert not try_to_write(data / "large", 64 * MIB)
    for disk in disks:
        (disk / "ballast").unlink()

    deadline = time.monotonic() + 60
    while not try_to_write(data / "again", 2 * MIB):
        assert time.monotonic() < deadline, run_command("status", "full", *place, "--output", "json").stdout
        time.sleep(0.2)
    assert (data / "kept").read_bytes() == kept
    while True:
        status = json.loads(run_command("status", "full", *place, "--output", "json").stdout)
        if [one["state"] for one in status["replicas"]] == ["in_sync", "in_sync"] and status["state"] == "running":
            break
        assert time.monotonic() < deadline, status
        time.sleep(0.2)
    assert share.stop() == (0, "")
    attached = start("attach", "full", *place)
    block_file = attached.wait_event("ready")["block_file"]
    checked = subprocess.run(["e2fsck", "-f", "-n", block_file], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    assert attached.stop()[0] == 0
