"""What a disk may hold after power was cut: recorded at every system call that changes a directory, and replayed.

A name is on disk for certain after an fsync of its directory, content after one of its file. Of what came later any
part may be there: all prefixes of the changed names are tried, with the old and the new content of each file. That
includes the state that a mere kill leaves.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from engine.store import chain, coalesce

# size, and pieces of data by offset
Content = tuple[int, tuple[tuple[int, bytes], ...]]
Names = tuple[tuple[str, int], ...]
State = tuple[tuple[str, int, Content], ...]

EMPTY: Content = (0, ())
CHANGES = ("open", "link", "rename", "replace", "unlink", "fsync", "fdatasync", "pwrite", "write", "ftruncate")


def _content(path: Path) -> Content:
    fd = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        return size, tuple((start, os.pread(fd, end - start, start)) for start, end in chain.extents(fd, 0, size))
    finally:
        os.close(fd)


class Recorder:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.states: dict[State, None] = {}
        self._now: dict[int, Content] = {}
        self._names = [self._look()]
        self._durable = dict(self._now)

    def _look(self) -> Names:
        names = []
        for entry in sorted(self.directory.iterdir()):
            inode = entry.stat().st_ino
            names.append((entry.name, inode))
            self._now[inode] = _content(entry)
        return tuple(names)

    def changed(self) -> None:
        names = self._look()
        if names != self._names[-1]:
            self._names.append(names)
        for listed in self._names:
            inodes = sorted({inode for _, inode in listed})
            choices = [dict.fromkeys((self._now[inode], self._durable.get(inode, EMPTY))) for inode in inodes]
            for contents in itertools.product(*choices):
                by_inode = dict(zip(inodes, contents, strict=True))
                self.states[tuple((name, inode, by_inode[inode]) for name, inode in listed)] = None

    def synced(self, fd: int) -> None:
        found = os.fstat(fd)
        if found.st_ino == self.directory.stat().st_ino:
            self._names = [self._look()]
        elif found.st_ino in self._now:
            self._look()
            self._durable[found.st_ino] = self._now[found.st_ino]


@contextmanager
def recording(directory: Path) -> Iterator[Recorder]:
    """All that happens in `directory` within the block; what is there before is on disk."""
    recorder = Recorder(directory)
    busy = False

    def wrap(name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal busy
            if busy:
                return inner(*args, **kwargs)
            result = inner(*args, **kwargs)
            busy = True
            try:
                if name in ("fsync", "fdatasync"):
                    recorder.synced(args[0])
                recorder.changed()
            finally:
                busy = False
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGES:
            patch.setattr(os, name, wrap(name, getattr(os, name)))
        for module in (chain, coalesce):
            patch.setattr(module, "punch_hole", wrap("punch_hole", chain.punch_hole))
        recorder.changed()
        yield recorder


def materialise(state: State, directory: Path) -> None:
    directory.mkdir()
    made: dict[int, Path] = {}
    for name, inode, (size, pieces) in state:
        path = directory / name
        if inode in made:
            os.link(made[inode], path)
            continue
        made[inode] = path
        with open(path, "wb") as file:
            file.truncate(size)
            for offset, data in pieces:
                file.seek(offset)
                file.write(data)
