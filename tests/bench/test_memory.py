"""A small version of `python -m tests.bench.memory`: memory follows what is written, not the volume's size."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.bench.memory import measure

pytestmark = pytest.mark.system

GIB = 1 << 30


def test_a_large_volume_takes_little_more_memory_than_a_small_one(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting FUSE needs root")
    used = {}
    for name, size in (("small", GIB), ("large", 1024 * GIB)):
        (tmp_path / name).mkdir()
        # as many chunks of each are looked at
        found = measure(
            tmp_path / name, size=size, written=64 << 20, snapshots=3, replicas=1, every=max(size // 256, 4 << 20)
        )
        used[name] = {process: one["VmHWM"] for process, one in found["used"].items()}
    for process in ("engine", "r1"):
        # maps of the large one: 1 byte and 3 bits for each of 1024 * 1024 regions
        assert used["large"][process] < used["small"][process] + 12, used
        assert used["large"][process] < 64, used
