"""Real parts for tests that need them: loop devices over sparse files, free ports, the command line in a subprocess."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(sys.executable).with_name("share-manager")


@pytest.fixture
def root() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")


@pytest.fixture
def make_loop(root: None, tmp_path: Path) -> Iterator[Callable[[int], str]]:
    """Makes loop devices over new sparse files of a size in bytes."""
    devices: list[str] = []

    def make(size: int) -> str:
        file = tmp_path / f"disk{len(devices)}.img"
        with file.open("wb") as disk:
            disk.truncate(size)
        argv = ["losetup", "--find", "--show", "--sector-size", "4096", "--direct-io=on", str(file)]
        device = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()
        devices.append(device)
        return device

    yield make
    for device in devices:
        subprocess.run(["losetup", "--detach", device], check=True)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run_command(*arguments: str, env: dict[str, str] | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PROGRAM, *arguments],
        capture_output=True,
        text=True,
        timeout=90,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **(env or {})},
        check=False,
        **options,
    )


class Running:
    """A `share-manager serve` or `attach` with JSON output."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [PROGRAM, *arguments, "--output", "json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.events: list[dict[str, Any]] = []

    def wait_event(self, name: str, budget: float = 60.0) -> dict[str, Any]:
        assert self.process.stdout is not None
        end = time.monotonic() + budget
        while time.monotonic() < end:
            line = self.process.stdout.readline()
            if not line:
                break
            self.events.append(json.loads(line))
            if self.events[-1]["event"] == name:
                return self.events[-1]
        raise AssertionError(f"no event {name}: {self.events[-10:]} {self.stop()}")

    def stop(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.ended()

    def ended(self) -> tuple[int, str]:
        """Of one that somebody else has asked to leave: a signal in its last moment would kill it."""
        out, err = self.process.communicate(timeout=90)
        self.events += [json.loads(line) for line in out.splitlines()]
        return self.process.returncode, err


@pytest.fixture
def start(root: None) -> Iterator[Callable[..., Running]]:
    running: list[Running] = []

    def begin(*arguments: str) -> Running:
        running.append(Running(*arguments))
        return running[-1]

    yield begin
    for one in running:
        if one.process.poll() is None:
            one.stop()
        for pipe in (one.process.stdout, one.process.stderr):
            if pipe is not None:
                pipe.close()


def runtime_directories(volume: str) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        return [name for name in os.listdir("/run/share-manager") if name.rpartition("-")[0] == volume]
    return []
