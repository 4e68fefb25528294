"""Images that another replica has too: a clone's, until it has copied them (clone.py).

Who shares one is told by its number of names (hard links). No crash can make that wrong, and whichever side is deleted
first, the other need not be told. Nothing may change the bytes of a shared image.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from engine.errors import SnapshotInUseError
from engine.store.snapshots import snapshot_name


def shared(directory: Path, images: Iterable[str]) -> set[str]:
    """Those of `images` that have a name outside `directory` too. Raises OSError."""
    found = {image: os.stat(directory / image) for image in images}
    suspects = {image: stat for image, stat in found.items() if stat.st_nlink > 1}
    if not suspects:
        return set()
    # an interrupted change of the chain, too, leaves two names of one file
    names = [os.stat(entry.path, follow_symlinks=False) for entry in os.scandir(directory)]
    return {
        image
        for image, stat in suspects.items()
        if stat.st_nlink > sum(os.path.samestat(stat, other) for other in names)
    }


@contextlib.contextmanager
def changing(directory: Path, images: tuple[str, ...], files: list[int]) -> Iterator[None]:
    """Within the block no clone begins to share these images. Raises SnapshotInUseError when one does, or is about to.

    `files` are descriptors of them. From any thread; waits for nobody.
    """
    with contextlib.ExitStack() as locks:
        locked: list[os.stat_result] = []
        for fd in files:
            found = os.fstat(fd)
            if any(os.path.samestat(found, other) for other in locked):
                continue  # after an interrupted swap both names are one file
            locked.append(found)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SnapshotInUseError(directory, f"{snapshot_name(images[0])!r} is being cloned") from None
            locks.callback(fcntl.flock, fd, fcntl.LOCK_UN)
        if clones := shared(directory, images):
            names = ", ".join(repr(snapshot_name(image)) for image in sorted(clones))
            raise SnapshotInUseError(
                directory, f"a clone still shares the data of snapshot {names}: that ends when it is independent"
            )
        yield
