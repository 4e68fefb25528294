"""A volume in use grows, and gives back what its filesystem does not use."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from engine.record import FileRecordStore
from engine.store import inspect_replica
from share_manager.share.procfs import CAP_SYS_RESOURCE, holds_capability
from tests.share_manager.conftest import Running, run_command

pytestmark = pytest.mark.system

MIB = 1 << 20
Start = Callable[..., Running]


def ask(*arguments: str, data_dir: Path) -> dict[str, Any]:
    done = run_command(*arguments, "--data-dir", str(data_dir), "--output", "json")
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def serve(start: Start, volume: str, tmp_path: Path, port: int, *options: str) -> tuple[Running, Path]:
    place = ("--data-dir", str(tmp_path), "--port", str(port))
    share = start("serve", volume, *place, "--lease-lifetime", "10", "--grace-period", "10", *options)
    return share, Path(share.wait_event("ready")["mountpoint"]) / "data"


@contextmanager
def appending(path: Path) -> Iterator[list[int]]:
    """Appends to the file and syncs it, over and over; lengths that were synced."""
    synced: list[int] = []
    failed: list[OSError] = []
    stop = threading.Event()

    def work() -> None:
        try:
            with path.open("wb", buffering=0) as file:
                while not stop.is_set():
                    file.write(f"{len(synced):8d}".encode() * 512)
                    os.fsync(file.fileno())
                    synced.append(file.tell())
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield synced
    finally:
        stop.set()
        thread.join()
    assert not failed


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


@pytest.mark.parametrize(("fs", "small", "large"), [("ext4", 64, 512), ("xfs", 320, 512)])
def test_a_served_share_grows_while_clients_write(
    start: Start, tmp_path: Path, free_port: int, fs: str, small: int, large: int
) -> None:
    volume = f"grows{fs}"
    options = ("--size", f"{small}Mi", "--replicas", "2", "--fs", fs)
    share, data = serve(start, volume, tmp_path, free_port, *options)
    before = os.statvfs(data)
    with appending(data / "log") as synced:
        wait_for(lambda: len(synced) > 5, "writes")
        told = ask("volume", "resize", volume, f"{large}Mi", data_dir=tmp_path)
        online = fs == "xfs" or holds_capability(CAP_SYS_RESOURCE)
        assert (told["size_bytes"], told["filesystem"]) == (large * MIB, "grown" if online else "later")
        so_far = len(synced)
        wait_for(lambda: len(synced) > so_far + 5, "writes go on")
    if not online:
        assert share.stop() == (0, "")
        share, data = serve(start, volume, tmp_path, free_port)
    after = os.statvfs(data)
    assert after.f_blocks * after.f_frsize > before.f_blocks * before.f_frsize + (large - small) * MIB * 0.8
    # room for more than the old volume
    with (data / "large").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, (small + 40) * MIB)
    if online:
        assert ask("volume", "resize", volume, f"{large}Mi", data_dir=tmp_path)["filesystem"] == "full size already"
    refused = run_command("volume", "resize", volume, f"{small}Mi", "--data-dir", str(tmp_path))
    assert refused.returncode == 2
    assert "can only grow, not shrink" in refused.stderr
    status = ask("status", volume, data_dir=tmp_path)
    assert status["size_bytes"] == large * MIB
    assert Path(status["engine"]["block_file"]).stat().st_size == large * MIB
    assert {one["state"] for one in status["replicas"]} == {"in_sync"}
    volume_dir = tmp_path / "volumes" / volume
    assert FileRecordStore(volume_dir / "record.json").read().size == large * MIB
    for name in ("r1", "r2"):
        assert inspect_replica(volume_dir / "replicas" / name).size == large * MIB
    assert share.stop() == (0, "")
    share, data = serve(start, volume, tmp_path, free_port)
    assert (data / "log").stat().st_size >= synced[-1]
    assert "checked" not in [event["event"] for event in share.events]
    assert share.stop() == (0, "")


def test_an_attached_file_grows_and_so_does_a_volume_at_rest(start: Start, tmp_path: Path) -> None:
    attached = start("attach", "block", "--size", "64Mi", "--replicas", "2", "--data-dir", str(tmp_path))
    file = Path(attached.wait_event("ready")["block_file"])
    assert ask("volume", "resize", "block", "128Mi", data_dir=tmp_path)["filesystem"] == "none"
    assert file.stat().st_size == 128 * MIB
    fd = os.open(file, os.O_RDWR)
    try:
        assert os.pwrite(fd, b"end", 128 * MIB - 3) == 3
        os.fsync(fd)
    finally:
        os.close(fd)
    assert attached.stop()[0] == 0
    ask("volume", "resize", "block", "192Mi", data_dir=tmp_path)
    attached = start("attach", "block", "--data-dir", str(tmp_path))
    file = Path(attached.wait_event("ready")["block_file"])
    fd = os.open(file, os.O_RDONLY)
    try:
        assert os.pread(fd, 4, 128 * MIB - 3) == b"end\0"
        assert os.lseek(fd, 0, os.SEEK_END) == 192 * MIB
    finally:
        os.close(fd)
    assert attached.stop()[0] == 0


def allocated(directory: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in directory.glob("*.img"))


def test_trim_gives_space_back_to_the_disk_of_every_replica(start: Start, tmp_path: Path, free_port: int) -> None:
    share, data = serve(start, "trims", tmp_path, free_port, "--size", "256Mi", "--replicas", "2")
    replicas = [tmp_path / "volumes" / "trims" / "replicas" / name for name in ("r1", "r2")]
    kept = os.urandom(5 * MIB)
    (data / "kept").write_bytes(kept)
    with (data / "large").open("wb") as file:
        file.write(os.urandom(96 * MIB))
        os.fsync(file.fileno())
    os.unlink(data / "large")
    full = [allocated(replica) for replica in replicas]
    told = ask("volume", "trim", "trims", data_dir=tmp_path)
    assert told["discarded_bytes"] >= 96 * MIB
    after = [allocated(replica) for replica in replicas]
    assert all(then - now > 80 * MIB for then, now in zip(full, after, strict=True)), (full, after)
    assert told["freed_bytes"] > 160 * MIB
    assert share.stop() == (0, "")
    share, data = serve(start, "trims", tmp_path, free_port)
    assert (data / "kept").read_bytes() == kept
    assert share.stop() == (0, "")
    refused = run_command("volume", "trim", "trims", "--data-dir", str(tmp_path))
    assert refused.returncode == 4
