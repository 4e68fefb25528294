"""Make a replica larger. Interrupted anywhere it works at its old size and takes the same again.

`volume.meta` is written last: until it is there the longer files are only unused room, which an open passes over.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from engine.errors import StoreError
from engine.store.layout import (
    VolumeMeta,
    check_size,
    extend_image,
    lock_directory,
    read_identity,
    read_volume_meta,
    store_errors,
    write_volume_meta,
)
from engine.store.maps import INTENT_MAP, extend_map, list_changes


class Growth:
    """Makes a replica larger: `run` in any thread, then `Store.finish_resize`. The chain must not change meanwhile."""

    def __init__(
        self,
        directory: Path,
        meta: VolumeMeta,
        size: int,
        metadata: Callable[[Callable[[], None]], None] = lambda write: write(),
    ) -> None:
        """Raises StoreError for a size that the replica cannot grow to."""
        check_size(directory, size)
        if size < meta.size:
            raise StoreError(directory, f"cannot shrink from {meta.size} to {size} bytes")
        self.meta = msgspec.structs.replace(meta, size=size)
        self._directory = directory
        self._metadata = metadata

    def run(self) -> None:
        """Raises OSError, StoreError."""
        directory, size = self._directory, self.meta.size
        extend_image(directory / self.meta.head, size)
        for name in (INTENT_MAP, *list_changes(directory).values()):
            extend_map(directory / name, size)
        self._metadata(lambda: write_volume_meta(directory, self.meta))


def resize_replica(directory: Path, size: int) -> None:
    """Grow to `size` bytes; doing it again, also after a crash in between, is harmless. No server may be running.

    Raises StoreError.
    """
    lock = lock_directory(directory)
    try:
        read_identity(directory)
        change = Growth(directory, meta := read_volume_meta(directory), size)
        if size > meta.size:
            with store_errors(directory, "resize the replica"):
                change.run()
    finally:
        os.close(lock)
