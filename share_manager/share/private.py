"""`.share-manager/`: our own room on the volume, which clients cannot use up.

It is a small ext4 in a file of the volume's filesystem, written out in full when it is made. Clients who fill `data/`
down to the last block and inode of the outer filesystem leave it its own.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import trio

from engine.durable import replace_file, sync_directory
from ganesha import drop_all, make_durable
from share_manager.errors import CommandError, FilesystemError, TimeoutProblem
from share_manager.events import Reporter
from share_manager.share import filesystem
from share_manager.share.commands import run
from share_manager.share.loop import attach_loop, detach_loop
from share_manager.share.onvolume import on_volume
from share_manager.share.supervise import next_ganesha_epoch

SMALL, LARGE = 16 << 20, 32 << 20
_LARGE_FROM = 1 << 30
INODES = {SMALL: 2048, LARGE: 6144}
RECOVERY = "recovery"
EPOCH = "ganesha-epoch.json"


class GaneshaEpoch(msgspec.Struct, frozen=True):
    last: int


def image_size(volume_size: int) -> int:
    """A client's record takes one inode and one block: room for about 2000 or 6000 clients."""
    return LARGE if volume_size >= _LARGE_FROM else SMALL


def create_image(image: Path, size: int) -> Path:
    """The file, all of it written, under a name that says it is unfinished. Raises OSError."""
    building = image.with_name(f"{image.name}.new")
    fd = os.open(building, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        zeros = bytes(1 << 20)
        for _ in range(size >> 20):
            os.write(fd, zeros)
        os.fsync(fd)
    finally:
        os.close(fd)
    return building


async def ensure_image(root: Path, volume_size: int) -> Path:
    """Make the image when it is missing, wholly or not at all. Raises OSError, CommandError."""
    image = root / filesystem.PRIVATE_IMAGE
    if not await on_volume(image.exists):
        size = image_size(volume_size)
        building = await on_volume(create_image, image, size)
        argv = ["mkfs.ext4", "-q", "-F", "-b", "4096", "-m", "0", "-J", "size=4", "-N", str(INODES[size])]
        await run(*argv, "-e", "remount-ro", "-E", "nodiscard,lazy_itable_init=0", str(building))
        await on_volume(_finish, building, image)
    return image


def _finish(building: Path, image: Path) -> None:
    fd = os.open(building, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    building.rename(image)
    sync_directory(image.parent)


class PrivateRoom:
    """The mounted directory."""

    def __init__(self, directory: Path, device: str) -> None:
        self.directory = directory
        self.device = device
        self._errors = filesystem.error_count(device)

    @property
    def recovery_root(self) -> Path:
        return self.directory / RECOVERY

    def fault(self) -> str | None:
        return filesystem.health(self.directory, self.device, self._errors)

    def take_ganesha_epoch(self) -> int:
        """The number for the next start, durably taken before it is used. Blocks on the volume. Raises OSError."""
        path = self.directory / EPOCH
        last = 0
        with contextlib.suppress(FileNotFoundError, msgspec.DecodeError, msgspec.ValidationError):
            last = msgspec.json.decode(path.read_bytes(), type=GaneshaEpoch).last
        number = next_ganesha_epoch(last, time.time())
        replace_file(path, msgspec.json.encode(GaneshaEpoch(number)), mode=0o600)
        return number


def _prepare(room: PrivateRoom) -> None:
    room.directory.chmod(0o700)
    filesystem.set_dirsync(room.directory)
    make_durable(room.recovery_root)


@contextlib.asynccontextmanager
async def private_room(
    root: Path,
    volume_size: int,
    report: Reporter,
    drop_recovery: Path,
    record_device: Callable[[str], None],
    give_up: Callable[[str], None],
) -> AsyncIterator[PrivateRoom]:
    """Mount it. While the file `drop_recovery` exists the clients' records are those of another past (a salvage, a
    revert): they are dropped, and then the file. `give_up` is called when leaving hangs: it must fail every request
    that hangs.

    Raises FilesystemError, CommandError, OSError.
    """
    target = root / filesystem.PRIVATE
    image = await ensure_image(root, volume_size)
    device = ""
    try:
        device = await attach_loop(image, record_device)
        await _check(device, target, report)
        await filesystem.mount(device, "ext4", target, filesystem.mount_options("ext4", dirsync=True))
        room = PrivateRoom(target, device)
        if drop_recovery.exists():
            await on_volume(drop_all, room.recovery_root)
            await on_volume(make_durable, room.recovery_root)
            drop_recovery.unlink()
            sync_directory(drop_recovery.parent)
            report.emit("recovery_dropped", "clients' locks belong to what the volume was before, and are forgotten")
        await on_volume(_prepare, room)
        yield room
    finally:
        with trio.CancelScope(shield=True):
            await filesystem.leave(target, report, give_up)
            if device:
                try:
                    await detach_loop(device, below=root)
                except (TimeoutProblem, CommandError) as error:
                    give_up(str(error))
                    report.warn("loop_busy", f"{device} stays attached until its last user is gone: {error}")


async def _check(device: str, target: Path, report: Reporter) -> None:
    """It holds only what clients can live without, in the worst case: what e2fsck cannot mend by itself is mended by
    force."""
    try:
        await filesystem.check(device, "ext4", target)
    except FilesystemError:
        status, _ = await run("e2fsck", "-f", "-y", device, ok=range(256), timeout=600)
        if status > 2:
            raise
        report.warn("private_repaired", "the private directory was damaged and repaired; some locks may be lost")
