"""A tree of files with known content: write it, and find every difference later."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

BLOCK = 1 << 18


def write(directory: str, seed: int, files: int, largest: int) -> dict[str, str]:
    """Write `files` files of up to `largest` bytes over a few subdirectories. Their SHA-256 by relative name."""
    chance = random.Random(seed)
    digests = {}
    for number in range(files):
        name = (
            Path(f"d{number % 7}", f"e{number % 3}", f"file-{number:04d}") if number % 5 else Path(f"top-{number:04d}")
        )
        path = Path(directory, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        digests[str(name)] = _write_one(
            path, chance, chance.choice((0, 1, 4095, 4096, 4097, chance.randrange(largest)))
        )
    return digests


def write_large(path: str, seed: int, size: int, sync: bool = True) -> str:
    """One file of `size` bytes, its SHA-256."""
    return _write_one(Path(path), random.Random(seed), size, sync)


def _write_one(path: Path, chance: random.Random, size: int, sync: bool = False) -> str:
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        left = size
        while left:
            block = chance.randbytes(min(left, BLOCK))
            digest.update(block)
            file.write(block)
            left -= len(block)
        if sync:
            os.fsync(file.fileno())
    return digest.hexdigest()


def digest(path: str) -> str:
    found = hashlib.sha256()
    with Path(path).open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            found.update(block)
    return found.hexdigest()


def verify(directory: str, digests: dict[str, str]) -> list[str]:
    """Every difference between the tree and `digests` (up to ten)."""
    found = {str(path.relative_to(directory)): path for path in _files(Path(directory))}
    complaints = [f"{name} is missing" for name in sorted(digests.keys() - found.keys())]
    complaints += [f"{name} should not be there" for name in sorted(found.keys() - digests.keys())]
    for name in sorted(digests.keys() & found.keys()):
        if digest(str(found[name])) != digests[name]:
            complaints.append(f"{name} has other content")
    return complaints[:10]


def _files(directory: Path) -> Iterator[Path]:
    for entry in os.scandir(directory):
        if entry.is_dir(follow_symlinks=False):
            yield from _files(Path(entry.path))
        else:
            yield Path(entry.path)


def drop_caches() -> None:
    """Forget everything that this client has cached and that is clean."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")
