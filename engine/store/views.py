"""Snapshots as they are read: each through descriptors and an index of its own, so that the head's stay small.

Reads come from worker threads, one at a time. They go on while a removed snapshot below is folded away; the lock is
what orders a read and the moment at which data leaves one of the files that it goes through.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.store.chain import Chain
from engine.store.layout import read_chain
from engine.store.sums import Sums

# descriptors of all views together; a process has 1024, and the head's chain may need 255
MAX_LAYERS = 256
# 4 MiB of index, for 16 GiB of snapshot in pieces
MAX_MIXED = 4096


class _View:
    def __init__(self, directory: Path, image: str, size: int, sums: Callable[[str], Sums]) -> None:
        self.images = read_chain(directory, image)[::-1]
        self.files: list[int] = []
        try:
            for name in self.images:
                self.files.append(os.open(directory / name, os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            self.close()
            raise
        self.chain = Chain(self.files, size, MAX_MIXED, [sums(image) for image in self.images])

    def moved(self, child: str, end: int) -> None:
        if child in self.images[1:]:
            # its parent, by level: they count from 1
            self.chain.moved(self.images.index(child), end)

    def close(self) -> None:
        for fd in self.files:
            os.close(fd)
        self.files.clear()


class Views:
    """All methods may be called from any thread."""

    def __init__(self, directory: Path, sums: Callable[[str], Sums]) -> None:
        """`sums` gives those of an image."""
        self._directory = directory
        self._sums = sums
        self._lock = threading.Lock()
        self._open: dict[str, _View] = {}  # the one used longest ago first
        self._moved = "", 0

    def read(self, image: str, offset: int, length: int, size: int, check: Callable[[], None]) -> bytes:
        """Read from a volume of `size` bytes as `image` has it.

        Raises StoreError (CorruptBlockError), OSError, and what `check` does.
        """
        with self._lock:
            check()
            view = self._open.pop(image, None)
            if view is None or view.chain.size != size:
                if view is not None:
                    view.close()
                view = _View(self._directory, image, size, self._sums)
                view.moved(*self._moved)
            self._open[image] = view
            while len(self._open) > 1 and sum(len(other.files) for other in self._open.values()) > MAX_LAYERS:
                self._open.pop(next(iter(self._open))).close()
            return view.chain.read_checked(offset, length)[0]

    def moved(self, child: str, end: int) -> None:
        """What `child` holds below offset `end` is in its parent too, and goes from `child` after this returns."""
        with self._lock:
            self._moved = child, end
            for view in self._open.values():
                view.moved(child, end)

    @contextmanager
    def without(self, image: str) -> Iterator[None]:
        """Nothing is read through `image` within the block, and views that did begin anew after it."""
        with self._lock:
            self._moved = "", 0
            for name, view in list(self._open.items()):
                if image in view.images:
                    self._open.pop(name).close()
            yield

    def forget(self, start: int, end: int) -> None:
        """Which image holds what in this range may have changed."""
        with self._lock:
            for view in self._open.values():
                view.chain.changed(start, end - start)

    def close(self) -> None:
        with self._lock:
            for view in self._open.values():
                view.close()
            self._open.clear()
