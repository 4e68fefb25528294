"""The filesystem of a volume: proven blank before it is made, checked, mounted, grown, laid out.

Layout (docs/on-disk-format.md): `data/` is what clients see, `.share-manager/` is ours. The latter is a small
filesystem of its own, kept in `.share-manager.img` and mounted over that directory, so that clients who fill `data/`
leave client records and counters their blocks and inodes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import uuid
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import msgspec
import trio

from engine.durable import sync_directory
from share_manager.errors import CommandError, FilesystemError, TimeoutProblem
from share_manager.events import Reporter
from share_manager.share.commands import run
from share_manager.share.formatting import Kind, device_size, format_if_blank
from share_manager.share.onvolume import on_volume
from share_manager.share.procfs import CAP_SYS_RESOURCE, holds_capability, mount_at

_FS_IOC_GETFLAGS, _FS_IOC_SETFLAGS, _FS_DIRSYNC_FL = 0x80086601, 0x40086602, 0x00010000
DATA = "data"
PRIVATE = ".share-manager"
PRIVATE_IMAGE = ".share-manager.img"
UNMOUNT_TIMEOUT = 60.0
BUSY_TIMEOUT = 5.0


class FilesystemOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`kind` and the root's owner and mode apply when the filesystem is made; later only what is not None."""

    kind: Kind | None = None
    dirsync: bool = True
    root_owner: tuple[int, int] | None = None
    root_mode: int | None = None


DEFAULT_OWNER = (0, 0)
DEFAULT_MODE = 0o777


def filesystem_uuid(volume_uuid: str) -> uuid.UUID:
    """The filesystem's own UUID, which NFS file handles carry: derived, so that it is known before it is made."""
    return uuid.uuid5(uuid.UUID(volume_uuid), "share-manager filesystem")


class Checked(msgspec.Struct, frozen=True):
    """`needed`: it was not cleanly unmounted. `repaired`: e2fsck changed something beyond replaying the journal."""

    needed: bool
    repaired: bool = False


def ext4_superblock(device: str) -> bytes:
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(fd, 1024, 1024)
    finally:
        os.close(fd)


def ext4_flags(superblock: bytes) -> tuple[bool, bool]:
    """(journal needs replay, error flag set): s_feature_incompat at 0x60 bit 2, s_state at 0x3a bit 1 (ext4.h)."""
    (state,) = struct.unpack_from("<H", superblock, 0x3A)
    (incompat,) = struct.unpack_from("<I", superblock, 0x60)
    return bool(incompat & 0x4), bool(state & 0x2)


def ext4_bytes(superblock: bytes) -> int:
    (low,) = struct.unpack_from("<I", superblock, 0x4)
    (shift,) = struct.unpack_from("<I", superblock, 0x18)
    (high,) = struct.unpack_from("<I", superblock, 0x150)
    return int((high << 32 | low) << (10 + shift))


async def check(device: str, kind: Kind) -> Checked:
    """Bring a filesystem that was not cleanly unmounted into order. Raises FilesystemError.

    ext4: the journal is replayed; a full check runs only when the error flag is set, as e2fsck itself decides.
    xfs replays its log at mount.
    """
    if kind == "xfs":
        return Checked(needed=False)
    replay, error = ext4_flags(await on_volume(ext4_superblock, device))
    if not replay and not error:
        return Checked(needed=False)
    # 0 clean, 1 corrected, 2 corrected and "reboot" (for a mounted root): e2fsck(8)
    status, output = await run("e2fsck", "-p", device, ok=range(256), timeout=6 * 3600)
    if status > 2:
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        raise FilesystemError(
            device,
            "e2fsck does not repair it by itself: attach the volume with `share-manager attach` and run e2fsck on its "
            f"block file by hand ({'; '.join(lines[-2:])})",
        )
    return Checked(needed=True, repaired=error or bool(status))


def mount_options(kind: Kind, dirsync: bool) -> str:
    """`nodev,nosuid` hold on this machine only: clients see mode bits and device numbers as they are and decide for
    themselves."""
    options = ["noatime", "nodev", "nosuid"]
    if dirsync:
        options.append("dirsync")
    if kind == "ext4":
        options += ["errors=remount-ro", "noinit_itable"]
    else:
        # an earlier attachment that some other mount namespace still holds has the same UUID, and does no harm
        options.append("nouuid")
    return ",".join(options)


async def mount(device: str, kind: Kind, target: Path, options: str) -> None:
    """Raises FilesystemError."""
    await on_volume(partial(target.mkdir, mode=0o700, exist_ok=True))
    try:
        await run("mount", "-t", kind, "-o", options, device, str(target), timeout=3600)
    except CommandError as error:
        lines = [line.strip() for line in error.output.splitlines() if line.strip()]
        remedy = ""
        if kind == "xfs":
            remedy = "; if its log is damaged, attach the volume with `share-manager attach` and run xfs_repair"
        raise FilesystemError(device, f"it cannot be mounted: {lines[0] if lines else error}{remedy}") from error


async def unmount(target: Path, *, busy_for: float = BUSY_TIMEOUT, timeout: float = UNMOUNT_TIMEOUT) -> None:
    """Does nothing when nothing is mounted. Raises CommandError (in use for `busy_for` seconds), TimeoutProblem (it
    hangs)."""
    deadline = trio.current_time() + busy_for
    while mount_at(target) is not None:
        try:
            await run("umount", "--no-canonicalize", str(target), timeout=timeout)
        except CommandError as error:
            if "busy" not in error.output or trio.current_time() > deadline:
                raise
            await trio.sleep(0.1)


def is_smaller(device: str) -> bool:
    """Whether an ext4 leaves room on its device. A tail that is too short for a block group stays unused, so equality
    cannot be asked for."""
    return device_size(device) - ext4_bytes(ext4_superblock(device)) >= 1 << 20


async def grow_unmounted(device: str) -> bool:
    """Grow an ext4 where growing it mounted is not allowed (that needs CAP_SYS_RESOURCE, this needs a full check).

    Whether it has grown. Raises CommandError.
    """
    if not await on_volume(is_smaller, device) or holds_capability(CAP_SYS_RESOURCE):
        return False
    await run("e2fsck", "-f", "-p", device, ok=(0, 1, 2), timeout=6 * 3600)
    await run("resize2fs", device, timeout=3600)
    return True


async def grow(device: str, kind: Kind, target: Path) -> bool:
    """Grow the mounted filesystem to its device; whether it was smaller. Raises CommandError."""
    before = os.statvfs(target)
    if kind == "ext4":
        if not await on_volume(is_smaller, device):
            return False
        await run("resize2fs", device, timeout=3600)
    else:
        await run("xfs_growfs", "-d", str(target), timeout=3600)
    return os.statvfs(target).f_blocks != before.f_blocks


def lay_out(root: Path, options: FilesystemOptions) -> None:
    """`data/` appears with its owner and mode at once; later they change only on request. Raises OSError."""
    data = root / DATA
    if not data.exists():
        building = root / f".{DATA}.new"
        building.mkdir(exist_ok=True)
        os.chown(building, *(options.root_owner or DEFAULT_OWNER))
        os.chmod(building, DEFAULT_MODE if options.root_mode is None else options.root_mode)
        building.rename(data)
        sync_directory(root)
    else:
        if options.root_owner is not None:
            os.chown(data, *options.root_owner)
        if options.root_mode is not None:
            os.chmod(data, options.root_mode)
    private = root / PRIVATE
    private.mkdir(mode=0o700, exist_ok=True)
    sync_directory(root)


def set_dirsync(directory: Path) -> None:
    """The D attribute (ext4): changes of names in it are on disk when the call returns."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        (flags,) = struct.unpack("l", fcntl.ioctl(fd, _FS_IOC_GETFLAGS, bytes(8)))
        fcntl.ioctl(fd, _FS_IOC_SETFLAGS, struct.pack("l", flags | _FS_DIRSYNC_FL))
    finally:
        os.close(fd)


def health(target: Path, device: str, errors_at_mount: int) -> str | None:
    """Why the mounted filesystem can no longer be trusted, None while it can."""
    found = mount_at(target)
    if found is None:
        return "the filesystem is not mounted any more"
    # "emergency_ro" is what errors=remount-ro shows from Linux 6.15 on
    for option in ("ro", "emergency_ro", "shutdown"):
        if option in found.options:
            return f"the filesystem went {option} after an error"
    if error_count(device) > errors_at_mount:
        return "the kernel recorded a filesystem error"
    try:
        # a shut down xfs answers every stat with EIO; the root inode is always cached, so this reads nothing
        os.stat(target)
    except OSError as error:
        return f"the filesystem answers {error.strerror}"
    return None


def error_count(device: str) -> int:
    try:
        return int(Path(f"/sys/fs/ext4/{Path(device).name}/errors_count").read_text())
    except (OSError, ValueError):
        return 0


async def leave(target: Path, report: Reporter, give_up: Callable[[str], None]) -> None:
    """Unmount, whatever it takes: first as asked, then with hanging requests failed, at last lazily."""
    try:
        if mount_at(target) is not None:
            # another mount namespace may keep a copy of the mount, and then unmounting ours writes nothing
            await run("sync", "--file-system", str(target), ok=(0, 1), timeout=UNMOUNT_TIMEOUT)
        await unmount(target)
        return
    except TimeoutProblem as error:
        give_up(str(error))
    except CommandError as error:
        report.warn("unmount_failed", f"{target} is in use: {error}", mountpoint=str(target))
    try:
        await unmount(target, busy_for=1.0, timeout=5.0)
    except (CommandError, TimeoutProblem):
        with contextlib.suppress(CommandError, TimeoutProblem):
            await run("umount", "--no-canonicalize", "--lazy", str(target), timeout=10)
            report.warn("unmounted_lazily", f"{target} goes away when its last user does", mountpoint=str(target))


class Mounted:
    """The volume's filesystem while it is mounted."""

    def __init__(self, root: Path, device: str, kind: Kind, fs_uuid: uuid.UUID) -> None:
        self.root = root
        self.device = device
        self.kind = kind
        self.uuid = fs_uuid
        self._errors = error_count(device)

    @property
    def data(self) -> Path:
        return self.root / DATA

    def fault(self) -> str | None:
        return health(self.root, self.device, self._errors)


@contextlib.asynccontextmanager
async def mounted(
    device: str,
    *,
    volume: str,
    volume_uuid: str,
    marker: Path,
    target: Path,
    options: FilesystemOptions,
    report: Reporter,
    give_up: Callable[[str], None],
) -> AsyncIterator[Mounted]:
    """Format if blank, check, mount, grow, lay out. Raises ShareManagerError, OSError."""
    fs_uuid = filesystem_uuid(volume_uuid)
    remedy = f"look at it with `share-manager attach {volume}` and wipefs, or serve a new volume"
    kind, made = await format_if_blank(device, options.kind, fs_uuid, marker, remedy=remedy)
    if made:
        report.emit("formatted", f"formatted with {kind}", fs=kind, uuid=str(fs_uuid))
    else:
        checked = await check(device, kind)
        if checked.needed:
            how = "checked and repaired" if checked.repaired else "journal replayed"
            report.emit("checked", f"{kind} was not cleanly unmounted: {how}", fs=kind, repaired=checked.repaired)
    grown = kind == "ext4" and not made and await grow_unmounted(device)
    try:
        await mount(device, kind, target, mount_options(kind, options.dirsync))
        report.emit("mounted", f"mounted at {target}", mountpoint=str(target), fs=kind)
        if grown or (not made and await grow(device, kind, target)):
            report.emit("grown", f"{kind} has grown to the volume's size", fs=kind, size_bytes=device_size(device))
        await on_volume(lay_out, target, options)
        yield Mounted(target, device, kind, fs_uuid)
    finally:
        with trio.CancelScope(shield=True):
            await leave(target, report, give_up)
