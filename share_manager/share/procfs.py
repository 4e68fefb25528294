"""What the kernel says about processes, mounts and loop devices."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec


class ProcessId(msgspec.Struct, frozen=True):
    """A process by pid and start time, so that a reused pid is never taken for it. Start: clock ticks since boot."""

    pid: int
    start: int


def start_time(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat (proc(5)); None when there is no such process, or only its zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (OSError, ValueError):
        return None
    # the command's name is in parentheses and may hold anything
    fields = text[text.rindex(")") + 2 :].split()
    return None if fields[0] in "ZX" else int(fields[19])


def identify(pid: int) -> ProcessId | None:
    start = start_time(pid)
    return None if start is None else ProcessId(pid, start)


def is_dying(pid: int) -> bool:
    """Killed, and not yet gone: its last threads wait for something, with all that the process held still open.

    A zombie whose pid still holds a lock has such threads; so has a process with SIGKILL pending (proc(5)).
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    pending = int(fields.get("SigPnd", "0"), 16) | int(fields.get("ShdPnd", "0"), 16)
    return fields.get("State", "").strip()[:1] in ("Z", "X") or bool(pending >> (signal.SIGKILL - 1) & 1)


def is_alive(process: ProcessId) -> bool:
    return start_time(process.pid) == process.start


def command_line(pid: int) -> list[str]:
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return []
    return [os.fsdecode(part) for part in raw.split(b"\0") if part]


def processes_naming(directory: Path) -> dict[int, list[str]]:
    """Processes with an argument that lies below `directory`, ourselves left out."""
    prefix = f"{directory}/"
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            argv = command_line(int(entry))
            if any(prefix in argument for argument in argv) and start_time(int(entry)) is not None:
                found[int(entry)] = argv
    return found


CAP_DAC_READ_SEARCH, CAP_SYS_ADMIN, CAP_SYS_RESOURCE = 2, 21, 24


def effective_capabilities(status: str) -> int:
    """The mask in the text of /proc/PID/status."""
    for line in status.splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def holds_capability(number: int) -> bool:
    return bool(effective_capabilities(Path("/proc/self/status").read_text()) >> number & 1)


@dataclass(frozen=True)
class Mount:
    """One line of /proc/self/mountinfo (proc(5)). `options` holds the mount's and the filesystem's."""

    target: Path
    fstype: str
    source: str
    options: frozenset[str]


_ESCAPE = re.compile(r"\\([0-7]{3})")


class MountLine(NamedTuple):
    """One line of mountinfo (proc(5)), as it is but for the escapes."""

    device: str
    root: str
    target: str
    options: str
    fstype: str
    source: str
    shown: str


def mount_lines(text: str) -> Iterator[MountLine]:
    """In the order in which they were mounted."""
    for line in text.splitlines():
        before, separator, after = line.partition(" - ")
        fields, rest = before.split(" "), after.split(" ")
        if separator and len(fields) >= 6 and len(rest) >= 3:
            yield MountLine(
                fields[2], _unescape(fields[3]), _unescape(fields[4]), fields[5], rest[0], _unescape(rest[1]), rest[2]
            )


def _unescape(text: str) -> str:
    """The kernel escapes some characters of ASCII only (seq_path, mangle)."""
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text)


def parse_mounts(text: str) -> list[Mount]:
    """In the order in which they were mounted."""
    return [
        Mount(Path(line.target), line.fstype, line.source, frozenset(f"{line.options},{line.shown}".split(",")))
        for line in mount_lines(text)
    ]


def all_mounts() -> list[Mount]:
    return parse_mounts(Path("/proc/self/mountinfo").read_text(errors="surrogateescape"))


def mounts_below(directory: Path) -> list[Mount]:
    return [mount for mount in all_mounts() if mount.target.is_relative_to(directory)]


def mounts_of(directory: Path, devices: Collection[str]) -> list[Mount]:
    """Mounts below `directory`, and those elsewhere of one of `devices` or of a source that is a path below it."""
    return [
        mount
        for mount in all_mounts()
        if mount.target.is_relative_to(directory) or mount.source in devices or mount.source.startswith(f"{directory}/")
    ]


def mount_at(target: Path) -> Mount | None:
    found = [mount for mount in mounts_below(target) if mount.target == target]
    return found[-1] if found else None


def loop_backing(device: str) -> str | None:
    """The file behind a loop device, None when it is free."""
    try:
        path = Path(f"/sys/block/{Path(device).name}/loop/backing_file")
        return path.read_text(errors="surrogateescape").rstrip("\n")
    except OSError:
        return None


def loops_below(directory: Path) -> list[str]:
    """Loop devices whose backing file lies below `directory`, newest last, mounted over or deleted ones too."""
    found = []
    for entry in Path("/sys/block").glob("loop*"):
        backing = loop_backing(entry.name)
        if backing and backing.startswith(f"{directory}/"):
            found.append(f"/dev/{entry.name}")
    return sorted(found, key=lambda name: int(re.sub(r"\D", "", name) or 0))
