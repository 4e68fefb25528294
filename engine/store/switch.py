"""A new head: on top of the old one, which becomes a snapshot, or on top of an older snapshot (revert).

Everything is made beside the chain and synced; the rename of `volume.meta` is the only step that counts. Before it,
all that was made is left over, after it the old head's name is; `clean_leftovers` deletes either at the next open.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from engine.errors import SnapshotExistsError, StoreError
from engine.store.layout import (
    ImageMeta,
    VolumeMeta,
    read_image_meta,
    read_volume_meta,
    remove_image,
    write_image_meta,
    write_volume_meta,
)
from engine.store.snapshots import next_head, snapshot_name
from engine.store.sums import sums_file


class HeadSwitch:
    """`run` in any thread while nobody writes to the old head, then `Store.finish_switch`.

    `frozen` is what the old head becomes, None when it is thrown away. `layers` are the images below the new head
    that must be opened, the newest first; `files` are the descriptors of those and of the new head, the oldest first.
    `in_doubt` after a failure: the new `volume.meta` is there, and may or may not be on disk.
    """

    def __init__(
        self,
        directory: Path,
        old: VolumeMeta,
        *,
        parent: str,
        frozen: ImageMeta | None,
        layers: tuple[str, ...],
        created: str,
        metadata: Callable[[Callable[[], None]], None],
    ) -> None:
        self.meta = msgspec.structs.replace(old, head=next_head(old.head), parent=parent)
        self.frozen = frozen
        self.files: list[int] = []
        self.replaced: list[int] = []
        self.in_doubt = False
        self._directory = directory
        self._old = old.head
        self.layers = layers
        self._created = created
        self._metadata = metadata

    def run(self) -> None:
        """Raises StoreError, OSError; then nothing has changed, or it is `in_doubt` and the replica must be closed."""
        self._metadata(self._steps)

    def release(self) -> None:
        """After `finish_switch`, in any thread: closing what is replaced is what frees a head that was thrown away."""
        for fd in self.replaced:
            os.close(fd)
        self.replaced = []

    def _steps(self) -> None:
        try:
            self._prepare()
            write_volume_meta(self._directory, self.meta)
        except BaseException as error:
            for fd in self.files:
                os.close(fd)
            self.files = []
            if isinstance(error, OSError | StoreError):
                self._undo(error)
            raise
        with contextlib.suppress(OSError):
            remove_image(self._directory, self._old)

    def _prepare(self) -> None:
        directory, head = self._directory, self.meta.head
        self.files = [os.open(directory / image, os.O_RDONLY | os.O_CLOEXEC) for image in reversed(self.layers)]
        remove_image(directory, head)  # what an attempt without room left
        fd = os.open(directory / head, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self.files.append(fd)
        os.ftruncate(fd, self.meta.size)
        os.fsync(fd)
        write_image_meta(directory, ImageMeta(name=head, parent=self.meta.parent, created=self._created))
        if self.frozen is not None:
            image = self.frozen.name
            if (directory / image).exists():
                if not os.path.samefile(directory / image, directory / self._old):
                    raise SnapshotExistsError(directory, snapshot_name(image))
                (directory / image).unlink()
            for leftover in (f"{image}.meta", sums_file(image)):
                (directory / leftover).unlink(missing_ok=True)
            if (directory / sums_file(self._old)).exists():
                os.link(directory / sums_file(self._old), directory / sums_file(image))
            os.link(directory / self._old, directory / image)
            # keys that only another release knows come along
            os.link(directory / f"{self._old}.meta", directory / f"{image}.meta")
            write_image_meta(directory, self.frozen)

    def _undo(self, error: Exception) -> None:
        try:
            head = read_volume_meta(self._directory).head
        except StoreError:
            head = ""
        if head != self._old:
            self.in_doubt = True
            raise OSError(errno.EIO, f"the change of the head may or may not be on disk: {error}") from error
        with contextlib.suppress(OSError):
            remove_image(self._directory, self.meta.head)
            if self.frozen is not None and not isinstance(error, SnapshotExistsError):
                (self._directory / f"{self.frozen.name}.meta").unlink(missing_ok=True)
                remove_image(self._directory, self.frozen.name)


def freeze(
    directory: Path, head: str, image: str, *, created: str, user_created: bool, labels: dict[str, str]
) -> ImageMeta:
    """Metadata of the snapshot `image` that `head` becomes. Raises StoreError."""
    return msgspec.structs.replace(
        read_image_meta(directory, head),
        name=image,
        removed=False,
        user_created=user_created,
        created=created,
        labels=labels or None,
    )
