"""A replica that is filled from another one: what it becomes before, how far it is, and its images one by one.

`rebuild.json` says which images are complete up to where. It is written before anything is dropped, and later only
behind a sync of what it says, so at every instant it promises too little rather than too much. Without the mark
`Rebuilding` in `volume.meta` it means nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from engine.durable import replace_file, sync_directory
from engine.store.chain import BLOCK, extents, punch_hole, pwrite_all
from engine.store.layout import (
    HEAD_IMAGE,
    REBUILD,
    SNAPSHOT_IMAGE,
    ImageMeta,
    VolumeMeta,
    read_chain,
    read_image_meta,
    remove_image,
    write_image_meta,
    write_volume_meta,
)
from engine.store.snapshots import SnapshotInfo, next_head, read_snapshots, snapshot_image, snapshot_name
from engine.store.sums import SUFFIX
from engine.wire.frame import Buffer

# how far beyond the range that was asked for an empty one is followed
MAX_HOLE = 1 << 31

Extents = Sequence[tuple[int, int]]


class LayerState(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot's image; below offset `filled` it is complete, for which `copied` bytes of data were written."""

    name: str
    parent: str
    created: str
    size: int
    filled: int = 0
    copied: int = 0


class RebuildState(msgspec.Struct, frozen=True, kw_only=True):
    """`rebuild.json`. The head is complete below offset `head`; it builds on snapshot `parent`, None: it is no good."""

    format: int = 1
    layers: tuple[LayerState, ...] = ()
    parent: str | None = None
    head: int = 0


def read_rebuild(directory: Path) -> RebuildState | None:
    """None when there is no such file; one that cannot be read promises nothing."""
    try:
        state = msgspec.json.decode((directory / REBUILD).read_bytes(), type=RebuildState)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError):
        return RebuildState()
    return state if state.format == 1 else RebuildState()


def write_rebuild(directory: Path, state: RebuildState) -> None:
    """Raises OSError."""
    replace_file(directory / REBUILD, msgspec.json.encode(state) + b"\n", mode=0o600)


def forget_rebuild(directory: Path) -> None:
    """Durable. Raises OSError."""
    try:
        (directory / REBUILD).unlink()
    except FileNotFoundError:
        return
    sync_directory(directory)


def plan_rebuild(
    wanted: Sequence[SnapshotInfo], found: Mapping[str, ImageMeta], head: VolumeMeta, known: RebuildState | None
) -> RebuildState:
    """What of a replica can stay when it becomes one with the snapshots `wanted`, as the state before any is filled.

    `found` are its snapshots by image, `known` its interrupted rebuild, None when it is complete. What is kept is
    listed: images that are the same snapshot on the same parent. Merging changes an image that is marked as removed and
    the one on top of it, so of those nothing is kept.
    """
    removed = {info.name for info in wanted if info.removed}
    before = {layer.name: layer for layer in known.layers} if known is not None else {}
    kept = []
    for info in wanted:
        meta = found.get(snapshot_image(info.name))
        if meta is None or meta.removed or {info.name, info.parent} & removed:
            continue
        below = found.get(meta.parent)
        if (snapshot_name(meta.parent), meta.created) != (info.parent, info.created) or (below and below.removed):
            continue
        layer = LayerState(name=info.name, parent=info.parent, created=info.created, size=info.size)
        if known is None:
            kept.append(msgspec.structs.replace(layer, filled=info.size, copied=info.allocated))
        elif info.name in before and before[info.name].size == info.size:
            kept.append(before[info.name])
    live = [info for info in wanted if info.live]
    top = found.get(head.parent)
    same_top = not live and not head.parent
    if live and top is not None:
        same_top = head.parent == snapshot_image(live[-1].name) and top.created == live[-1].created
    if not same_top or (known is not None and known.parent != snapshot_name(head.parent)):
        return RebuildState(layers=tuple(kept))
    return RebuildState(
        layers=tuple(kept), parent=snapshot_name(head.parent), head=head.size if known is None else known.head
    )


class RebuildStart:
    """`run` in any thread while nobody uses the replica, then `Store.finish_rebuild`, then `release`.

    A crash at any point leaves a replica that opens, and whose `rebuild.json` lists nothing that was dropped.
    """

    def __init__(
        self,
        directory: Path,
        old: VolumeMeta,
        wanted: Sequence[SnapshotInfo],
        kept: RebuildState,
        created: str,
        metadata: Callable[[Callable[[], None]], None],
    ) -> None:
        self.meta = old
        self.state = kept
        self.chain: tuple[str, ...] = ()
        self.snapshots: dict[str, ImageMeta] = {}
        self.files: list[int] = []
        self.replaced: list[int] = []
        self._directory = directory
        self._wanted = wanted
        self._created = created
        self._metadata = metadata

    def run(self) -> None:
        """Raises StoreError, OSError; it can be repeated then, and the replica must not be used otherwise."""
        self._metadata(self._steps)

    def release(self) -> None:
        """Closes what is replaced, which frees what was dropped."""
        for fd in self.replaced:
            os.close(fd)
        self.replaced = []

    def _steps(self) -> None:
        directory = self._directory
        for sums in directory.glob(f"*.img{SUFFIX}"):
            sums.unlink()
        sync_directory(directory)
        write_rebuild(directory, self.state)
        if self.state.parent is None:
            self._new_head()
        live = [info.name for info in self._wanted if info.live]
        top = live[-1] if live else ""
        self._make_images()
        parent = snapshot_image(top) if top else ""
        if self.meta.parent != parent:
            write_image_meta(
                directory, msgspec.structs.replace(read_image_meta(directory, self.meta.head), parent=parent)
            )
            self.meta = msgspec.structs.replace(self.meta, parent=parent)
            write_volume_meta(directory, self.meta)
        images = {self.meta.head, *(snapshot_image(info.name) for info in self._wanted)}
        for name in os.listdir(directory):
            image = name.removesuffix(".meta")
            if image not in images and (SNAPSHOT_IMAGE.fullmatch(image) or HEAD_IMAGE.fullmatch(image)):
                remove_image(directory, image)
        sync_directory(directory)
        kept = {layer.name: layer for layer in self.state.layers}
        layers = tuple(
            kept.get(info.name) or LayerState(name=info.name, parent=info.parent, created=info.created, size=info.size)
            for info in self._wanted
        )
        self.state = msgspec.structs.replace(self.state, layers=layers, parent=top)
        write_rebuild(directory, self.state)
        self._open()

    def _new_head(self) -> None:
        head = next_head(self.meta.head)
        _new_image(self._directory, head, self.meta.size)
        write_image_meta(self._directory, ImageMeta(name=head, created=self._created))
        self.meta = msgspec.structs.replace(self.meta, head=head, parent="")
        write_volume_meta(self._directory, self.meta)

    def _make_images(self) -> None:
        kept = {layer.name for layer in self.state.layers}
        for info in self._wanted:
            image = snapshot_image(info.name)
            if info.name not in kept:
                # by rename: a chain that builds on it must never miss it
                _new_image(self._directory, image, info.size)
            meta = ImageMeta(
                name=image,
                parent=snapshot_image(info.parent) if info.parent else "",
                removed=info.removed,
                user_created=info.user_created,
                created=info.created,
                labels=info.labels or None,
            )
            write_image_meta(self._directory, meta)

    def _open(self) -> None:
        for fd in self.files:  # of an attempt without room
            os.close(fd)
        self.files = []
        self.chain = read_chain(self._directory, self.meta.head)
        self.snapshots = read_snapshots(self._directory, self.chain[1:])
        for image in reversed(self.chain):
            mode = os.O_RDWR if image == self.meta.head else os.O_RDONLY
            self.files.append(os.open(self._directory / image, mode | os.O_CLOEXEC))


def _new_image(directory: Path, image: str, size: int) -> None:
    temporary = directory / f".{image}.tmp"
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, size)
        os.fsync(fd)
    finally:
        os.close(fd)
    os.replace(temporary, directory / image)
    # Longhorn's sum of the file, which is another one now
    (directory / f"{image}.checksum").unlink(missing_ok=True)
    sync_directory(directory)


def read_extents(fd: int, offset: int, length: int) -> tuple[list[tuple[int, int]], bytes, int]:
    """What a file holds in a range of whole blocks: extents relative to `offset`, their data, and the range's length.

    An empty range goes on up to the next data or the end of the file. From any thread. Raises OSError.
    """
    size = os.fstat(fd).st_size
    end = min(offset + length, size + -size % BLOCK)
    found: list[tuple[int, int]] = []
    data: list[bytes] = []
    for start, stop in extents(fd, offset, max(end, offset)):
        # whole blocks: that is the unit in which a layer hides another
        start, stop = start - start % BLOCK, stop + -stop % BLOCK
        if found and start <= offset + sum(found[-1]):
            start = offset + sum(found[-1])
            if stop > start:
                found[-1] = (found[-1][0], stop - offset - found[-1][0])
        elif stop > start:
            found.append((start - offset, stop - start))
        if stop > start:
            data.append(_pread_all(fd, start, stop - start))
    if not found:
        following = next(extents(fd, offset, min(size, offset + MAX_HOLE)), None)
        stop = following[0] - following[0] % BLOCK if following else min(size + -size % BLOCK, offset + MAX_HOLE)
        length = max(length, stop - offset)
    return found, b"".join(data), length


def _pread_all(fd: int, offset: int, length: int) -> bytes:
    data = os.pread(fd, length, offset)
    while len(data) < length:
        more = os.pread(fd, length - len(data), offset + len(data))
        if not more:  # the end of the file, within a block
            return data.ljust(length, b"\0")
        data += more
    return data


def write_extents(fd: int, offset: int, length: int, found: Extents, data: Buffer) -> None:
    """Make a range of a file exactly so: data where there are extents, holes elsewhere.

    Raises OSError, also where the file system has no holes; the range is undefined then.
    """
    view, at, done = memoryview(data), offset, 0
    for start, size in (*found, (length, 0)):
        for hole_start, hole_end in extents(fd, at, offset + start):
            if not punch_hole(fd, hole_start, hole_end - hole_start):
                raise OSError(errno.EOPNOTSUPP, "this file system cannot punch holes, which a rebuild needs")
        if size:
            pwrite_all(fd, view[done : done + size], offset + start)
        done += size
        at = offset + start + size
