"""A filesystem is made only on a device that is proven blank."""

from __future__ import annotations

import fcntl
import os
import struct
import uuid
from collections.abc import Collection
from pathlib import Path
from typing import Literal

from engine.durable import replace_file, sync_directory
from share_manager.errors import CommandError, FilesystemError, FilesystemKindError, ForeignContentError
from share_manager.share.commands import run
from share_manager.share.onvolume import on_volume

Kind = Literal["ext4", "xfs"]
DEFAULT_KIND: Kind = "ext4"
PROBED = 4 << 20
"""Bytes at each end of a device that must read as zeros before it is formatted: every superblock, partition table and
metadata header that libblkid knows lies there."""
NOISE = b"noise\n"
"""What a new encrypted device reads as before it is first written to."""
_BLKGETSIZE64 = 0x80081272


def device_size(device: str) -> int:
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return int(struct.unpack("Q", fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8)))[0])
    finally:
        os.close(fd)


def first_nonzero(device: str, size: int) -> int | None:
    """Offset of the first byte that is not zero in the first or last `PROBED` bytes."""
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        step = 1 << 20
        starts: list[int] = sorted({*range(0, min(PROBED, size), step), *range(max(0, size - PROBED), size, step)})
        zeros = bytes(step)
        for start in starts:
            chunk = os.pread(fd, min(step, size - start), start)
            if chunk != zeros[: len(chunk)]:
                return start + len(chunk) - len(chunk.lstrip(b"\0"))
    finally:
        os.close(fd)
    return None


async def probe(device: str) -> dict[str, str]:
    """What libblkid sees on the device itself, never a cache: TYPE, UUID and so on; empty when nothing.

    Raises FilesystemError when it sees several things that contradict each other.
    """
    status, output = await run("blkid", "--probe", "--output", "export", device, ok=(0, 2, 8))
    if status == 8:
        raise FilesystemError(
            device, "it carries more than one signature; look with `wipefs --no-act` and remove the wrong one"
        )
    if status == 2:
        return {}
    return dict(line.split("=", 1) for line in output.splitlines() if "=" in line)


async def format_if_blank(
    device: str,
    kind: Kind | None,
    fs_uuid: uuid.UUID,
    marker: Path,
    *,
    remedy: str,
    inherited: Collection[str] = (),
) -> tuple[Kind, bool]:
    """Make the filesystem when the device is proven blank. Returns its kind and whether it was made now.

    One with another UUID is somebody else's, unless that is among `inherited`.
    `marker` is a file that exists from before mkfs writes its first byte until its last is on stable storage: only
    while it exists may remains on the device be overwritten, for they are ours. It says `NOISE` where nothing was ever
    written. Raises ForeignContentError, FilesystemError, CommandError.
    """
    unfinished = marker.exists()
    noise = unfinished and marker.read_bytes() == NOISE
    found = {} if unfinished else await probe(device)
    if found:
        return _check_found(device, found, kind, {str(fs_uuid), *inherited}, remedy), False
    if not unfinished:
        size = device_size(device)
        offset = await on_volume(first_nonzero, device, size)
        if offset is not None:
            raise ForeignContentError(device, f"data without a known signature (at byte {offset})", remedy)
    wanted: Kind = kind or DEFAULT_KIND
    replace_file(marker, f"{wanted}\n".encode())
    try:
        await make_filesystem(device, wanted, fs_uuid, again=unfinished, noise=noise)
    except CommandError:
        if not unfinished and not await probe(device):
            size = device_size(device)
            if await on_volume(first_nonzero, device, size) is None:
                marker.unlink()
        raise
    await on_volume(sync_device, device)
    marker.unlink()
    sync_directory(marker.parent)
    return wanted, True


def _check_found(device: str, found: dict[str, str], kind: Kind | None, ours: Collection[str], remedy: str) -> Kind:
    signature = found.get("TYPE") or found.get("PTTYPE")
    if signature not in ("ext4", "xfs") or "PTTYPE" in found:
        what = f"a {signature} partition table" if "PTTYPE" in found else f"a {signature or 'foreign'} signature"
        raise ForeignContentError(device, what, remedy)
    if found.get("UUID", "").lower() not in ours:
        raise ForeignContentError(
            device, f"a {signature} filesystem that is not this volume's own (UUID {found.get('UUID')})", remedy
        )
    if kind is not None and kind != signature:
        raise FilesystemKindError(signature, kind)
    return "xfs" if signature == "xfs" else "ext4"


def sync_device(device: str) -> None:
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


async def make_filesystem(
    device: str, kind: Kind, fs_uuid: uuid.UUID, *, again: bool = False, noise: bool = False
) -> None:
    """mkfs for a sparse device full of zeros: nothing is written that zeros say as well.

    Inode tables stay unwritten (ext4 knows them as such by its checksummed group descriptors; `noinit_itable` at
    mount keeps it from writing them later), so a new 10 GiB volume takes 5 MB per replica instead of 230.
    """
    if kind == "ext4":
        # after an interrupted mkfs the journal's blocks may not be zeros; in noise nothing can be taken for a journal's
        zero = again and not noise
        lazy = "lazy_itable_init=1,lazy_journal_init=0" if zero else "lazy_itable_init=1,lazy_journal_init=1"
        argv = ["mkfs.ext4", "-q", "-F", "-b", "4096", "-m", "0", "-O", "64bit,metadata_csum"]
        argv += ["-e", "remount-ro", "-E", f"nodiscard,{lazy}", "-U", str(fs_uuid), device]
    else:
        argv = ["mkfs.xfs", "-q", "-K", *(["-f"] if again else []), "-m", f"crc=1,uuid={fs_uuid}", device]
    await run(*argv, timeout=600)
