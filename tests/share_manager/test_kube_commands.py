"""What a person is told who starts a command of Kubernetes where there is none: one line, and a status."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = {
    "controller": [],
    "pod node": ["--node", "a", "--address", "127.0.0.1"],
    "pod share": ["vol1", "--instance", "x1", "--node", "a"],
}


def run(command: str, *more: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "share_manager", *command.split(), *COMMANDS[command], *more]
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/nonexistent"}
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, env=environment, check=False)


@pytest.mark.system
@pytest.mark.parametrize("command", COMMANDS)
def test_there_is_no_api_server(command: str, tmp_path: Path) -> None:
    broken = tmp_path / "config"
    broken.write_text("clusters: 5")
    for more in ([], ["--kubeconfig", "/nowhere"], ["--kubeconfig", str(broken)]):
        done = run(command, *more)
        assert done.returncode == 3, done.stderr
        assert done.stderr.count("\n") == 1
        assert "no way to a Kubernetes API server" in done.stderr


@pytest.mark.system
def test_an_address_that_is_none() -> None:
    done = run("pod node", "--address", "somewhere")
    assert done.returncode in (2, 3)
    assert done.stderr.count("\n") == 1
