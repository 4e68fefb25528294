"""The filesystem of a volume: proven blank before it is made, checked, mounted, grown, laid out.

Layout (docs/on-disk-format.md): `data/` is what clients see, `.share-manager/` is ours. The latter is a small
filesystem of its own, kept in `.share-manager.img` and mounted over that directory, so that clients who fill `data/`
leave client records and counters their blocks and inodes.
"""

from __future__ import annotations

import contextlib
import ctypes
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
from share_manager.share.formatting import Kind, device_size, format_if_blank, sync_device
from share_manager.share.onvolume import on_volume
from share_manager.share.procfs import CAP_SYS_RESOURCE, holds_capability, mount_at

_FS_IOC_GETFLAGS, _FS_IOC_SETFLAGS, _FS_DIRSYNC_FL = 0x80086601, 0x40086602, 0x00010000
# sys/mount.h
_FLAGS = {"nosuid": 2, "nodev": 4, "dirsync": 128, "noatime": 1024}
_libc = ctypes.CDLL(None, use_errno=True)
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


def ext4_has_checksum_seed(superblock: bytes) -> bool:
    """metadata_csum_seed, 0x2000 of s_feature_incompat; true also without metadata_csum (0x400 of s_feature_ro_compat),
    which is what needs it (ext4.h)."""
    incompat, ro_compat = struct.unpack_from("<II", superblock, 0x60)
    return bool(incompat & 0x2000) or not ro_compat & 0x400


def ext4_bytes(superblock: bytes) -> int:
    (low,) = struct.unpack_from("<I", superblock, 0x4)
    (shift,) = struct.unpack_from("<I", superblock, 0x18)
    (high,) = struct.unpack_from("<I", superblock, 0x150)
    return int((high << 32 | low) << (10 + shift))


async def check(device: str, kind: Kind, target: Path) -> Checked:
    """Bring a filesystem that was not cleanly unmounted into order. Raises FilesystemError.

    ext4: the journal is replayed by the kernel, mounted at `target` for a moment; a full check runs only when the error
    flag is set. The kernel leaves the journal alone when it cannot write what is in it, as on a full disk. e2fsck -p
    goes on without it, and clears whatever only the journal knew of. xfs replays its log at mount.
    """
    if kind == "xfs":
        return Checked(needed=False)
    replay, error = ext4_flags(await on_volume(ext4_superblock, device))
    if not replay and not error:
        return Checked(needed=False)
    if replay:
        await mount(device, kind, target, mount_options(kind, dirsync=True))
        await unmount(target)
        again, error = ext4_flags(await on_volume(ext4_superblock, device))
        if again:
            raise FilesystemError(device, "its journal cannot be written back: is the disk of a replica full?")
        if not error:
            return Checked(needed=True)
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
        # who asks for a commit gets it: ext4 would wait as long as a commit takes, for others to join, whenever another
        # thread asked for the one before, and each of ganesha's requests may have a thread of its own
        options += ["errors=remount-ro", "noinit_itable", "max_batch_time=0"]
    else:
        # an earlier attachment that some other mount namespace still holds has the same UUID, and does no harm
        options.append("nouuid")
    return ",".join(options)


async def mount(device: str, kind: Kind, target: Path, options: str) -> None:
    """Raises FilesystemError."""
    await on_volume(partial(target.mkdir, mode=0o700, exist_ok=True))
    with contextlib.suppress(OSError):
        await on_volume(_mount, device, kind, target, options)
        return
    # it says better than the kernel what is wrong
    try:
        await run("mount", "-t", kind, "-o", options, device, str(target), timeout=3600)
    except CommandError as error:
        lines = [line.strip() for line in error.output.splitlines() if line.strip()]
        remedy = ""
        if kind == "xfs":
            remedy = "; if its log is damaged, attach the volume with `share-manager attach` and run xfs_repair"
        raise FilesystemError(device, f"it cannot be mounted: {lines[0] if lines else error}{remedy}") from error


def _mount(device: str, kind: Kind, target: Path, options: str) -> None:
    """Without the time that a program takes to start. Raises OSError."""
    flags, rest = 0, []
    for option in options.split(","):
        if option in _FLAGS:
            flags |= _FLAGS[option]
        else:
            rest.append(option)
    where = os.fsencode(device), os.fsencode(target), kind.encode()
    if _libc.mount(*where, flags, ",".join(rest).encode()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), device)


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
    before = await on_volume(os.statvfs, target)
    if kind == "ext4":
        if not await on_volume(is_smaller, device):
            return False
        await run("resize2fs", device, timeout=3600)
    else:
        await run("xfs_growfs", "-d", str(target), timeout=3600)
    return (await on_volume(os.statvfs, target)).f_blocks != before.f_blocks


async def renew_uuid(device: str, kind: Kind, fs_uuid: uuid.UUID, target: Path) -> None:
    """Give a filesystem that was checked another UUID, which file handles carry. It can be interrupted, and repeated.

    `target` is where it may be mounted for a moment. Raises FilesystemError, CommandError.
    """
    if kind == "ext4":
        if not ext4_has_checksum_seed(await on_volume(ext4_superblock, device)):
            # else every checksum of metadata would have to be written anew (Linux 4.4)
            await run("tune2fs", "-O", "metadata_csum_seed", device, timeout=600)
        await run("tune2fs", "-U", str(fs_uuid), device, timeout=3600)
    else:
        # the log, which a freeze leaves as after a crash, is replayed by the kernel only
        try:
            await mount(device, kind, target, "nouuid")
        finally:
            with trio.CancelScope(shield=True):
                await unmount(target)
        await run("xfs_admin", "-U", str(fs_uuid), device, timeout=600)
    await on_volume(sync_device, device)


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
        # /dev/mapper/NAME is dm-N to the kernel
        number = os.stat(device).st_rdev
        name = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve().name
        return int(Path(f"/sys/fs/ext4/{name}/errors_count").read_text())
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
    inherited: Path,
    target: Path,
    options: FilesystemOptions,
    report: Reporter,
    give_up: Callable[[str], None],
) -> AsyncIterator[Mounted]:
    """Format if blank, check, mount, grow, lay out. Raises ShareManagerError, OSError.

    `inherited` is a file that a clone has until its filesystem has a UUID of its own.
    """
    fs_uuid = filesystem_uuid(volume_uuid)
    uuids = inherited.read_text().split() if inherited.exists() else []
    remedy = f"look at it with `share-manager attach {volume}` and wipefs, or serve a new volume"
    kind, made = await format_if_blank(device, options.kind, fs_uuid, marker, remedy=remedy, inherited=uuids)
    if made:
        report.emit("formatted", f"formatted with {kind}", fs=kind, uuid=str(fs_uuid))
    else:
        checked = await check(device, kind, target)
        if checked.needed:
            how = "checked and repaired" if checked.repaired else "journal replayed"
            report.emit("checked", f"{kind} was not cleanly unmounted: {how}", fs=kind, repaired=checked.repaired)
    if uuids:
        if not made:
            await renew_uuid(device, kind, fs_uuid, target)
            report.emit("renewed", f"{kind} of a clone has a UUID of its own", fs=kind, uuid=str(fs_uuid))
        inherited.unlink()
        sync_directory(inherited.parent)
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
