"""The engine without what is compiled of it, as SHARE_MANAGER_PURE=1 builds it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
COPIED = ("engine", "ganesha", "share_manager", "tests", "pyproject.toml")
TESTS = (
    "tests/engine/controller/test_pipeline.py",
    "tests/engine/frontend/test_conformance.py",
    "tests/engine/replica/test_direct.py",
    "tests/engine/replica/test_requests.py",
)


def test_the_interpreted_engine_does_the_same(tmp_path: Path) -> None:
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for variable in [name for name in env if name.startswith("PYTEST_")]:
        del env[variable]
    where = "import engine.replica.executor as module; print(module.__file__)"
    found = subprocess.run([sys.executable, "-c", where], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert found.stdout.strip() == str(tmp_path / "engine/replica/executor.py"), found.stderr
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not system", *TESTS],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
