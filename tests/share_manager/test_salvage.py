"""A volume whose in-sync replicas are lost is taken up from one that is behind, because a person says so."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.errors import RecordError
from engine.record import FileRecordStore
from engine.store import Store
from share_manager import salvage as module
from share_manager.errors import SalvageRefusedError, UsageError
from share_manager.paths import VolumePaths
from share_manager.salvage import examine, salvage
from share_manager.volumes import create_volume, make_data_dir, read_record, volume_lock
from tests.share_manager.conftest import Running, run_command

MIB = 1 << 20
SIZE = 64 * MIB
BLOCK = 4096


@pytest.fixture
def paths(tmp_path: Path) -> VolumePaths:
    """r1 and r2 went on without r3, wrote two regions more, and then r1 and r2 were lost but for r2's maps."""
    paths = VolumePaths(make_data_dir(tmp_path), "lost")
    with volume_lock(paths, "first"):
        create_volume(paths, size=SIZE, replicas=3)
    store = FileRecordStore(paths.record)
    record = store.read()
    store.swap(record.version, record.next(in_sync=("r1", "r2"), epoch=7))
    r2 = Store.open(paths.replica("r2"))
    r2.set_token(7, 1)
    r2.maps.track(["r3"])
    r2.maps.mark([3, 9])
    r2.maps.sync()
    r2.close()
    shutil.rmtree(paths.replica("r1"))
    return paths


def damage(paths: VolumePaths, name: str) -> None:
    os.truncate(paths.replica(name) / "volume-head-000.img", 0)


def test_nothing_is_salvaged_while_a_member_is_in_order(paths: VolumePaths) -> None:
    with pytest.raises(SalvageRefusedError, match="r2 is in sync and in order, so nothing needs to be salvaged"):
        examine(paths, "r3", force=True)
    with pytest.raises(UsageError, match="no replica 'r9'; it has r1, r2, r3"):
        examine(paths, "r9", force=False)


def test_what_may_be_lost_is_shown_before_anything_changes(paths: VolumePaths) -> None:
    # its maps can be read, its data cannot
    meta = paths.replica("r2") / "volume.meta"
    meta.write_text(meta.read_text().replace('"Rebuilding":false', '"Rebuilding":true'))
    before = read_record(paths)
    plan = examine(paths, "r3", force=False)
    assert (plan.missing_regions, plan.unknown, plan.epoch) == ({"r2": 2}, ("r1",), 8)
    assert plan.losses() == (
        "replica r2 has noted 2 regions of 1 MiB that changed while r3 was away; "
        "what changed while r3 was away is not known: no map of r1 tells"
    )
    assert [(one.name, one.in_sync, one.sound) for one in plan.replicas] == [
        ("r1", True, False),
        ("r2", True, False),
        ("r3", False, True),
    ]
    assert "no such directory" in plan.replicas[0].problem
    assert read_record(paths) == before
    assert not paths.drop_recovery.exists()


def test_the_record_names_the_source_alone_and_the_others_miss_everything(paths: VolumePaths) -> None:
    damage(paths, "r2")
    r3 = Store.open(paths.replica("r3"))
    r3.maps.track(["r1", "r2"])  # from a time when these were away: it says nothing any more
    r3.close()
    record = salvage(paths, examine(paths, "r3", force=False))
    assert (record.in_sync, record.epoch) == (("r3",), 8)
    assert read_record(paths) == record
    assert paths.drop_recovery.exists()
    r3 = Store.open(paths.replica("r3"))
    assert r3.maps.tracked == ("r1", "r2")
    assert r3.maps.bitmap("r1") == r3.maps.bitmap("r2") == b"\xff" * 8
    assert r3.maps.bitmap("") == bytes(8)
    r3.close()
    with pytest.raises(SalvageRefusedError, match="r3 is in sync and in order"):
        examine(paths, "r2", force=False)


def test_a_source_that_missed_a_growth_is_grown(paths: VolumePaths) -> None:
    damage(paths, "r2")
    store = FileRecordStore(paths.record)
    record = store.read()
    store.swap(record.version, record.next(size=100 * MIB))
    salvage(paths, examine(paths, "r3", force=False))
    r3 = Store.open(paths.replica("r3"))
    assert r3.size == 100 * MIB
    assert r3.maps.bitmap("r1") == b"\xff" * 12 + b"\x0f"
    r3.close()


def test_a_replica_that_was_being_filled_needs_force(paths: VolumePaths) -> None:
    damage(paths, "r2")
    r3 = Store.open(paths.replica("r3"))
    r3.set_marks(rebuilding=True)
    r3.close()
    with pytest.raises(SalvageRefusedError, match="mixture of old, new and nothing: take another one, or add --force"):
        examine(paths, "r3", force=False)
    salvage(paths, examine(paths, "r3", force=True))
    assert not Store.open(paths.replica("r3")).meta.rebuilding


def test_a_damaged_source_is_refused(paths: VolumePaths) -> None:
    damage(paths, "r2")
    damage(paths, "r3")
    with pytest.raises(SalvageRefusedError, match=r"replica r3 cannot be used: volume-head-000\.img has 0 bytes"):
        examine(paths, "r3", force=True)


@pytest.mark.parametrize("step", ["take_as_source", "replace_file", "FileRecordStore", "call_complete"])
def test_cut_off_at_any_step_it_can_be_given_again(
    paths: VolumePaths, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    damage(paths, "r2")
    r3 = Store.open(paths.replica("r3"))
    r3.set_marks(rebuilding=True)
    r3.close()

    def cut(*args: object, **kwargs: object) -> None:
        raise RecordError("cut off")

    with monkeypatch.context() as patch:
        patch.setattr(module, step, cut)
        with pytest.raises(RecordError):
            salvage(paths, examine(paths, "r3", force=True))
    record = salvage(paths, examine(paths, "r3", force=True))
    assert record.in_sync == ("r3",)
    store = Store.open(paths.replica("r3"))
    assert store.maps.bitmap("r2") == b"\xff" * 8
    assert not store.meta.rebuilding
    store.close()


def test_a_record_older_than_the_replicas_gets_an_epoch_above_theirs(paths: VolumePaths) -> None:
    damage(paths, "r2")
    r3 = Store.open(paths.replica("r3"))
    r3.set_token(41, 2)
    r3.close()
    plan = examine(paths, "r3", force=False)
    assert salvage(paths, plan).epoch == 42
    assert msgspec.json.encode(plan)


def write(file: str, offset: int, data: bytes) -> None:
    fd = os.open(file, os.O_RDWR)
    try:
        assert os.pwrite(fd, data, offset) == len(data)
        os.fsync(fd)
    finally:
        os.close(fd)


@pytest.mark.system
def test_the_lost_members_come_back_by_a_full_copy_and_all_are_equal(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    place = ("--data-dir", str(tmp_path))
    volume = VolumePaths(make_data_dir(tmp_path), "back")
    attached = start("attach", "back", "--size", "64Mi", "--replicas", "3", *place)
    file = attached.wait_event("ready")["block_file"]
    write(file, 0, b"both" * 1024)
    busy = run_command("volume", "salvage", "back", "--from", "r3", "--yes", *place)
    assert busy.returncode == 4
    attached.stop()

    # r3 is out of reach for a while, and the others go on
    aside = tmp_path / "aside"
    volume.replica("r3").rename(aside)
    attached = start("attach", "back", *place)
    file = attached.wait_event("ready")["block_file"]
    for region in (0, 5, 40):
        write(file, region * MIB, os.urandom(BLOCK))
    attached.stop()
    assert read_record(volume).in_sync == ("r1", "r2")
    aside.rename(volume.replica("r3"))

    refused = run_command("volume", "salvage", "back", "--from", "r3", "--yes", *place)
    assert refused.returncode == 6
    assert "nothing needs to be salvaged" in refused.stderr
    for name in ("r1", "r2"):
        volume.replica(name).rename(tmp_path / f"lost-{name}")
    refused = run_command("attach", "back", *place)
    assert refused.returncode == 6
    asked = run_command("volume", "salvage", "back", "--from", "r3", *place)
    assert asked.returncode == 2
    assert "add --yes" in asked.stderr
    assert "not known: no map of r1, r2 tells" in asked.stdout
    done = run_command("volume", "salvage", "back", "--from", "r3", "--yes", *place, "--output", "json")
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    assert (told["source"], told["missing_regions"], told["unknown"]) == ("r3", {}, ["r1", "r2"])

    # what was lost is found again, with another past, and has to become what r3 is
    for name in ("r1", "r2"):
        (tmp_path / f"lost-{name}").rename(volume.replica(name))
    attached = start("attach", "back", *place)
    file = attached.wait_event("ready")["block_file"]
    write(file, 20 * MIB, b"new!" * 1024)
    total: dict[str, Any] = {}
    while set(total) != {"r1", "r2"}:
        event = attached.wait_event("replica_in_sync")
        total[event["replica"]] = event
    assert attached.stop(signal.SIGTERM)[0] == 0
    contents = {name: (volume.replica(name) / "volume-head-000.img").read_bytes() for name in ("r1", "r2", "r3")}
    assert contents["r1"] == contents["r2"] == contents["r3"]
    assert contents["r1"][:8192] == b"both" * 1024 + bytes(4096)
    assert contents["r1"][40 * MIB : 40 * MIB + BLOCK] == bytes(BLOCK)
    assert read_record(volume).in_sync == ("r1", "r2", "r3")
