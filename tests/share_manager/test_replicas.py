"""Replicas of a volume that nobody serves, and of one that is attached, by command."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.record import FileRecordStore
from engine.store import inspect_replica
from share_manager.paths import VolumePaths
from share_manager.volumes import create_volume, delete_volume, make_data_dir, volume_lock
from tests.share_manager.conftest import Running, run_command, runtime_directories

pytestmark = pytest.mark.system

MIB = 1 << 20


@pytest.fixture
def paths(root: None, tmp_path: Path) -> VolumePaths:
    paths = VolumePaths(make_data_dir(tmp_path / "data"), "copies")
    with volume_lock(paths, "first"):
        create_volume(paths, size=64 * MIB, replicas=2)
    return paths


def command(paths: VolumePaths, *words: str, status: int = 0) -> list[dict[str, Any]]:
    done = run_command("replica", *words, "--data-dir", str(paths.data_dir), "--output", "json")
    assert done.returncode == status, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def listed(paths: VolumePaths) -> dict[str, dict[str, Any]]:
    done = run_command("replica", "list", "copies", "--data-dir", str(paths.data_dir), "--output", "json")
    assert done.returncode == 0, done.stderr
    return {replica["name"]: replica for replica in json.loads(done.stdout)}


def head(directory: Path) -> bytes:
    return (directory / inspect_replica(directory).chain[0]).read_bytes()


def test_replicas_of_a_volume_that_nobody_uses(paths: VolumePaths, tmp_path: Path) -> None:
    elsewhere = tmp_path / "disk2" / "copy"
    events = command(paths, "add", "copies", "--directory", str(elsewhere))
    assert [event["event"] for event in events if event["event"].startswith("replica_")] == [
        "replica_started", "replica_added", "replica_in_sync",
    ]  # fmt: skip
    assert {name: replica["state"] for name, replica in listed(paths).items()} == {
        "r1": "in_sync", "r2": "in_sync", "r3": "in_sync",
    }  # fmt: skip
    assert listed(paths)["r3"]["directory"] == str(elsewhere)
    assert not inspect_replica(elsewhere).rebuilding
    command(paths, "remove", "copies", "r1", "--delete")
    assert not paths.replica("r1").exists()
    command(paths, "remove", "copies", "r2")
    assert paths.replica("r2").exists()
    refused = run_command("replica", "remove", "copies", "r3", "--data-dir", str(paths.data_dir))
    assert refused.returncode == 4
    assert "only one of volume 'copies' that is in sync" in refused.stderr
    record = FileRecordStore(paths.record).read()
    assert ([replica.name for replica in record.replicas], record.in_sync) == (["r3"], ("r3",))
    # a replica elsewhere stays where it is when the data directory is moved, and is deleted with its volume
    moved = VolumePaths(make_data_dir(tmp_path / "moved"), "copies")
    paths.directory.rename(moved.directory)
    command(moved, "add", "copies")
    assert {name: Path(replica["directory"]) for name, replica in listed(moved).items()} == {
        "r3": elsewhere, "r4": moved.replica("r4"),
    }  # fmt: skip
    with volume_lock(moved, "first"):
        delete_volume(moved)
    assert not elsewhere.exists()
    assert runtime_directories("copies") == []


def test_what_cannot_be_said(paths: VolumePaths, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    for words, status, message in (
        (("add", "copies", "--name", "engine"), 2, "no process's name"),
        (("add", "copies", "--name", "r1"), 2, "has a replica r1 already"),
        (("add", "copies", "--directory", "here"), 2, "not an absolute path"),
        (("add", "copies", "--directory", str(tmp_path / "full")), 6, "is not empty"),
        (("remove", "copies", "r9"), 2, "there are r1, r2"),
        (("recreate", "copies", "r1"), 4, "is in sync"),
        (("move", "copies", "r9", "--to", "/nowhere"), 2, "there are r1, r2"),
    ):
        done = run_command("replica", *words, "--data-dir", str(paths.data_dir))
        assert (done.returncode, message in done.stderr) == (status, True), done.stderr
        assert done.stderr.count("\n") == 1
    assert set(os.listdir(paths.directory / "replicas")) == {"r1", "r2"}


def test_replicas_of_an_attached_volume(paths: VolumePaths, start: Callable[..., Running], tmp_path: Path) -> None:
    running = start("attach", "copies", "--data-dir", str(paths.data_dir))
    block = Path(running.wait_event("ready")["block_file"])
    data = os.urandom(24 * MIB)
    with block.open("r+b", buffering=0) as file:
        file.write(data)
        os.fsync(file.fileno())
    events = command(paths, "move", "copies", "r2", "--to", str(tmp_path / "disk2"), "--rate", "8Mi")
    told = [event for event in events if event["event"] == "resync_progress"]
    assert told
    assert all(0 <= event["done_bytes"] <= event["total_bytes"] for event in told)
    assert any(event["rate"] > 0 and event["left"] is not None for event in told)
    assert events[-1]["event"] == "replica_moved"
    assert not paths.replica("r2").exists()
    # a directory that is lost while its server runs: the server goes on with what it has open, until it is restarted
    shutil.rmtree(paths.replica("r1"))
    command(paths, "recreate", "copies", "r1", status=4)
    pid = listed_pid(paths, "r1")
    os.kill(pid, 9)
    with block.open("r+b", buffering=0) as file:
        file.seek(24 * MIB)
        file.write(data[:MIB])
        os.fsync(file.fileno())
    command(paths, "recreate", "copies", "r1", "--rate", "0")
    assert {replica["state"] for replica in listed(paths).values()} == {"in_sync"}
    code, _ = running.stop()
    assert code == 0
    assert head(paths.replica("r1")) == head(tmp_path / "disk2")
    assert head(paths.replica("r1"))[: 25 * MIB] == data + data[:MIB]
    assert runtime_directories("copies") == []


def listed_pid(paths: VolumePaths, name: str) -> int:
    done = run_command("status", "copies", "--data-dir", str(paths.data_dir), "--output", "json")
    return next(int(one["pid"]) for one in json.loads(done.stdout)["replicas"] if one["name"] == name)
