"""`share-manager volume clone` on real volumes: a served one under load, a stopped one, a clone of a clone."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.store import Store, read_origin
from share_manager.share.procfs import mount_at
from tests.share_manager.conftest import Running, run_command
from tests.share_manager.test_serve import left_of, status_of, write_synced
from tests.share_manager.test_snapshot import Snapshots, Writers

pytestmark = pytest.mark.system

MIB = 1 << 20
Start = Callable[..., Running]


def port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


class Place:
    def __init__(self, start: Start, data_dir: Path) -> None:
        self.start = start
        self.data_dir = data_dir
        self.options = ("--data-dir", str(data_dir))

    def volume(self, *arguments: str, status: int = 0) -> list[dict[str, Any]]:
        done = run_command("volume", *arguments, *self.options, "--output", "json")
        assert done.returncode == status, done.stderr
        if status:
            return [{"error": done.stderr}]
        return [json.loads(line) for line in done.stdout.splitlines()]

    def show(self, volume: str) -> dict[str, Any]:
        shown: dict[str, Any] = json.loads(
            run_command("volume", "show", volume, *self.options, "--output", "json").stdout
        )
        return shown

    def serve(self, volume: str, *arguments: str) -> tuple[Running, Path]:
        times = ("--lease-lifetime", "10", "--grace-period", "10")
        share = self.start("serve", volume, *self.options, "--port", port(), *times, *arguments)
        share.wait_event("ready")
        return share, Path(status_of(volume, self.data_dir)["mountpoint"]) / "data"

    def directory(self, volume: str) -> Path:
        return self.data_dir / "volumes" / volume

    def check(self, volume: str, replica: str = "r1") -> None:
        """The filesystem of a stopped volume has nothing to repair."""
        image = self.data_dir / "image"
        store = Store.open(self.directory(volume) / "replicas" / replica)
        try:
            with image.open("wb") as out:
                for at in range(0, store.size, MIB):
                    out.write(store.read(at, MIB))
        finally:
            store.close()
        subprocess.run(["e2fsck", "-f", "-n", str(image)], check=True, capture_output=True)
        image.unlink()


@pytest.fixture
def place(start: Start, tmp_path: Path) -> Place:
    return Place(start, tmp_path)


def uuid_of(mountpoint: Path) -> str:
    found = mount_at(mountpoint)
    assert found is not None
    argv = ["blkid", "-p", "-s", "UUID", "-o", "value", found.source]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


def test_a_served_volume_is_cloned_under_load_and_the_clone_is_served_beside_it(place: Place) -> None:
    share, data = place.serve("first", "--size", "64Mi", "--replicas", "2")
    bulk = os.urandom(12 * MIB)
    (data / "bulk").write_bytes(bulk)
    write_synced(data / "note", "old")
    with Writers(data) as writers:
        (cloned,) = place.volume("clone", "first", "second")
        seen = writers.written
        assert cloned["origin"].startswith("first@clone-second-")
        other, copy = place.serve("second")
        while writers.written < seen + 20:
            time.sleep(0.01)
    assert (copy / "bulk").read_bytes() == bulk
    assert "recovery_dropped" in [event["event"] for event in other.events]
    assert uuid_of(copy.parent) != uuid_of(data.parent)
    write_synced(data / "note", "of the first")
    write_synced(copy / "note", "of the second")
    (copy / "bulk").unlink()
    end = time.monotonic() + 60
    while status_of("second", place.data_dir)["engine"]["clone"] is not None:
        assert time.monotonic() < end
        time.sleep(0.1)
    assert all(replica["link"] is None for replica in place.show("second")["replicas"])
    snapshots = Snapshots("first", place.data_dir)
    snapshots.run("purge")
    assert [entry["name"] for entry in snapshots.run("list")["snapshots"] if entry.get("pinned")] == []
    assert (data / "note").read_text() == "of the first"
    assert (copy / "note").read_text() == "of the second"
    assert (data / "bulk").read_bytes() == bulk
    assert share.stop() == (0, "")
    assert other.stop() == (0, "")
    for volume in ("first", "second"):
        for replica in ("r1", "r2"):
            place.check(volume, replica)
        assert left_of(volume) == []


def test_a_stopped_volume_is_cloned_from_a_snapshot_and_deleted_before_the_clone_is_served(place: Place) -> None:
    share, data = place.serve("first", "--size", "64Mi", "--replicas", "2")
    (data / "bulk").write_bytes(bulk := os.urandom(8 * MIB))
    snapshots = Snapshots("first", place.data_dir)
    snapshots.run("create", "then")
    write_synced(data / "later", "unknown to the clone")
    assert share.stop() == (0, "")
    place.volume("clone", "first@then", "second", "--replicas", "3")
    # a clone of what is one itself, and was never served
    place.volume("clone", "second@then", "third", "--replicas", "1")
    shown = place.show("second")
    assert [replica["link"]["origin"] for replica in shown["replicas"]] == ["first@then"] * 3
    assert "0 % copied of first@then" in run_command("volume", "show", "second", *place.options).stdout
    # the deletion of the snapshot is not held up, only its merging is
    snapshots.run("delete", "then")
    snapshots.run("purge")
    place.volume("delete", "first", "--yes")
    place.volume("flatten", "second")
    assert [read_origin(place.directory("second") / "replicas" / name) for name in ("r1", "r2", "r3")] == [None] * 3
    assert place.volume("flatten", "second")[-1]["origin"] == ""
    for volume in ("second", "third"):
        other, copy = place.serve(volume)
        assert (copy / "bulk").read_bytes() == bulk
        assert not (copy / "later").exists()
        assert other.stop() == (0, "")
        place.check(volume)


def test_what_cannot_be_cloned_is_said(place: Place) -> None:
    share, _ = place.serve("first", "--size", "64Mi", "--replicas", "1")
    assert "there is no snapshot 'never'" in place.volume("clone", "first@never", "second", status=5)[0]["error"]
    assert "write VOLUME@SNAPSHOT" in place.volume("clone", "first@", "second", status=2)[0]["error"]
    assert "there is no volume nobody" in place.volume("clone", "nobody@x", "second", status=5)[0]["error"]
    assert "first already: choose another name" in place.volume("clone", "first", "first", status=4)[0]["error"]
    assert share.stop() == (0, "")
    assert "first already: choose another name" in place.volume("clone", "first", "first", status=4)[0]["error"]
    assert [path.name for path in (place.data_dir / "volumes").iterdir() if not path.name.startswith(".lock")] == [
        "first"
    ]
