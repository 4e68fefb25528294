"""`share-manager snapshot mount`, `browse`, `umount` and `cp` on real volumes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from share_manager.share.procfs import mount_at
from tests.share_manager.conftest import Running, run_command
from tests.share_manager.test_clone import Place
from tests.share_manager.test_serve import left_of, status_of, write_synced
from tests.share_manager.test_snapshot import Snapshots

pytestmark = pytest.mark.system

MIB = 1 << 20
Start = Callable[..., Running]


@pytest.fixture
def place(start: Start, tmp_path: Path) -> Place:
    return Place(start, tmp_path)


def copy(place: Place, *arguments: str, status: int = 0) -> dict[str, Any]:
    done = run_command("snapshot", "cp", "old", *arguments, *place.options, "--output", "json")
    assert done.returncode == status, done.stderr
    last: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return last


def read(path: Path) -> str:
    """By another process: one that forks while it holds a file of the mount open can hang."""
    return subprocess.run(["cat", str(path)], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("fs", ["ext4", "xfs"])
def test_files_come_back_from_a_snapshot_while_the_volume_is_served_and_when_it_is_not(
    place: Place, tmp_path: Path, fs: str
) -> None:
    size = "64Mi" if fs == "ext4" else "300Mi"
    share, data = place.serve("old", "--size", size, "--replicas", "2", "--fs", fs)
    (data / "docs").mkdir()
    (data / "docs" / "bulk").write_bytes(bulk := os.urandom(5 * MIB))
    write_synced(data / "docs" / "note", "as it was")
    (data / "docs" / "trap").symlink_to("/etc/passwd")
    snapshots = Snapshots("old", tmp_path)
    snapshots.run("create", "then")
    write_synced(data / "docs" / "note", "as it is")
    (data / "docs" / "bulk").unlink()

    assert copy(place, "then", "docs", str(tmp_path / "back"))["files"] == 2
    assert (tmp_path / "back" / "bulk").read_bytes() == bulk
    assert (tmp_path / "back" / "note").read_text() == "as it was"
    assert os.readlink(tmp_path / "back" / "trap") == "/etc/passwd"
    assert "not in this snapshot" in copy(place, "then", "nothing", str(tmp_path), status=5)["message"]
    assert "has no snapshot 'never'" in copy(place, "never", "docs", str(tmp_path), status=5)["message"]

    target = tmp_path / "mnt"
    target.mkdir()
    mounted = place.start("snapshot", "mount", "old", "then", str(target), *place.options)
    ready = mounted.wait_event("ready")
    assert ready["data"] == str(target / "data")
    found = mount_at(target)
    assert found is not None
    assert {"ro", "nosuid", "nodev"} <= found.options
    assert read(target / "data" / "docs" / "note") == "as it was"
    assert (data / "docs" / "note").read_text() == "as it is"
    assert "is being read" in snapshots.run("delete", "then", status=4)
    assert mounted.stop(signal.SIGINT) == (0, "")
    assert mount_at(target) is None
    assert status_of("old", tmp_path)["state"] == "running"
    assert share.stop() == (0, "")
    assert left_of("old") == []

    (tmp_path / "back2").mkdir()
    assert copy(place, "then", "docs/bulk", str(tmp_path / "back2"))["bytes"] == 5 * MIB
    assert (tmp_path / "back2" / "bulk").read_bytes() == bulk
    assert left_of("old") == []
    snapshots.run("delete", "then")


def test_whatever_is_killed_is_cleared(place: Place, tmp_path: Path) -> None:
    share, data = place.serve("old", "--size", "64Mi", "--replicas", "1")
    write_synced(data / "note", "as it was")
    snapshots = Snapshots("old", tmp_path)
    snapshots.run("create", "then")
    target, images = tmp_path / "mnt", tmp_path / "images"
    target.mkdir()
    images.mkdir()

    def mount() -> Running:
        mounted = place.start("snapshot", "mount", "old", "then", str(target), *place.options)
        mounted.wait_event("ready")
        assert read(target / "data" / "note") == "as it was"
        return mounted

    # the command itself: the next one clears up
    mounted = mount()
    mounted.process.kill()
    mounted.process.wait()
    done = run_command("snapshot", "umount", "old", *place.options)
    assert done.returncode == 0, done.stderr
    assert mount_at(target) is None
    # the process that serves the files: the command ends with an error
    mounted = mount()
    (server,) = [
        int(pid)
        for pid in os.listdir("/proc")
        if pid.isdigit() and b"engine.browse" in _command(pid) and _parent(pid) == mounted.process.pid
    ]
    os.kill(server, signal.SIGKILL)
    assert mounted.process.wait(30) == 1
    assert mount_at(target) is None
    # the share ends under it
    mounted = mount()
    browsed = place.start("snapshot", "browse", "old", str(images), *place.options)
    browsed.wait_event("ready")
    assert subprocess.run(["ls", str(images)], check=True, capture_output=True).stdout == b"then.img\n"
    assert share.stop() == (0, "")
    for one in (mounted, browsed):
        assert one.process.wait(30) == 1
    assert (mount_at(target), mount_at(images)) == (None, None)
    deadline = time.monotonic() + 10
    while left_of("old") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left_of("old") == []


def test_umount_has_the_mount_leave(place: Place, tmp_path: Path) -> None:
    share, _ = place.serve("old", "--size", "64Mi", "--replicas", "1")
    Snapshots("old", tmp_path).run("create", "then")
    assert share.stop() == (0, "")
    mounted = place.start("snapshot", "mount", "old", "then", *place.options)
    ready = mounted.wait_event("ready")
    assert mount_at(Path(ready["mountpoint"])) is not None
    done = run_command("snapshot", "umount", "old", "then", *place.options)
    assert done.returncode == 0, done.stderr
    assert mounted.process.wait(30) == 0
    assert left_of("old") == []
    done = run_command("snapshot", "mount", "old", "then", "/proc", *place.options)
    assert (done.returncode, "empty directory" in done.stderr) == (5, True)


def _command(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _parent(pid: str) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
