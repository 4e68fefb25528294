"""Images on this machine: made before the guest boots, looked at after its power was cut."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from engine.store import create_replica
from tests.lab import images
from tests.powerloss.writelog import copy_sparse

DISK_SIZE = 96 << 20
LOG_SIZE = 8 << 30


class PowerLossError(Exception):
    """Something that must survive the loss of power did not."""


def run(*argv: str | Path) -> str:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PowerLossError(f"{' '.join(map(str, argv))}: status {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout


@contextlib.contextmanager
def mounted(image: Path, place: Path) -> Iterator[Path]:
    """The journal is replayed by it, as after every loss of power."""
    place.mkdir(exist_ok=True)
    run("mount", "-o", "loop", image, place)
    try:
        yield place
    finally:
        _unmount(place)


def _unmount(place: Path) -> None:
    """A loop device below may be let go of a moment later, when somebody else on the machine looks at it just then."""
    end = time.monotonic() + 10
    while True:
        try:
            run("umount", place)
            return
        except PowerLossError as error:
            if "busy" not in str(error) or time.monotonic() > end:
                raise
        time.sleep(0.05)


def make_volume(image: Path, size: int) -> None:
    """An ext4 in a file that is to become the content of a volume."""
    _ext4(image, size)


def make_disk(image: Path, volume: Path, *, name: str, replica: str, uuid: str, size: int) -> None:
    """A disk with a filesystem that holds one replica of `volume`."""
    _ext4(image, DISK_SIZE)
    with mounted(image, image.with_suffix(".mnt")) as place:
        directory = place / "replica"
        create_replica(directory, volume=name, uuid=uuid, replica=replica, size=size)
        copy_sparse(volume, images.head(directory))


def _ext4(image: Path, size: int) -> None:
    with image.open("wb") as file:
        file.truncate(size)
    run("mkfs.ext4", "-q", "-b", "4096", "-J", "size=4", "-E", "nodiscard,lazy_itable_init=0", image)
