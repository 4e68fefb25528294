"""`share-manager snapshot` on real volumes: served under load, and stopped."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from engine.store import Store
from share_manager.cli.snapshot import default_name, parse_labels
from share_manager.errors import FilesystemError, InvalidValueError, TimeoutProblem
from share_manager.share import freeze
from share_manager.share.filesystem import ext4_flags, ext4_superblock
from tests.share_manager.conftest import Running, run_command
from tests.share_manager.test_serve import left_of, status_of, write_synced

MIB = 1 << 20
Start = Callable[..., Running]


def test_labels() -> None:
    assert parse_labels(["a=b", "c=d=e", "f="]) == {"a": "b", "c": "d=e", "f": ""}
    for wrong in ("a", "=b", ""):
        with pytest.raises(InvalidValueError):
            parse_labels([wrong])


def test_the_default_name_is_the_time() -> None:
    assert default_name(86400.0) == "snap-19700102-000000"


class Snapshots:
    """The commands, on one volume."""

    def __init__(self, volume: str, data_dir: Path) -> None:
        self.volume = volume
        self.place = ("--data-dir", str(data_dir))

    def run(self, command: str, *arguments: str, status: int = 0) -> Any:
        done = run_command("snapshot", command, self.volume, *arguments, *self.place, "--output", "json")
        assert done.returncode == status, done.stderr
        return json.loads(done.stdout) if status == 0 else done.stderr

    def names(self) -> list[str]:
        return [entry["name"] for entry in self.run("list")["snapshots"] if not entry["removed"]]


def extract(replica: Path, snapshot: str, image: Path) -> None:
    """The volume as it was, as a file."""
    store = Store.open(replica)
    try:
        with image.open("wb") as out:
            out.truncate(store.size)
            for at in range(0, store.size, MIB):
                data = store.read_snapshot(snapshot, at, MIB)
                if data.strip(b"\0"):
                    out.seek(at)
                    out.write(data)
    finally:
        store.close()


class Writers:
    """Threads that write and fsync files, and count."""

    def __init__(self, directory: Path) -> None:
        self.written = 0
        self._directory = directory
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._write, args=(number,)) for number in range(3)]

    def _write(self, number: int) -> None:
        while not self._stop.is_set():
            write_synced(self._directory / f"w{number}-{self.written % 50}", os.urandom(2000).hex())
            self.written += 1

    def __enter__(self) -> Writers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


@pytest.mark.system
def test_a_served_volume_is_snapshotted_at_rest_and_brought_back(start: Start, tmp_path: Path, free_port: int) -> None:
    place = ("--data-dir", str(tmp_path))
    serve = ("serve", "past", *place, "--port", str(free_port), "--lease-lifetime", "10", "--grace-period", "10")
    share = start(*serve, "--size", "64Mi", "--replicas", "2")
    share.wait_event("ready")
    snapshots = Snapshots("past", tmp_path)
    data = Path(status_of("past", tmp_path)["mountpoint"]) / "data"
    write_synced(data / "old", "old")
    with Writers(data) as writers:
        made = snapshots.run("create", "before", "--label", "why=test")
        seen = writers.written
        while writers.written < seen + 20:
            time.sleep(0.01)
    assert (made["name"], made["held"] < 5) == ("before", True)
    write_synced(data / "old", "new")
    assert "already: choose another name" in snapshots.run("create", "before", status=4)
    assert snapshots.run("create")["name"].startswith("snap-")
    assert "share-manager stop past" in snapshots.run("revert", "before", "--yes", status=4)
    found = snapshots.run("list")
    assert found["snapshots"][0]["labels"] == {"why": "test"}
    assert "before" in run_command("snapshot", "list", "past", *place).stdout
    assert share.stop() == (0, "")

    image = tmp_path / "image"
    for replica in ("r1", "r2"):
        extract(tmp_path / "volumes" / "past" / "replicas" / replica, "before", image)
        # nothing to replay, and nothing to repair
        assert ext4_flags(ext4_superblock(str(image))) == (False, False)
        subprocess.run(["e2fsck", "-f", "-n", str(image)], check=True, capture_output=True)

    assert "has no snapshot 'never'" in snapshots.run("revert", "never", "--yes", status=5)
    assert not (tmp_path / "volumes" / "past" / "drop-recovery").exists()
    refused = run_command("snapshot", "revert", "past", "before", *place)
    assert (refused.returncode, "add --yes" in refused.stderr) == (2, True)
    snapshots.run("revert", "before", "--yes")
    assert (tmp_path / "volumes" / "past" / "drop-recovery").exists()
    share = start(*serve)
    share.wait_event("ready")
    assert "recovery_dropped" in [event["event"] for event in share.events]
    assert not (tmp_path / "volumes" / "past" / "drop-recovery").exists()
    assert (data / "old").read_text() == "old"
    assert share.stop() == (0, "")
    assert left_of("past") == []


@pytest.mark.system
def test_a_stopped_volume_is_snapshotted_and_purged(root: None, tmp_path: Path) -> None:
    from share_manager.paths import VolumePaths
    from share_manager.volumes import create_volume, make_data_dir, volume_lock

    paths = VolumePaths(make_data_dir(tmp_path), "still")
    with volume_lock(paths, "first"):
        create_volume(paths, size=MIB, replicas=2)
    snapshots = Snapshots("still", tmp_path)
    for name in ("a", "b"):
        snapshots.run("create", name)
    assert "cannot be the name of a snapshot" in snapshots.run("create", "a/b", status=1)
    snapshots.run("delete", "a")
    assert "has no snapshot 'a'" in snapshots.run("delete", "a", status=5)
    assert snapshots.run("purge")["merged"] in ([], ["a"])
    assert [entry["name"] for entry in snapshots.run("list")["snapshots"]] == ["b"]


@pytest.fixture
def mounted(make_loop: Callable[[int], str], tmp_path: Path) -> Iterator[Path]:
    device, target = make_loop(16 * MIB), tmp_path / "mnt"
    target.mkdir()
    subprocess.run(["mkfs.ext4", "-q", device], check=True)
    subprocess.run(["mount", device, str(target)], check=True)
    yield target
    subprocess.run(["umount", str(target)], check=True)


def is_frozen(target: Path) -> bool:
    """By trying: a second freeze is refused."""
    fd = os.open(target, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, freeze._FIFREEZE, 0)
    except OSError:
        return True
    else:
        fcntl.ioctl(fd, freeze._FITHAW, 0)
        return False
    finally:
        os.close(fd)


@pytest.mark.system
async def test_a_freeze_ends_with_its_block_whatever_happens(mounted: Path) -> None:
    async with freeze.frozen(mounted):
        assert is_frozen(mounted)
        with pytest.raises(FilesystemError, match="somebody else has frozen it"):
            async with freeze.frozen(mounted):
                pass
        assert is_frozen(mounted)
    assert not is_frozen(mounted)
    with pytest.raises(ValueError):
        async with freeze.frozen(mounted):
            raise ValueError
    assert not is_frozen(mounted)
    with trio.move_on_after(0.1):
        async with freeze.frozen(mounted):
            await trio.sleep_forever()
    assert not is_frozen(mounted)


@pytest.mark.system
async def test_a_freeze_that_comes_too_late_undoes_itself(mounted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, done = threading.Event(), threading.Event()
    real = freeze._Freeze.freeze

    def late(self: freeze._Freeze) -> None:
        go.wait()
        real(self)
        done.set()

    monkeypatch.setattr(freeze._Freeze, "freeze", late)
    with pytest.raises(TimeoutProblem):
        async with freeze.frozen(mounted, timeout=0.05):
            pass
    go.set()
    await trio.to_thread.run_sync(done.wait)
    assert not is_frozen(mounted)


@pytest.mark.system
@pytest.mark.parametrize("with_engine", [False, True])
def test_a_share_manager_killed_while_its_filesystem_is_frozen_leaves_nothing_that_hangs(
    start: Start, tmp_path: Path, free_port: int, with_engine: bool
) -> None:
    share = start(
        *("serve", "ice", "--data-dir", str(tmp_path), "--port", str(free_port), "--size", "64Mi", "--replicas", "1"),
        *("--lease-lifetime", "10", "--grace-period", "10"),
    )
    share.wait_event("ready")
    status = status_of("ice", tmp_path)
    mountpoint = Path(status["mountpoint"])
    fd = os.open(mountpoint, os.O_RDONLY)
    fcntl.ioctl(fd, freeze._FIFREEZE, 0)
    os.close(fd)
    share.stop(signal.SIGKILL)
    if with_engine:
        os.kill(status["engine"]["pid"], signal.SIGKILL)
    began = time.monotonic()
    assert run_command("stop", "ice", "--data-dir", str(tmp_path)).returncode == 0
    assert time.monotonic() - began < 25
    assert left_of("ice") == []
