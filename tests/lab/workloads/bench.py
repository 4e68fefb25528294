"""The load of `share-manager bench`, from its own file: the guest's Python has nothing of what the package imports."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.lab.workloads import channel

FILES = Path(__file__).resolve().parents[3] / "share_manager/bench/files.py"


def _module() -> ModuleType:
    found = importlib.util.spec_from_file_location("share_manager_bench_files", FILES)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


# when the agent starts: a guest takes its time to read and compile
_files: Any = _module()


def load(path: str, workload: str, seconds: float, size: int) -> list[float]:
    """Operations, seconds and bytes, until the time is over or the host says stop."""
    return list(_files.load(workload, Path(path), seconds, size, channel.stopping))
