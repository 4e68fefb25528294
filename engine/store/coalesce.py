"""Getting rid of a removed snapshot: its only child is folded into it, and it takes the child's place.

That is Longhorn's way. It costs what the child holds, not what the removed snapshot does: when the oldest of many is
dropped, that is the smaller by far. What is copied lands under the child, where nobody looks, so no state in between
can be seen; only then, synced, is it punched out of the child, and the child reads it from below. So at every instant
and after every crash the two files say the same together, more room than one step's is never needed, and what is
done need not be remembered: the child has data only where work is left.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from engine.durable import sync_directory
from engine.store.chain import extents, punch_hole, pwrite_all
from engine.store.layout import read_image_meta, remove_image, write_image_meta
from engine.store.sharing import changing
from engine.store.sums import sums_file
from engine.store.views import Views

BLOCK = 4096
BUFFER = 1 << 20


class Merge:
    """A removed snapshot and the only image that builds on it; `child` is empty when there is none."""

    def __init__(self, directory: Path, removed: str, child: str) -> None:
        """Raises OSError."""
        self.directory = directory
        self.removed = removed
        self.child = child
        # all of the child below it is in the removed one, synced, and known to be there to whoever reads
        self.cursor = 0
        self.punched = 0
        self.without_sums = False
        self.files: list[int] = []
        if child:
            try:
                for image in (removed, child):
                    self.files.append(os.open(directory / image, os.O_RDWR | os.O_CLOEXEC))
            except OSError:
                self.close()
                raise

    @property
    def left(self) -> int:
        """Bytes that the child still occupies."""
        return os.fstat(self.files[1]).st_blocks * 512 if self.files else 0

    def close(self) -> None:
        for fd in self.files:
            os.close(fd)
        self.files = []


class CoalesceStep:
    """A part of a merge: `run` in any thread, then `Store.finish_coalesce`.

    Writing to the head may go on meanwhile, another change of the chain may not.
    """

    def __init__(self, merge: Merge, views: Views, budget: int, metadata: Callable[[Callable[[], None]], None]) -> None:
        self.merge = merge
        self.copied = 0
        self.end = merge.cursor
        self.done = False
        self._views = views
        self._budget = max(budget, BLOCK)
        self._metadata = metadata

    def run(self) -> None:
        """Raises StoreError, OSError. After ENOSPC and EDQUOT try again, after another OSError close the replica.

        SnapshotInUseError while one of the two images is a clone's too.
        """
        merge = self.merge
        if not merge.child:
            with self._views.without(merge.removed):
                pass  # and nobody begins to read it again
            remove_image(merge.directory, merge.removed)
            sync_directory(merge.directory)
            self.done = True
            return
        with changing(merge.directory, (merge.removed, merge.child), merge.files):
            self._drop_sums()
            self._fold()

    def _fold(self) -> None:
        merge = self.merge
        into, child = merge.files
        # an interrupted swap: both names are the one merged file, and a hole in it would be in both
        if not os.path.samestat(os.fstat(into), os.fstat(child)):
            if not merge.cursor:
                with self._views.without(merge.removed):
                    pass  # of itself it has no valid content any more
            if merge.punched < merge.cursor:
                self._views.moved(merge.child, merge.cursor)
                # without holes the child keeps its copy, hidden from nobody, until it goes as a whole
                punch_hole(child, merge.punched, merge.cursor - merge.punched)
                merge.punched = merge.cursor
            size = os.fstat(child).st_size
            if not self._copy(into, child, size):
                return
            if os.fstat(into).st_size < size:
                os.ftruncate(into, size)
            os.fsync(into)
        with self._views.without(merge.child):
            self._metadata(self._swap)
        self.done = True

    def _drop_sums(self) -> None:
        """Both files change from here on."""
        merge = self.merge
        if not merge.without_sums:
            for image in (merge.removed, merge.child):
                (merge.directory / sums_file(image)).unlink(missing_ok=True)
            sync_directory(merge.directory)
            merge.without_sums = True

    def _copy(self, into: int, child: int, size: int) -> bool:
        """Copy up to the budget, and sync it; True when nothing is left to copy."""
        at = self.end
        for start, end in extents(child, at, size):
            # whole blocks: that is the unit in which a layer hides another
            start -= start % BLOCK
            while start < end:
                if self.copied >= self._budget:
                    os.fdatasync(into)
                    self.end = start
                    return False
                count = min(BUFFER, self._budget - self.copied, end - start)
                count += -count % BLOCK
                data = os.pread(child, count, start)
                pwrite_all(into, data, start)
                self.copied += count
                start += count
        self.end = size
        return True

    def _swap(self) -> None:
        merge, directory = self.merge, self.merge.directory
        into, child = directory / merge.removed, directory / merge.child
        if not os.path.samefile(into, child):
            temporary = directory / f".{merge.child}.tmp"
            temporary.unlink(missing_ok=True)
            os.link(into, temporary)
            os.replace(temporary, child)
            sync_directory(directory)
        # Longhorn's sum of the file, which is another one now
        (directory / f"{merge.child}.checksum").unlink(missing_ok=True)
        below = read_image_meta(directory, merge.removed).parent
        write_image_meta(directory, msgspec.structs.replace(read_image_meta(directory, merge.child), parent=below))
        remove_image(directory, merge.removed)
        sync_directory(directory)
