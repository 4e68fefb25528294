"""What may be done only once, over and over: directories made, files created exclusively, renamed, linked and removed.

Each step must succeed. EEXIST or ENOENT in one of them says that the server carried out a request, its answer was lost,
and the client's second request was refused by a server that knew nothing of the first.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypedDict

from tests.lab.workloads import channel


class Outcome(TypedDict):
    rounds: int
    errors: list[dict[str, Any]]


def _steps(base: str) -> list[tuple[str, Callable[[], None]]]:
    return [
        ("mkdir", partial(os.mkdir, f"{base}.d")),
        ("create", partial(_create, f"{base}.a")),
        ("rename", partial(os.rename, f"{base}.a", f"{base}.b")),
        ("link", partial(os.link, f"{base}.b", f"{base}.c")),
        ("unlink", partial(os.unlink, f"{base}.b")),
        ("unlink", partial(os.unlink, f"{base}.c")),
        ("rmdir", partial(os.rmdir, f"{base}.d")),
    ]


def _create(path: str) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))


def names(directory: str, pause: float = 0.0) -> Outcome:
    """Until told to stop. Emits `running` after the first round, `progress` about twice a second."""
    os.makedirs(directory, exist_ok=True)
    errors: list[dict[str, Any]] = []
    rounds = 0
    told = time.time()
    while not channel.stopping(pause):
        for operation, act in _steps(f"{directory}/{rounds}"):
            try:
                act()
            except OSError as error:
                errors.append({"operation": operation, "errno": error.errno, "round": rounds, "time": time.time()})
        rounds += 1
        if rounds == 1:
            channel.emit("running")
        if time.time() - told > 0.5:
            told = time.time()
            channel.emit("progress", time=told, rounds=rounds)
    return {"rounds": rounds, "errors": errors}
