"""Has ganesha look at once whether all clients are back after a restart, which it does every half lease by itself."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

# made of wake.c when this package is installed; preloaded, never imported
LIBRARY = Path(__file__).with_name(f"_wake{EXTENSION_SUFFIXES[0]}")
FIFO = "wake"
_SEPARATORS = " :"  # ld.so(8): LD_PRELOAD has no way to quote them


def hindrance(program: str) -> str:
    """Why this ganesha cannot be woken, or nothing. It works all the same, and its grace periods may last longer."""
    if not LIBRARY.exists():
        return f"{LIBRARY.name} was not built with this package"
    if any(separator in str(LIBRARY) for separator in _SEPARATORS):
        return f"{LIBRARY} has a space or a colon in its name"
    linked = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
    found = re.search(r"libganesha_nfsd\S* => (\S+)", linked)
    if found is None or b"\0reaper_wake\0" not in Path(found[1]).read_bytes():
        return f"{program} does not export reaper_wake"
    return ""


def make(run_dir: Path) -> None:
    """Raises OSError."""
    (run_dir / FIFO).unlink(missing_ok=True)
    os.mkfifo(run_dir / FIFO, 0o600)


def environment(run_dir: Path, outer: Mapping[str, str]) -> dict[str, str]:
    """Variables that a ganesha needs to be woken. Empty, and harmless to `wake`, where the library cannot be loaded."""
    if not LIBRARY.exists() or any(separator in str(LIBRARY) for separator in _SEPARATORS):
        return {}
    preload = " ".join(filter(None, (outer.get("LD_PRELOAD"), str(LIBRARY))))
    return {"LD_PRELOAD": preload, "SHARE_MANAGER_WAKE": str(run_dir / FIFO)}


class Waker:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def wake(self) -> None:
        # full: nobody reads
        with contextlib.suppress(BlockingIOError):
            os.write(self._fd, b".")


@contextlib.contextmanager
def waking(run_dir: Path) -> Iterator[Waker]:
    """Raises OSError."""
    # for reading too: this does not wait for ganesha
    fd = os.open(run_dir / FIFO, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield Waker(fd)
    finally:
        os.close(fd)
