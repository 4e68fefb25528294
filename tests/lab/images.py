"""What is in the replicas of a stopped volume, looked at without the product: every replica, byte for byte."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from engine.store import Store

PIECE = 1 << 20


def head(directory: Path) -> Path:
    """The head file of a replica directory, as its metadata names it."""
    return directory / str(json.loads((directory / "volume.meta").read_text())["Head"])


def content(directory: Path, flat: Path) -> Path:
    """A file with what the volume holds by this replica: its head, or, when it has snapshots, `flat`, made for that."""
    if not list(directory.glob("volume-snap-*.img")):
        return head(directory)
    # the product's own reading of the chain
    store = Store.open(directory)
    try:
        with flat.open("wb") as file:
            file.truncate(store.size)
            for offset in range(0, store.size, PIECE):
                piece = store.read(offset, min(PIECE, store.size - offset))
                if piece.count(0) != len(piece):
                    file.seek(offset)
                    file.write(piece)
    finally:
        store.close()
    return flat


def differences(directories: Sequence[Path]) -> list[str]:
    """Where the heads of the replicas differ (up to ten complaints). A hole is zeros."""
    heads = [head(directory) for directory in directories]
    first = heads[0]
    complaints = []
    for other in heads[1:]:
        if first.stat().st_size != other.stat().st_size:
            complaints.append(f"{first} has {first.stat().st_size} bytes, {other} {other.stat().st_size}")
            continue
        with first.open("rb") as one, other.open("rb") as two:
            pieces = sorted({*_pieces_with_data(one.fileno()), *_pieces_with_data(two.fileno())})
            for piece in pieces:
                a, b = os.pread(one.fileno(), PIECE, piece * PIECE), os.pread(two.fileno(), PIECE, piece * PIECE)
                if a != b:
                    at = next(i for i in range(len(a)) if a[i] != b[i])
                    wrong = sum(a[i : i + 4096] != b[i : i + 4096] for i in range(0, len(a), 4096))
                    complaints.append(f"{first} and {other} differ from byte {piece * PIECE + at} on, {wrong} blocks")
    return complaints[:10]


def words_in(image: Path, words: Sequence[str]) -> list[str]:
    """Which of these are in it. They may lie across two pieces."""
    found: set[str] = set()
    overlap = max(map(len, words))
    with image.open("rb") as file:
        for piece in _pieces_with_data(file.fileno()):
            content = os.pread(file.fileno(), PIECE + overlap, piece * PIECE)
            found |= {word for word in words if word.encode() in content}
    return [word for word in words if word in found]


def _pieces_with_data(fd: int) -> Iterator[int]:
    at = 0
    while True:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        at = os.lseek(fd, start, os.SEEK_HOLE)
        yield from range(start // PIECE, (at - 1) // PIECE + 1)


def read_ext4(image: Path, name: str) -> bytes:
    """The content of a file in an ext4 image that nobody has mounted."""
    return _output("debugfs", "-R", f"cat /{name}", str(image))


def check_ext4(image: Path) -> None:
    """Raises AssertionError when e2fsck finds anything to say."""
    done = subprocess.run(["e2fsck", "-f", "-n", image], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"e2fsck of {image}: {done.stdout}{done.stderr}"


def _output(*argv: str) -> bytes:
    return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=True).stdout
