from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.launch import ReplicaConfig, replica_argv
from engine.store import create_replica
from engine.store.direct import open_direct
from tests.engine.replica.client import KEY, UUID
from tests.engine.replica.inside import io_of

SIZE = 64 << 20


@pytest.fixture(params=["memory", "disk", "direct"])
def tmp_path(request: pytest.FixtureRequest) -> Iterator[Path]:
    """In memory, where data goes through the page cache; on disk, where slow reads, and where all goes past it."""
    home = Path("/dev/shm" if request.param == "memory" else "/var/tmp")
    with tempfile.TemporaryDirectory(prefix=request.param, dir=home if home.is_dir() else None) as base:
        if request.param != "memory":
            (Path(base) / "probe").write_bytes(bytes(4096))
            fd = open_direct(Path(base) / "probe", insist=False)
            if fd < 0:
                pytest.skip(f"{home} has no direct I/O")
            os.close(fd)
        yield Path(base)


class ReplicaProcess:
    def __init__(self, base: Path, directory: Path | None = None, listen: str = "") -> None:
        self.base = base
        self.directory = directory or base / "r1"
        secret = base / "secret"
        secret.write_text(KEY.hex())
        self.config = ReplicaConfig(
            directory=str(self.directory),
            listen=listen or f"unix:{base}/r1.sock",
            secret_file=str(secret),
            io=io_of(base),
        )
        self.process: subprocess.Popen[bytes] | None = None
        self.address = ""

    def start(self) -> ReplicaProcess:
        argv = replica_argv(self.config, self.base / "r1.json")
        with open(self.base / "log", "ab") as log:
            self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=log)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.log
        self.address = json.loads(line)["address"]
        return self

    @property
    def log(self) -> str:
        return (self.base / "log").read_text()

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self._reap()

    def terminate(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return self._reap()

    def _reap(self) -> int:
        assert self.process is not None
        assert self.process.stdout is not None
        status = self.process.wait(10)
        self.process.stdout.close()
        self.process = None
        return status


@pytest.fixture
def replica(tmp_path: Path) -> Iterator[ReplicaProcess]:
    create_replica(tmp_path / "r1", volume="vol1", uuid=UUID, replica="r1", size=SIZE)
    running = ReplicaProcess(tmp_path).start()
    yield running
    if running.process is not None:
        running.kill()
