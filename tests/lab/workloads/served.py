"""The product itself as a job of a guest: `share-manager serve`, its events passed on as they come."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from typing import Any, TypedDict

from tests.lab.workloads import channel


class Served(TypedDict):
    status: int
    stderr: str


def serve(argv: list[str], given: str = "") -> Served:
    """Until told to stop, or until it ends by itself. `given` goes to its standard input."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdin.write(given)
    process.stdin.close()
    said: list[str] = []
    readers = [
        threading.Thread(target=_forward, args=(process.stdout,)),
        threading.Thread(target=lambda stream: said.append(stream.read()), args=(process.stderr,)),
    ]
    for reader in readers:
        reader.start()
    while process.poll() is None:
        if channel.stopping(0.05):
            process.send_signal(signal.SIGTERM)
            process.wait()
    for reader in readers:
        # children of one that was killed may hold the pipe
        reader.join(2)
    return {"status": process.returncode, "stderr": "".join(said)}


def _forward(lines: Any) -> None:
    for line in lines:
        event = json.loads(line)
        channel.emit(**event)


def kill(pids: list[int]) -> None:
    """All at once; without the time that starting a program takes."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
