"""What a lab may have left on the machine, and how to remove it.

Everything a lab starts carries its directory in the environment (`TOKEN`), lives in that directory, or is a network
namespace named after it, so what belongs to it can be told from what other people run on the same machine.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TOKEN = "SHARE_MANAGER_LAB"
PREFIX = "sm-lab-"


@dataclass(frozen=True)
class Leftover:
    kind: str
    name: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.name} {self.detail}".rstrip()


def namespace_of(directory: Path) -> str:
    return directory.name


def find(directory: Path) -> list[Leftover]:
    """Everything that the lab of `directory`, or a part of a lab that lives there, has left."""
    return [*_processes(directory), *_mounts(directory), *_loops(directory), *_namespaces(directory)]


def remove(directory: Path, deadline: float = 10.0) -> None:
    """Remove it by force: processes, mounts from the top down, loop devices, the namespace."""
    end = time.monotonic() + deadline
    while processes := _processes(directory):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process.name), signal.SIGKILL)
        if time.monotonic() > end:
            break
        time.sleep(0.05)
    for mount in reversed(_mounts(directory)):
        if _quiet("umount", mount.name) != 0:
            _quiet("umount", "--lazy", mount.name)
    for loop in _loops(directory):
        _quiet("losetup", "--detach", loop.name)
    for namespace in _namespaces(directory):
        _quiet("ip", "netns", "delete", namespace.name)


def abandoned() -> Iterator[Path]:
    """Directories of labs whose session is no more: killed before it could clean up."""
    for directory in Path("/tmp").glob(f"{PREFIX}*"):
        owner = re.match(rf"{PREFIX}(\d+)-", directory.name)
        if owner is not None and not Path("/proc", owner[1]).exists():
            yield directory


def _quiet(*argv: str) -> int:
    try:
        return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=20, check=False).returncode
    except subprocess.TimeoutExpired:
        return 124


def _processes(directory: Path) -> list[Leftover]:
    mark = f"{TOKEN}={directory}/".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "environ").read_bytes().split(b"\0")
            if not any(word.startswith(mark) or word + b"/" == mark for word in words):
                continue
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            continue
        found.append(Leftover("process", entry.name, command[:160]))
    return found


def _mounts(directory: Path) -> list[Leftover]:
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        tail = fields[fields.index("-") + 1 :]
        if f"{fields[4]}/".startswith(f"{directory}/"):
            found.append(Leftover("mount", fields[4], f"{tail[0]} of {tail[1]}"))
    return found


def _loops(directory: Path) -> list[Leftover]:
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            target = backing.read_text().strip()
            if target.startswith(f"{directory}/"):
                found.append(Leftover("loop device", f"/dev/{backing.parent.parent.name}", f"on {target}"))
    return found


def _namespaces(directory: Path) -> list[Leftover]:
    name = namespace_of(directory)
    return [Leftover("network namespace", name)] if Path("/run/netns", name).exists() else []
