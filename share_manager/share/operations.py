"""What an operator asks of a running share: growth, trim, another engine."""

from __future__ import annotations

import contextlib
import os
import re

import msgspec
import trio

from engine.operations import Resize, Resized
from share_manager.events import Reporter
from share_manager.paths import VolumePaths
from share_manager.share import filesystem
from share_manager.share.attachment import Attachment
from share_manager.share.commands import run
from share_manager.share.filesystem import Mounted
from share_manager.share.loop import grow_loop
from share_manager.share.luks import Unlocked
from share_manager.share.onvolume import on_volume
from share_manager.share.procfs import CAP_SYS_RESOURCE, holds_capability
from share_manager.share.records import FileRecords, Records
from share_manager.share.requests import EngineUpgraded, ShareResized, ShareTrimmed
from share_manager.units import format_size
from share_manager.volumes import refuse_to_shrink

_TRIM_TIMEOUT = 6 * 3600.0
_FSTRIM = re.compile(r"\((\d+) bytes\) trimmed")


async def resize(
    attachment: Attachment,
    mounted: Mounted | None,
    paths: VolumePaths,
    size: int,
    report: Reporter,
    unlocked: Unlocked | None = None,
    records: Records | None = None,
) -> ShareResized:
    """Replicas, record, block file, loop device, encryption, filesystem, in this order; each step again when it is
    asked again.

    Raises UsageError, EngineError, ShareManagerError.
    """
    refuse_to_shrink(attachment.record, size)
    done = await attachment.client.run(Resize(size=size), Resized)
    attachment.record = await trio.to_thread.run_sync((records or FileRecords(paths)).store.read)
    if attachment.device:
        await grow_loop(attachment.device, paths.block_file)
    else:
        await on_volume(os.stat, paths.block_file)
    if unlocked is not None:
        await unlocked.grow()
    told = "none"
    if mounted is not None:
        told = await _grow_filesystem(mounted)
    report.emit(
        "resized",
        f"volume {paths.volume} has {format_size(done.size)}",
        volume=paths.volume,
        size_bytes=done.size,
        filesystem=told,
    )
    return ShareResized(size=done.size, before=done.before, filesystem=told)


async def _grow_filesystem(mounted: Mounted) -> str:
    if mounted.kind == "ext4" and not holds_capability(CAP_SYS_RESOURCE):
        return "later"  # the kernel grows a mounted ext4 only for those; the next serve does it before it mounts
    return "grown" if await filesystem.grow(mounted.device, mounted.kind, mounted.root) else "full size already"


async def trim(mounted: Mounted, directories: tuple[str, ...]) -> ShareTrimmed:
    """fstrim; `directories` are those of the replicas. Raises CommandError, TimeoutProblem."""
    # what was deleted just now is free only when the journal has it
    await run("sync", "--file-system", str(mounted.root), timeout=filesystem.UNMOUNT_TIMEOUT)
    before = await trio.to_thread.run_sync(_allocated, directories)
    _, said = await run("fstrim", "--verbose", str(mounted.root), timeout=_TRIM_TIMEOUT)
    after = await trio.to_thread.run_sync(_allocated, directories)
    found = _FSTRIM.search(said)
    return ShareTrimmed(discarded=int(found[1]) if found else 0, freed=max(before - after, 0))


def _allocated(directories: tuple[str, ...]) -> int:
    total = 0
    for directory in directories:
        # those of other nodes are not here
        with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
            total += sum(entry.stat().st_blocks * 512 for entry in entries if entry.name.endswith(".img"))
    return total


def tell_upgraded(done: EngineUpgraded, report: Reporter) -> None:
    report.emit(
        "engine_upgraded",
        f"engine {done.pid} took over from {done.before}"
        + ("" if done.pause is None else f"; requests waited {done.pause * 1000:.0f} ms"),
        **msgspec.structs.asdict(done),
    )
