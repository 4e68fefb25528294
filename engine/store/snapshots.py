"""The snapshots of a replica: their names, what is known of each, and what an interrupted change left behind.

A revert leaves the snapshots above the chosen one where they are, so snapshots form a tree. The chain of the head is
one path through it: these are the *live* ones.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from engine.errors import StoreError
from engine.store.layout import HEAD_IMAGE, SNAPSHOT_IMAGE, ImageMeta, read_image_meta, remove_image
from engine.store.sums import SUFFIX

# bytes of JSON; 254 snapshots are still told in one frame
MAX_LABELS = 2048

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_CREATED = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")


class SnapshotInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One snapshot. `parent` is the name of the snapshot below, or empty; sizes in bytes.

    `size` is that of the volume then, `allocated` what its own image occupies: the data that was written between its
    parent and it. `children` counts the images that build on it, the head included; `live` ones are below the head.
    `pinned`: it cannot be merged away before a clone, or this volume as one, is independent.
    """

    name: str
    parent: str
    created: str
    user_created: bool
    removed: bool
    live: bool
    children: int
    size: int
    allocated: int
    labels: dict[str, str]
    pinned: bool = False


def snapshot_image(name: str) -> str:
    return f"volume-snap-{name}.img"


def snapshot_name(image: str) -> str:
    """Empty for no image."""
    match = SNAPSHOT_IMAGE.fullmatch(image)
    return match[1] if match else ""


def next_head(head: str) -> str:
    match = HEAD_IMAGE.fullmatch(head)
    assert match is not None
    return f"volume-head-{int(match[1]) + 1:03d}.img"


def now() -> str:
    """RFC 3339, UTC."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def fault(name: str, labels: dict[str, str]) -> str:
    """What a new snapshot cannot have of this; empty when it can."""
    if not _NAME.fullmatch(name) or name == "volume-head":  # Longhorn's name for the head
        return (
            f"{name!r} cannot be the name of a snapshot: up to 128 of letters, digits, '.', '_' and '-', "
            "a letter or digit first"
        )
    if len(msgspec.json.encode(labels)) > MAX_LABELS:
        return f"the labels of snapshot {name!r} need more than {MAX_LABELS} bytes"
    return ""


def check_new(directory: Path, name: str, created: str, labels: dict[str, str]) -> None:
    """Raises StoreError for what a new snapshot cannot have."""
    if reason := fault(name, labels):
        raise StoreError(directory, reason)
    if not _CREATED.fullmatch(created):
        raise StoreError(directory, f"{created!r} is not a time in UTC as RFC 3339 writes it")


def clean_leftovers(directory: Path, chain: tuple[str, ...]) -> None:
    """Delete what an interrupted change of the chain left. The directory is locked, the chain whole. Raises OSError.

    These are heads that are not the head, sums without an image, metadata of a removed snapshot whose image is gone,
    and a snapshot that still is the head: its second name was made, and `volume.meta` was not yet written.
    """
    names = set(os.listdir(directory))
    head = chain[0]
    current = os.stat(directory / head)
    for name in names:
        image = name.removesuffix(".meta")
        if HEAD_IMAGE.fullmatch(image):
            if image != head:
                remove_image(directory, image)
        elif name.endswith(SUFFIX):
            if name.removesuffix(SUFFIX) not in names:
                (directory / name).unlink(missing_ok=True)
        elif SNAPSHOT_IMAGE.fullmatch(image) and image not in chain:
            if image not in names:
                with contextlib.suppress(StoreError):
                    if read_image_meta(directory, image).removed:
                        (directory / name).unlink()
            elif name == image and os.path.samestat(os.stat(directory / image), current):
                # the metadata first: alone it would look like a snapshot
                (directory / f"{image}.meta").unlink(missing_ok=True)
                remove_image(directory, image)


def read_snapshots(directory: Path, chain: Iterable[str]) -> dict[str, ImageMeta]:
    """Metadata of all snapshots by image, parents first. `chain` names the images below the head, the newest first.

    Raises StoreError and OSError for one of the chain; others that cannot be read are left out.
    """
    found = {image: read_image_meta(directory, image) for image in reversed(list(chain))}
    others: dict[str, ImageMeta] = {}
    for image in sorted(name for name in os.listdir(directory) if SNAPSHOT_IMAGE.fullmatch(name)):
        if image not in found:
            with contextlib.suppress(StoreError):
                others[image] = read_image_meta(directory, image)
    while ready := [image for image, meta in others.items() if not meta.parent or meta.parent in found]:
        for image in ready:
            found[image] = others.pop(image)
    return found


def describe(
    directory: Path, snapshots: dict[str, ImageMeta], chain: tuple[str, ...], pinned: Callable[[str], bool]
) -> list[SnapshotInfo]:
    """The live ones first, the oldest first; then the others, parents first. Raises OSError."""
    live = [image for image in reversed(chain) if image in snapshots]
    infos = []
    for image in (*live, *(image for image in snapshots if image not in chain)):
        meta, found = snapshots[image], os.stat(directory / image)
        children = sum(other.parent == image for other in snapshots.values()) + (chain[1:2] == (image,))
        infos.append(
            SnapshotInfo(
                name=snapshot_name(image),
                parent=snapshot_name(meta.parent),
                created=meta.created,
                user_created=meta.user_created,
                removed=meta.removed,
                live=image in chain,
                children=children,
                size=found.st_size,
                allocated=found.st_blocks * 512,
                labels=meta.labels or {},
                pinned=pinned(image),
            )
        )
    return infos
