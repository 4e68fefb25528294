"""Small real disks that can be filled."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

MIB = 1 << 20


@contextlib.contextmanager
def small_disk(place: Path, size: int, kind: Literal["ext4", "tmpfs"] = "ext4") -> Iterator[Path]:
    """Mount a file system of `size` bytes at `place`/disk. Skips the test where that cannot be done."""
    disk = place / "disk"
    disk.mkdir(parents=True)
    if kind == "tmpfs":
        argv = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    else:
        image = place / "disk.img"
        with image.open("wb") as file:
            file.truncate(size)
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", "-b", "4096", image], check=True)
        argv = ["mount", "-o", "loop", str(image), str(disk)]
    if os.geteuid() != 0 or subprocess.run(argv, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root and a loop device")
    try:
        yield disk
    finally:
        # lazily, so that even a server that still runs cannot keep the loop device for ever
        subprocess.run(["umount", "--lazy", disk], check=True)


def fill(disk: Path, leave: int) -> Path:
    """Take all room of a disk but `leave` bytes; the file that takes it."""
    ballast = disk / "ballast"
    found = os.statvfs(disk)
    with ballast.open("ab") as file:
        os.posix_fallocate(file.fileno(), 0, file.tell() + found.f_bavail * found.f_frsize - leave)
    return ballast


def move_onto(directory: Path, disk: Path) -> None:
    """Move a replica's directory to a disk; a link stays in its place."""
    subprocess.run(["cp", "-a", "--sparse=always", directory, disk], check=True)
    subprocess.run(["rm", "-r", directory], check=True)
    directory.symlink_to(disk / directory.name)
