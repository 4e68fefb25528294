"""The whole process on one machine, with real parts; kernel clients and kills under load are in tests/system."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from engine.record import FileRecordStore, bump_epoch
from ganesha import Nfs4Error, export_handle
from share_manager.share.procfs import loops_below, mounts_below, processes_naming
from tests.share_manager.conftest import Running, run_command, runtime_directories

pytestmark = pytest.mark.system

Start = Callable[..., Running]


def status_of(volume: str, data_dir: Path) -> dict[str, Any]:
    done = run_command("status", volume, "--data-dir", str(data_dir), "--output", "json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def left_of(volume: str) -> list[object]:
    directories = [Path("/run/share-manager") / name for name in runtime_directories(volume)]
    return [
        *directories,
        *(mount for directory in directories for mount in mounts_below(directory)),
        *(loop for directory in directories for loop in loops_below(directory)),
        *(pid for directory in directories for pid in processes_naming(directory)),
    ]


def wait_gone(pid: int) -> None:
    while Path(f"/proc/{pid}").exists():
        time.sleep(0.02)


def test_serves_keeps_and_cleans_up(start: Start, tmp_path: Path, free_port: int) -> None:
    place = ("--data-dir", str(tmp_path))
    serve = ("serve", "keeps", *place, "--port", str(free_port), "--lease-lifetime", "10", "--grace-period", "10")
    share = start(*serve, "--size", "64Mi", "--replicas", "2", "--root-owner", "7:8", "--root-mode", "0750")
    ready = share.wait_event("ready")
    names = [event["event"] for event in share.events]
    assert names == ["created", "replicas_up", "attached", "formatted", "mounted", "exporting", "ready"]
    assert ready["endpoint"] == f"nfs://127.0.0.1:{free_port}/keeps"

    status = status_of("keeps", tmp_path)
    assert status["state"] == "running"
    assert status["endpoint"] == ready["endpoint"]
    assert status["size_bytes"] == 64 << 20
    assert status["epoch"] == 1
    assert status["in_grace"] is False
    assert status["clients"] == []
    assert status["share_manager"]["pid"] == share.process.pid
    assert status["engine"]["frontend"]
    assert Path(status["engine"]["block_file"]).stat().st_size == 64 << 20
    assert status["device"].startswith("/dev/loop")
    assert [replica["state"] for replica in status["replicas"]] == ["in_sync", "in_sync"]
    for pid in (status["ganesha"]["pid"], status["engine"]["pid"], *(one["pid"] for one in status["replicas"])):
        assert os.getsid(pid) == pid
    data = Path(status["mountpoint"]) / "data"
    assert (data.stat().st_uid, data.stat().st_gid, data.stat().st_mode & 0o7777) == (7, 8, 0o750)
    (data / "file").write_text("kept")

    again = run_command(*serve)
    assert again.returncode == 4
    assert "share-manager stop keeps" in again.stderr
    assert run_command("volume", "delete", "keeps", "--yes", *place).returncode == 4

    assert share.stop(signal.SIGINT) == (0, "")
    assert share.events[-1]["event"] == "stopped"
    assert left_of("keeps") == []
    assert status_of("keeps", tmp_path)["state"] == "stopped"

    assert run_command("volume", "resize", "keeps", "96Mi", *place).returncode == 0
    share = start(*serve)
    share.wait_event("ready")
    status = status_of("keeps", tmp_path)
    assert "grown" in [event["event"] for event in share.events]
    assert (Path(status["mountpoint"]) / "data" / "file").read_text() == "kept"
    assert status["epoch"] == 2
    assert run_command("stop", "keeps", *place).returncode == 0
    assert share.ended() == (0, "")
    assert left_of("keeps") == []


def test_the_list_of_clients_changes_while_it_serves(start: Start, tmp_path: Path, free_port: int) -> None:
    """In the host's network it is ganesha that knows it, and every later ganesha."""
    place = ("--data-dir", str(tmp_path))
    share = start("serve", "lists", *place, "--port", str(free_port), "--size", "64Mi", "--replicas", "1")
    share.wait_event("ready")

    def sees() -> bool:
        try:
            trio.run(export_handle, "127.0.0.1", free_port, "/lists", 5.0)
        except Nfs4Error:
            return False
        return True

    def allow(*words: str) -> None:
        done = run_command("allow", "lists", *place, *words)
        assert done.returncode == 0, done.stderr

    assert sees()
    allow("--set", "10.0.0.0/8")
    assert not sees()
    before = status_of("lists", tmp_path)
    assert before["allow"] == ["10.0.0.0/8"]
    os.kill(before["ganesha"]["pid"], signal.SIGKILL)
    share.wait_event("ready")
    assert not sees()
    allow("--everyone")
    assert sees()
    assert run_command("allow", "lists", *place).returncode == 2
    assert run_command("allow", "lists", *place, "--set", "10.0.0.1/8").returncode == 2
    share.stop()
    assert run_command("allow", "lists", *place, "--everyone").returncode == 4


def write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@pytest.mark.parametrize("frontend", ["device", "pyfuse3"])
def test_repairs_and_metrics(start: Start, tmp_path: Path, free_port: int, frontend: str) -> None:
    metrics = free_port + 1 if free_port < 65535 else free_port - 1
    share = start(
        *("serve", "mends", "--data-dir", str(tmp_path), "--size", "64Mi", "--replicas", "2"),
        *("--port", str(free_port), "--metrics-port", str(metrics), "--lease-lifetime", "10", "--grace-period", "10"),
        *("--frontend", frontend),
    )
    share.wait_event("ready")
    before = status_of("mends", tmp_path)
    data = Path(before["mountpoint"]) / "data"
    write_synced(data / "file", "kept")

    os.kill(before["ganesha"]["pid"], signal.SIGKILL)
    assert share.wait_event("ready")["repaired"]
    after = status_of("mends", tmp_path)
    assert after["ganesha"]["epoch"] > before["ganesha"]["epoch"]
    assert after["epoch"] == before["epoch"]
    assert after["restarts"]["ganesha"] == 1

    os.kill(before["replicas"][0]["pid"], signal.SIGKILL)
    share.wait_event("replica_left")
    share.wait_event("replica_in_sync")
    assert status_of("mends", tmp_path)["restarts"]["replicas"] == 1

    os.kill(before["engine"]["pid"], signal.SIGKILL)
    if frontend == "device":
        # another engine takes over the file; nothing above it notices more than a pause
        share.wait_event("engine_resumed")
        mended = status_of("mends", tmp_path)
        assert mended["epoch"] == before["epoch"]
        assert mended["engine"]["incarnation"] == 2
        assert mended["ganesha"] == after["ganesha"]
    else:
        share.wait_event("repairing")
        share.wait_event("ready")
        mended = status_of("mends", tmp_path)
        assert mended["epoch"] == before["epoch"] + 1
        assert mended["ganesha"]["epoch"] > after["ganesha"]["epoch"]
    assert (data / "file").read_text() == "kept"

    with urllib.request.urlopen(f"http://127.0.0.1:{metrics}/metrics") as page:
        text = page.read().decode()
    assert 'share_manager_restarts_total{component="engine",volume="mends"} 1.0' in text
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics}/readyz") as page:
        assert page.status == 200
    assert share.stop() == (0, "")
    assert left_of("mends") == []


@pytest.mark.parametrize("survivors", ["all", "none", "replicas"])
def test_the_next_run_clears_up(survivors: str, start: Start, tmp_path: Path, free_port: int) -> None:
    name = f"clears-{survivors}"
    serve = ("serve", name, "--data-dir", str(tmp_path), "--port", str(free_port), "--replicas", "2")
    share = start(*serve, "--size", "64Mi")
    share.wait_event("ready")
    status = status_of(name, tmp_path)
    (Path(status["mountpoint"]) / "data" / "file").write_text("kept")
    os.sync()
    doomed = [share.process.pid]
    if survivors != "all":
        doomed += [status["engine"]["pid"], status["ganesha"]["pid"]]
    if survivors == "none":
        doomed += [replica["pid"] for replica in status["replicas"]]
    for pid in doomed:
        os.kill(pid, signal.SIGKILL)
    share.process.wait()
    for pid in doomed:
        wait_gone(pid)
    assert status_of(name, tmp_path)["state"] == "orphaned"

    share = start(*serve)
    share.wait_event("ready")
    assert "cleared" in [event["event"] for event in share.events]
    status = status_of(name, tmp_path)
    assert (Path(status["mountpoint"]) / "data" / "file").read_text() == "kept"
    share.process.kill()
    share.process.wait()
    assert run_command("stop", name, "--data-dir", str(tmp_path)).returncode == 0
    assert left_of(name) == []


def test_a_start_that_fails_leaves_nothing(start: Start, tmp_path: Path, free_port: int) -> None:
    # ganesha's configuration is the last thing that can be refused
    share = start("serve", "undone", "--data-dir", str(tmp_path), "--size", "64Mi", "--port", str(free_port))
    share.wait_event("attached")
    status, error = share.stop()
    assert (status, error) == (0, "")
    assert left_of("undone") == []
    assert run_command("volume", "list", "--data-dir", str(tmp_path), "--output", "json").stdout.strip() == "[]"


def test_attach(start: Start, tmp_path: Path) -> None:
    place = ("--data-dir", str(tmp_path))
    block = start("attach", "raw", "--size", "8Mi", "--replicas", "1", *place)
    ready = block.wait_event("ready")
    file = Path(ready["block_file"])
    assert file.stat().st_size == 8 << 20
    with file.open("r+b", buffering=0) as disk:
        disk.write(b"x" * 8192)
        os.fsync(disk.fileno())
    status = status_of("raw", tmp_path)
    assert (status["kind"], status["state"], status["endpoint"]) == ("attach", "running", None)
    assert block.stop() == (0, "")
    assert left_of("raw") == []

    block = start("attach", "raw", *place)
    file = Path(block.wait_event("ready")["block_file"])
    with file.open("rb") as disk:
        os.kill(status_of("raw", tmp_path)["engine"]["pid"], signal.SIGKILL)
        # it waits for the engine that takes over
        assert disk.read(8193) == b"x" * 8192 + b"\0"
    block.wait_event("engine_resumed")
    assert block.stop() == (0, "")

    block = start("attach", "raw", *place, "--frontend", "pyfuse3")
    block.wait_event("ready")
    os.kill(status_of("raw", tmp_path)["engine"]["pid"], signal.SIGKILL)
    assert block.process.wait(30) == 1
    _, error = block.stop()
    assert "attach again" in error
    assert left_of("raw") == []


def test_nothing_in_sync_is_a_refusal(start: Start, tmp_path: Path, free_port: int) -> None:
    serve = ("serve", "lost", "--data-dir", str(tmp_path), "--port", str(free_port))
    share = start(*serve, "--size", "64Mi", "--replicas", "2")
    share.wait_event("ready")
    replicas = tmp_path / "volumes" / "lost" / "replicas"
    (replicas / "r2").rename(tmp_path / "r2")
    os.kill(status_of("lost", tmp_path)["replicas"][1]["pid"], signal.SIGKILL)
    share.wait_event("replica_left")
    assert share.stop() == (0, "")
    (tmp_path / "r2").rename(replicas / "r2")
    (replicas / "r1").rename(tmp_path / "r1")
    refused = run_command(*serve)
    assert refused.returncode == 6
    assert len(refused.stderr.splitlines()) == 1
    assert "r1" in refused.stderr
    assert left_of("lost") == []
    (tmp_path / "r1").rename(replicas / "r1")
    share = start(*serve)
    share.wait_event("ready")
    share.stop()


def test_a_share_that_lost_its_volume_ends(start: Start, tmp_path: Path, free_port: int) -> None:
    share = start("serve", "fenced", "--data-dir", str(tmp_path), "--size", "64Mi", "--port", str(free_port))
    share.wait_event("ready")
    replica = status_of("fenced", tmp_path)["replicas"][0]["pid"]
    # somebody else attaches; this engine learns of it when it has to change the record
    bump_epoch(FileRecordStore(tmp_path / "volumes" / "fenced" / "record.json"))
    os.kill(replica, signal.SIGKILL)
    assert share.process.wait(60) == 4
    _, error = share.stop()
    assert "attached elsewhere" in error
    assert len(error.splitlines()) == 1
    assert left_of("fenced") == []
