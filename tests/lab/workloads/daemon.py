"""A program of the product that runs in a guest: what it prints becomes events, "stop" becomes SIGTERM."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
import time
from pathlib import Path

from tests.lab.workloads import channel


def run(argv: list[str], log: str) -> int:
    """Its exit status. Every object that it prints is an event of the same name."""
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as errors:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            cwd="/",
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
            start_new_session=True,
        )
    assert process.stdout is not None
    output = process.stdout

    def follow() -> None:
        for line in output:
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                channel.emit(event.pop("event"), **event)

    reader = threading.Thread(target=follow, daemon=True)
    reader.start()
    while process.poll() is None:
        if channel.stopping(0.1):
            process.terminate()
            break
        time.sleep(0.05)
    status = process.wait(60)
    reader.join(5)
    return status
