"""What a user may say, and a real quick run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from share_manager.bench.command import NAMES, plan_of
from share_manager.bench.model import CELLS, NFS_WORKLOADS
from share_manager.bench.report import Report
from share_manager.errors import InvalidValueError

BENCH = [sys.executable, "-c", "from share_manager.bench import app; app()"]


def test_defaults_measure_everything(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, None, None, None, ",".join(NAMES), None, quick=False)
    assert (plan.size, plan.seconds, plan.repeats, plan.cells) == (1 << 30, 3.0, 3, CELLS)
    assert tuple(target.name for target in plan.targets) == NAMES


def test_quick_is_less_of_each_unless_said_otherwise(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, None, None, 2, "plain, loop", None, quick=True)
    assert (plan.size, plan.seconds, plan.repeats) == (256 << 20, 1.0, 2)
    assert [target.name for target in plan.targets] == ["plain", "loop"]


def test_a_filesystem_brings_its_device(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, None, None, None, "ext4-engine-3", None, quick=True)
    assert plan.block == ()
    assert [target.name for target in plan.devices] == ["engine-3"]


@pytest.mark.parametrize(
    ("change", "option"),
    [
        ({"directory": Path("/no/such")}, "--directory"),
        ({"size": "1Mi"}, "--size"),
        ({"size": "much"}, "--size"),
        ({"seconds": 0.0}, "--seconds"),
        ({"seconds": float("nan")}, "--seconds"),
        ({"repeats": 0}, "--repeats"),
        ({"targets": "plain,lop"}, "--targets"),
        ({"targets": ","}, "--targets"),
        ({"nfs_client": " "}, "--nfs-client"),
        ({"nfs_client": "it's"}, "--nfs-client"),
    ],
)
def test_nonsense_is_named(tmp_path: Path, change: dict[str, object], option: str) -> None:
    said: dict[str, object] = {
        "directory": tmp_path,
        "size": None,
        "seconds": None,
        "repeats": None,
        "targets": "plain",
        "nfs_client": None,
        "quick": True,
    }
    with pytest.raises(InvalidValueError, match=option):
        plan_of(**(said | change))  # type: ignore[arg-type]


def scratch_in(directory: Path) -> set[Path]:
    """Others use the directory as well."""
    return set(directory.glob(".share-manager-bench-*"))


def loops_below(directory: Path) -> set[str]:
    listed = subprocess.run(["losetup", "--list", "--noheadings", "--output=BACK-FILE"], capture_output=True, text=True)
    return {line for line in listed.stdout.splitlines() if line.startswith(f"{directory}/.share-manager-bench-")}


@pytest.fixture
def disk() -> Path:
    """A directory that is not on tmpfs, as /tmp may be: the bench needs direct I/O."""
    return Path(os.environ.get("SHARE_MANAGER_TEST_DISK", "/var/tmp"))


@pytest.mark.system
def test_a_quick_run_measures_and_cleans_up(disk: Path) -> None:
    before, loops = scratch_in(disk), loops_below(disk)
    argv = [*BENCH, "--quick", "--seconds=0.2", "--size=128Mi", f"--directory={disk}", "--output=json"]
    done = subprocess.run([*argv, "--targets=plain,loop,engine-1,ext4-loop"], capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr.decode()
    found = msgspec.json.decode(done.stdout, type=Report)
    assert [target.unavailable for target in found.targets] == [""] * 4
    assert {one.target for one in found.cells} == {"plain", "loop", "engine-1"}
    for one in found.cells:
        assert one.measured.per_second.min > 0
        assert set(one.measured.ratios) == {"plain", "loop"}
        assert (one.measured.cpu_us is not None) == (one.target == "engine-1")
    assert {one.target for one in found.workloads} == {"ext4-loop"}
    assert scratch_in(disk) <= before
    assert loops_below(disk) <= loops


@pytest.mark.system
def test_flushes_and_nfs_are_measured_beside_their_references(disk: Path) -> None:
    before, loops = scratch_in(disk), loops_below(disk)
    argv = [*BENCH, "--quick", "--seconds=0.3", "--size=128Mi", f"--directory={disk}", "--output=json"]
    argv += ["--targets=fsync-1,nfs-stock,nfs-engine-3", f"--nfs-client={sys.executable} -m tests.lab.nfs_client"]
    done = subprocess.run(argv, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr.decode()
    found = msgspec.json.decode(done.stdout, type=Report)
    assert [target.unavailable for target in found.targets] == [""] * 3
    (flush,) = found.flushes
    assert flush.expected_us.median == pytest.approx(flush.plain_us.median + flush.round_trip_us.median)
    assert flush.engine_us.min > flush.round_trip_us.min
    assert {(one.target, one.workload) for one in found.workloads} == {
        (target, workload) for target in ("nfs-stock", "nfs-engine-3") for workload in NFS_WORKLOADS
    }
    for one in found.workloads:
        assert one.measured.per_second.min > 0
        assert one.measured.cpu_us is not None
        assert set(one.measured.ratios) == {"nfs-stock"}
    assert scratch_in(disk) <= before
    assert loops_below(disk) <= loops


@pytest.mark.system
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_clean(disk: Path, number: signal.Signals) -> None:
    before, loops = scratch_in(disk), loops_below(disk)
    argv = [*BENCH, "--seconds=60", "--size=128Mi", f"--directory={disk}", "--targets=loop,engine-2"]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            deadline = time.monotonic() + 60
            while loops_below(disk) <= loops:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            time.sleep(1)
            process.send_signal(number)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 128 + number
    assert b"interrupted" in said
    assert b"Traceback" not in said
    assert scratch_in(disk) <= before
    assert loops_below(disk) <= loops


def test_a_missing_fio_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "share_manager", "bench", f"--directory={tmp_path}", "--targets=plain", "--quick"],
        env={"PATH": str(tmp_path / "empty")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3
    assert done.stderr.strip().splitlines()[-1].endswith("apt-get install fio")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
