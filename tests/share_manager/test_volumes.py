from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from engine.errors import RecordError, StoreError
from engine.store import Store, inspect_replica, resize_replica
from share_manager import volumes
from share_manager.errors import (
    DiskError,
    InvalidValueError,
    SizeMismatchError,
    UsageError,
    VolumeBusyError,
    VolumeExistsError,
    VolumeMismatchError,
    VolumeNotFoundError,
)
from share_manager.paths import VolumePaths
from tests.engine.store.longhorn import longhorn_directory

MIB = 1 << 20


@pytest.fixture
def paths(tmp_path: Path) -> VolumePaths:
    return VolumePaths(volumes.make_data_dir(tmp_path / "data"), "vol1")


def test_a_new_volume(paths: VolumePaths) -> None:
    record = volumes.create_volume(paths, size=64 * MIB, replicas=3)
    assert volumes.list_volumes(paths.data_dir) == ["vol1"]
    assert volumes.read_record(paths) == record
    assert record.in_sync == ("r1", "r2", "r3")
    assert paths.secret.stat().st_mode & 0o777 == 0o600
    for replica in record.replicas:
        found = inspect_replica(Path(replica.directory))
        assert (found.size, found.uuid, found.replica) == (64 * MIB, record.uuid, replica.name)
    assert volumes.open_volume(paths, size=64 * MIB, replicas=3) == record
    assert volumes.open_volume(paths, size=None, replicas=None) == record


def test_what_is_different_is_refused(paths: VolumePaths) -> None:
    volumes.create_volume(paths, size=64 * MIB, replicas=2)
    with pytest.raises(SizeMismatchError, match="volume resize"):
        volumes.open_volume(paths, size=128 * MIB, replicas=None)
    with pytest.raises(VolumeMismatchError, match="has 2 replicas"):
        volumes.open_volume(paths, size=None, replicas=3)
    for count in (0, 10):
        with pytest.raises(InvalidValueError):
            volumes.create_volume(VolumePaths(paths.data_dir, "other"), size=MIB, replicas=count)


def test_a_failed_creation_leaves_nothing(paths: VolumePaths, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def fail(directory: Path, **options: object) -> None:
        made.append(directory)
        directory.mkdir()
        if len(made) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(volumes, "create_replica", fail)
    with pytest.raises(DiskError, match="free some space"):
        volumes.create_volume(paths, size=64 * MIB, replicas=3)
    assert os.listdir(paths.data_dir / "volumes") == []


def test_a_creation_that_was_cut_off_is_swept_up(paths: VolumePaths) -> None:
    (paths.data_dir / "volumes" / ".creating-vol1" / "replicas").mkdir(parents=True)
    assert volumes.list_volumes(paths.data_dir) == []
    volumes.create_volume(paths, size=64 * MIB, replicas=1)
    assert os.listdir(paths.data_dir / "volumes") == ["vol1"]


def test_growing(paths: VolumePaths) -> None:
    volumes.create_volume(paths, size=64 * MIB, replicas=2)
    grown = volumes.resize_volume(paths, 128 * MIB)
    assert grown.size == volumes.read_record(paths).size == 128 * MIB
    assert {inspect_replica(paths.replica(name)).size for name in ("r1", "r2")} == {128 * MIB}
    assert volumes.resize_volume(paths, 128 * MIB) == grown
    with pytest.raises(UsageError, match="can only grow"):
        volumes.resize_volume(paths, 64 * MIB)


def test_growing_that_was_cut_off_can_be_repeated(paths: VolumePaths, monkeypatch: pytest.MonkeyPatch) -> None:
    volumes.create_volume(paths, size=64 * MIB, replicas=2)

    def cut(directory: Path, size: int) -> None:
        if directory.name == "r2":
            raise OSError(5, "Input/output error")
        resize_replica(directory, size)

    monkeypatch.setattr(volumes, "resize_replica", cut)
    with pytest.raises(DiskError):
        volumes.resize_volume(paths, 128 * MIB)
    assert volumes.read_record(paths).size == 64 * MIB
    monkeypatch.undo()
    assert volumes.resize_volume(paths, 128 * MIB).size == 128 * MIB


def test_deleting(paths: VolumePaths) -> None:
    volumes.create_volume(paths, size=64 * MIB, replicas=1)
    with volumes.volume_lock(paths, "first"):
        volumes.delete_volume(paths)
    assert os.listdir(paths.data_dir / "volumes") == []
    with pytest.raises(VolumeNotFoundError):
        volumes.find_volume(paths.data_dir, "vol1")


def test_a_moved_data_directory(paths: VolumePaths, tmp_path: Path) -> None:
    record = volumes.create_volume(paths, size=64 * MIB, replicas=2)
    paths.data_dir.rename(tmp_path / "elsewhere")
    moved = VolumePaths(tmp_path / "elsewhere", "vol1")
    found = volumes.open_volume(moved, size=None, replicas=None)
    assert found.uuid == record.uuid
    assert [replica.directory for replica in found.replicas] == [str(moved.replica("r1")), str(moved.replica("r2"))]
    assert volumes.read_record(moved) == found


def test_a_damaged_record_hides_no_other_volume(paths: VolumePaths) -> None:
    volumes.create_volume(paths, size=64 * MIB, replicas=1)
    paths.record.write_text("{")
    assert volumes.list_volumes(paths.data_dir) == ["vol1"]
    with pytest.raises(RecordError, match="damaged"):
        volumes.open_volume(paths, size=None, replicas=None)


HOLD = """
import sys
from pathlib import Path
from share_manager.paths import VolumePaths
from share_manager.volumes import volume_lock
with volume_lock(VolumePaths(Path(sys.argv[1]), "vol1"), "first"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_at_a_time_until_it_dies(paths: VolumePaths) -> None:
    volumes.create_volume(paths, size=64 * MIB, replicas=1)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(paths.data_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert volumes.lock_holder(paths) == holder.pid
        with pytest.raises(VolumeBusyError, match=f"by process {holder.pid}"), volumes.volume_lock(paths, "first"):
            pass
        holder.kill()
        holder.wait()
    assert volumes.lock_holder(paths) is None
    with volumes.volume_lock(paths, "first"):
        assert volumes.lock_holder(paths) == os.getpid()
    assert volumes.lock_holder(paths) is None


def test_looking_at_a_volume_does_not_make_it_busy(paths: VolumePaths) -> None:
    volumes.create_volume(paths, size=64 * MIB, replicas=1)
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            volumes.lock_holder(paths)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for _ in range(200):
            with volumes.volume_lock(paths, "first"):
                pass
    finally:
        stop.set()
        looking.join()


def test_what_killed_commands_left_is_swept_by_whoever_opens_a_volume(paths: VolumePaths) -> None:
    volumes.create_volume(paths, size=64 * MIB, replicas=1)
    busy = paths.directory.parent / ".creating-busy"
    for directory in (busy, paths.directory.parent / ".creating-other", paths.directory.parent / ".deleting-third"):
        (directory / "replicas").mkdir(parents=True)
    with volumes.volume_lock(VolumePaths(paths.data_dir, "busy"), "first"):
        volumes.open_volume(paths, size=None, replicas=None)
        names = {name for name in os.listdir(paths.directory.parent) if not name.startswith(".lock")}
        assert names == {"vol1", ".creating-busy"}
    volumes.open_volume(paths, size=None, replicas=None)
    assert not busy.exists()


def test_a_replica_directory_of_longhorn_becomes_a_volume(paths: VolumePaths, tmp_path: Path) -> None:
    directory = longhorn_directory(tmp_path / "pvc-1", 64 * MIB)
    record = volumes.import_volume(paths, directory)
    assert not directory.exists()
    assert (record.size, record.in_sync) == (64 * MIB, ("r1",))
    assert volumes.open_volume(paths, size=None, replicas=None).uuid == record.uuid
    store = Store.open(paths.replica("r1"))
    assert store.identity.uuid == record.uuid
    assert store.read(0, 12288) == b"base" * 1024 + b"new_" * 1024 + b"head" * 1024
    store.close()


def test_an_import_that_was_cut_off_can_be_repeated(
    paths: VolumePaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = longhorn_directory(tmp_path / "pvc-1", 64 * MIB)
    rename = Path.rename
    for name in (f".creating-{paths.volume}", directory.name):

        def cut_off(self: Path, target: Path, name: str = name) -> Path:
            if self.name == name:
                raise KeyboardInterrupt
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", cut_off)
        with pytest.raises(KeyboardInterrupt):
            volumes.import_volume(paths, directory)
        assert (directory / "volume.meta").exists()
    monkeypatch.undo()
    record = volumes.import_volume(paths, directory)
    assert inspect_replica(paths.replica("r1")).size == record.size


def test_what_cannot_be_imported_stays_where_it_is(paths: VolumePaths, tmp_path: Path) -> None:
    directory = longhorn_directory(tmp_path / "pvc-1", 64 * MIB)
    volumes.create_volume(paths, size=64 * MIB, replicas=1)
    with pytest.raises(VolumeExistsError):
        volumes.import_volume(paths, directory)
    other = VolumePaths(paths.data_dir, "other")
    (directory / "volume-snap-base.img").unlink()
    with pytest.raises(StoreError, match="is missing"):
        volumes.import_volume(other, directory)
    assert not other.directory.exists()
    assert (directory / "volume.meta").exists()
