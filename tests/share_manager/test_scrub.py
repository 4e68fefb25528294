"""`share-manager volume scrub`, with damage on the replicas' disks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from share_manager.paths import VolumePaths
from share_manager.volumes import create_volume, make_data_dir, volume_lock
from tests.share_manager.conftest import run_command

pytestmark = pytest.mark.system

BLOCK = 4096


def volume(data_dir: Path, replicas: int) -> VolumePaths:
    """With the same content on all replicas, except for a block of the second."""
    paths = VolumePaths(make_data_dir(data_dir), "vol1")
    with volume_lock(paths, "first"):
        create_volume(paths, size=64 << 20, replicas=replicas)
    for number in range(replicas):
        with (paths.replica(f"r{number + 1}") / "volume-head-000.img").open("r+b") as image:
            image.write(b"a" * BLOCK * 8)
            if number == 1:
                image.seek(3 * BLOCK + 5)
                image.write(b"b")
    return paths


def test_damage_is_shown_and_repaired(root: None, tmp_path: Path) -> None:
    paths = volume(tmp_path, 3)
    arguments = ("volume", "scrub", "vol1", "--data-dir", str(tmp_path), "--rate", "0")
    looked = run_command(*arguments, "--no-repair", "--output", "json")
    assert looked.returncode == 6, looked.stderr
    result = json.loads(looked.stdout)
    assert result["found"] == 1
    assert result["findings"] == [
        {
            "replica": "r2",
            "snapshot": "",
            "offset": 3 * BLOCK,
            "length": BLOCK,
            "kind": "differs",
            "outcome": "found",
        }
    ]
    repaired = run_command(*arguments)
    assert repaired.returncode == 0, repaired.stderr
    assert repaired.stdout.splitlines()[1].split() == ["r2", "head", "12288", "4096", "differs", "repaired"]
    assert "1 damaged, 1 repaired, 0 left" in repaired.stdout
    assert (paths.replica("r2") / "volume-head-000.img").read_bytes()[: 8 * BLOCK] == b"a" * BLOCK * 8
    assert json.loads(run_command(*arguments, "--output", "json").stdout)["found"] == 0


def test_what_cannot_be_decided_is_left_and_said(root: None, tmp_path: Path) -> None:
    volume(tmp_path, 2)
    found = run_command("volume", "scrub", "vol1", "--data-dir", str(tmp_path))
    assert found.returncode == 6, found.stderr
    assert "2 damaged, 0 repaired, 2 left (2 where nobody can tell which replica is right)" in found.stdout


@pytest.mark.parametrize("arguments", [("vol1", "--rate", "fast"), ("other",)])
def test_mistakes_are_one_line(root: None, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    volume(tmp_path, 1)
    failed = run_command("volume", "scrub", *arguments, "--data-dir", str(tmp_path))
    assert failed.returncode in (2, 5)
    assert len(failed.stderr.splitlines()) == 1
