"""What a lab may have left on the machine, and how to remove it.

Everything a lab starts carries its directory in the environment (`TOKEN`), lives in that directory, has the lab's
mark in its name (the volumes), or is a network namespace named after it. So what belongs to it can be told from what
other people run on the same machine. The parts of a lab, such as a share, have directories and marks of their own.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

TOKEN = "SHARE_MANAGER_LAB"
PREFIX = "sm-lab-"
RUNTIME = "/run/share-manager"


@dataclass(frozen=True)
class Leftover:
    kind: str
    name: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.name} {self.detail}".rstrip()


def namespace_of(directory: Path) -> str:
    return directory.name


def owner_of(directory: Path) -> int:
    """The process id of the session whose lab lives there."""
    found = re.match(rf"{PREFIX}(\d+)-", directory.name)
    if found is None:
        raise ValueError(f"{directory} is not the directory of a lab")
    return int(found[1])


def mark_of(directory: Path) -> str:
    """What the names of a lab's volumes end in."""
    return f"-lab{owner_of(directory)}"


def find(directory: Path, mark: str) -> list[Leftover]:
    """Everything that is left of the lab, or the part of one, with that directory and mark."""
    return [
        *processes(directory),
        *_mounts(directory, mark),
        *_loops(directory, mark),
        *_runtime(mark),
        *_namespaces(directory),
    ]


def remove(directory: Path, mark: str, deadline: float = 10.0) -> None:
    """Remove it by force: processes, mounts from the top down, loop devices, the namespace."""
    end = time.monotonic() + deadline
    while alive := processes(directory):
        for process in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process.name), signal.SIGKILL)
        _end_connections(directory, mark)
        if time.monotonic() > end:
            break
        time.sleep(0.05)
    # there may have been no process left, and the kernel's own threads wait there too
    _end_connections(directory, mark)
    # found now: a loop device forgets the path of its file when the mount below that is detached
    loops = _loops(directory, mark)
    for command in ([], ["--lazy"]):
        for _ in range(3):
            for mount in reversed(_mounts(directory, mark)):
                _quiet("umount", *command, mount.name)
            for loop in loops:
                _quiet("losetup", "--detach", loop.name)
    for run in _runtime(mark):
        shutil.rmtree(run.name, ignore_errors=True)
    for namespace in _namespaces(directory):
        _quiet("ip", "netns", "delete", namespace.name)


def _end_connections(directory: Path, mark: str) -> None:
    """Who waits for a block file that nobody serves any more cannot die, or be unmounted, before."""
    for mount in _mounts(directory, mark):
        if mount.detail.startswith("fuse"):
            _quiet("umount", "--force", mount.name)


def abandoned() -> Iterator[Path]:
    """Directories of labs whose session is no more: killed before it could clean up."""
    for directory in Path("/tmp").glob(f"{PREFIX}*"):
        if not Path("/proc", str(owner_of(directory))).exists():
            yield directory


def remove_abandoned(tell: Callable[[str], object] = lambda _: None) -> None:
    """Remove what those labs have left."""
    for directory in abandoned():
        tell(f"lab: removing {directory}, whose session was killed")
        remove(directory, mark_of(directory))
        shutil.rmtree(directory, ignore_errors=True)


def _quiet(*argv: str) -> int:
    try:
        return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=20, check=False).returncode
    except subprocess.TimeoutExpired:
        return 124


def processes(directory: Path) -> list[Leftover]:
    """The processes that were started for that directory, or for one below it, and their descendants."""
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


def _ours(path: str, directory: Path, mark: str) -> bool:
    return f"{path}/".startswith(f"{directory}/") or re.search(re.escape(mark) + r"(?!\d)", path) is not None


def _mounts(directory: Path, mark: str) -> list[Leftover]:
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        tail = fields[fields.index("-") + 1 :]
        if _ours(fields[4], directory, mark):
            found.append(Leftover("mount", fields[4], f"{tail[0]} of {tail[1]}"))
    return found


def _loops(directory: Path, mark: str) -> list[Leftover]:
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            target = backing.read_text().strip()
            if _ours(target, directory, mark):
                found.append(Leftover("loop device", f"/dev/{backing.parent.parent.name}", f"on {target}"))
    return found


def lost_loops(devices: Iterable[str]) -> list[Leftover]:
    """Those of the loop devices that are attached to a file which no path leads to any more."""
    found = []
    for device in sorted(devices):
        with contextlib.suppress(OSError):
            backing = Path("/sys/block", Path(device).name, "loop/backing_file").read_text().strip()
            if not Path(backing).is_file():
                found.append(Leftover("loop device", device, f"on {backing}, which is gone"))
    return found


def _runtime(mark: str) -> list[Leftover]:
    found = [*Path(RUNTIME).glob(f"*{mark}-*"), *Path(RUNTIME).glob(mark)]
    return [Leftover("runtime directory", str(path)) for path in found]


def _namespaces(directory: Path) -> list[Leftover]:
    """The lab's, and those of its nodes."""
    name = namespace_of(directory)
    found = sorted([*Path("/run/netns").glob(name), *Path("/run/netns").glob(f"{name}-*")])
    return [Leftover("network namespace", path.name) for path in found]
