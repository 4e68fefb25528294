"""A snapshot as files: the engine's FUSE directory of images, and the filesystem of one of them, mounted read-only.

All of it hangs below a directory of its own in the volume's runtime directory, which says whose it is: so the share
clears it when it ends, and the next command what a killed one left.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import trio

from engine.client import EngineClient, EngineOperationError
from engine.durable import replace_file
from engine.errors import NoSuchSnapshotError
from engine.launch import BrowseConfig, browse_argv
from engine.operations import SnapshotList, SnapshotsListed
from share_manager.errors import (
    CommandError,
    EncryptedSnapshotError,
    FilesystemError,
    PathNotFoundError,
    TimeoutProblem,
)
from share_manager.events import Reporter
from share_manager.paths import VolumePaths
from share_manager.share.background import background
from share_manager.share.child import Child, start_child
from share_manager.share.commands import run
from share_manager.share.filesystem import DATA, ext4_flags, ext4_superblock
from share_manager.share.formatting import probe
from share_manager.share.leftovers import gone, send
from share_manager.share.loop import attach_loop, detach_loop
from share_manager.share.onvolume import on_volume
from share_manager.share.procfs import ProcessId, identify, is_alive, loops_below, mount_at, mounts_of, processes_naming

START_TIMEOUT = 30.0
STOP_TIMEOUT = 10.0
UNMOUNT_TIMEOUT = 15.0
_ALL = "+all"
_OWNER = "owner.json"
# what is not there to be run, and no journal that would have to be replayed
_OPTIONS = {"ext4": "ro,noload,nodev,nosuid,noexec", "xfs": "ro,norecovery,nouuid,nodev,nosuid,noexec"}


class Owner(msgspec.Struct, frozen=True, kw_only=True):
    """`owner.json`: who looks at what, and where."""

    process: ProcessId
    mountpoint: str


class Browsed(msgspec.Struct, frozen=True, kw_only=True):
    """What is mounted. `ended` is set when it is gone before its time."""

    root: Path
    ended: trio.Event

    @property
    def data(self) -> Path:
        """What clients saw."""
        return self.root / DATA if (self.root / DATA).is_dir() else self.root


Show = Callable[[EngineClient], contextlib.AbstractAsyncContextManager[Browsed]]


@contextlib.asynccontextmanager
async def images(paths: VolumePaths, client: EngineClient, target: Path, report: Reporter) -> AsyncIterator[Browsed]:
    """All snapshots as files `NAME.img` at `target`, an empty directory. Raises ShareManagerError, EngineError."""
    async with _place(paths, _ALL, target) as place, _served(paths, client, place, target, "") as ended:
        yield Browsed(root=target, ended=ended)


@contextlib.asynccontextmanager
async def filesystem_of(
    paths: VolumePaths, client: EngineClient, snapshot: str, target: Path | None, report: Reporter
) -> AsyncIterator[Browsed]:
    """The filesystem of a snapshot, read-only, at `target` or below the runtime directory.

    Raises ShareManagerError, EngineError, OSError.
    """
    found = await client.run(SnapshotList(), SnapshotsListed)
    if not any(entry.name == snapshot and not entry.removed for entry in found.snapshots):
        error = NoSuchSnapshotError(found.volume, snapshot)
        raise EngineOperationError(type(error).__name__, str(error))
    async with _place(paths, snapshot, target) as place:
        files, root = place / "files", target or place / "mnt"
        files.mkdir(mode=0o700)
        async with _served(paths, client, place, files, snapshot) as ended:
            device = await attach_loop(files / f"{snapshot}.img", read_only=True)
            try:
                await _mount(device, root, report)
                yield Browsed(root=root, ended=ended)
            finally:
                with trio.CancelScope(shield=True):
                    await unmount(root, report)
                    with contextlib.suppress(TimeoutProblem, CommandError):
                        await detach_loop(device)


@contextlib.asynccontextmanager
async def _place(paths: VolumePaths, what: str, target: Path | None) -> AsyncIterator[Path]:
    if target is not None and (not target.is_dir() or any(target.iterdir())):
        raise PathNotFoundError(str(target), "a mountpoint is an empty directory: make one")
    await clear_stale(paths)
    place = paths.browsing / f"{what}.{os.getpid()}"
    place.mkdir(mode=0o700, parents=True)
    try:
        me = identify(os.getpid())
        assert me is not None
        owner = Owner(process=me, mountpoint=str(target or place / "mnt"))
        replace_file(place / _OWNER, msgspec.json.encode(owner), mode=0o600)
        yield place
    finally:
        with trio.CancelScope(shield=True):
            await clear_place(place)


@contextlib.asynccontextmanager
async def _served(
    paths: VolumePaths, client: EngineClient, place: Path, files: Path, only: str
) -> AsyncIterator[trio.Event]:
    config = BrowseConfig(control=str(client.control), mountpoint=str(files), source=str(place / "fuse"), only=only)
    argv = browse_argv(config, place / "browse.json")
    child = await start_child("the server of snapshots", argv, paths.log / "browse.log")
    ended = trio.Event()

    async def follow_exit() -> None:
        await child.wait()
        ended.set()

    async with background() as tasks:
        tasks.start_soon(child.follow_output)
        tasks.start_soon(follow_exit)
        try:
            await _ready(child)
            yield ended
        finally:
            with trio.CancelScope(shield=True):
                with contextlib.suppress(CommandError, TimeoutProblem):
                    await _umount(files)
                await child.stop(STOP_TIMEOUT)
                await child.aclose()


async def _ready(child: Child) -> None:
    """Raises ProcessDiedError, TimeoutProblem."""
    with trio.move_on_after(START_TIMEOUT):
        await child.spoke.wait()
        if child.said_event("ready") is None:
            await child.wait()
            raise child.died()
        return
    raise TimeoutProblem("mounting the snapshots", START_TIMEOUT)


async def _mount(device: str, root: Path, report: Reporter) -> None:
    found = await probe(device)
    kind = found.get("TYPE", "")
    if kind == "crypto_LUKS":
        raise EncryptedSnapshotError
    if kind not in _OPTIONS:
        raise FilesystemError(device, f"the snapshot holds {f'a {kind}' if kind else 'nothing'} that can be mounted")
    if kind == "ext4" and ext4_flags(await on_volume(ext4_superblock, device))[0]:
        report.warn(
            "not_at_rest",
            "the volume was not at rest when this snapshot was taken: what was written in the seconds before may be "
            "missing or damaged; a clone of it replays the journal",
        )
    root.mkdir(mode=0o700, exist_ok=True)
    try:
        await run("mount", "-t", kind, "-o", _OPTIONS[kind], device, str(root), timeout=300)
    except CommandError as error:
        raise FilesystemError(device, f"the snapshot cannot be mounted: {error.output.strip()}") from error


async def _umount(target: Path, *options: str) -> None:
    """Raises CommandError, TimeoutProblem."""
    while mount_at(target) is not None:
        await run("umount", "--no-canonicalize", *options, str(target), timeout=UNMOUNT_TIMEOUT)


async def unmount(target: Path, report: Reporter) -> None:
    """Whatever it takes: somebody may still be in there."""
    try:
        await _umount(target)
    except (CommandError, TimeoutProblem) as error:
        report.warn("unmounted_lazily", f"{target} is in use and goes away with its last user: {error}")
        with contextlib.suppress(CommandError, TimeoutProblem):
            await _umount(target, "--lazy")


async def clear_place(place: Path) -> None:
    """Remove all that hangs below the directory, and the directory."""
    loops = loops_below(place)
    for mount in reversed(mounts_of(place, loops)):
        if mount.source in loops:
            await _clear_mount(mount.target)
    for device in loops:
        with contextlib.suppress(TimeoutProblem, CommandError):
            await detach_loop(device)
    served = [found for pid in processes_naming(place) if (found := identify(pid)) is not None]
    for mount in reversed(mounts_of(place, [])):
        await _clear_mount(mount.target)
    for process in served:
        send(process, signal.SIGTERM)
    if not await gone(tuple(served), STOP_TIMEOUT):
        for process in served:
            send(process, signal.SIGKILL)
    shutil.rmtree(place, ignore_errors=True)


async def _clear_mount(target: Path) -> None:
    for options in ((), ("--lazy",)):
        with contextlib.suppress(CommandError, TimeoutProblem):
            await _umount(target, *options)
            return


def owners(paths: VolumePaths, snapshot: str = "") -> dict[Path, Owner | None]:
    """The directories of snapshots that are looked at, of one or all; None for one that cannot be read."""
    found: dict[Path, Owner | None] = {}
    for place in sorted(paths.browsing.glob("*.*")):
        if snapshot and place.name.rpartition(".")[0] != snapshot:
            continue
        try:
            found[place] = msgspec.json.decode((place / _OWNER).read_bytes(), type=Owner)
        except (OSError, msgspec.DecodeError):
            found[place] = None
    return found


async def clear_stale(paths: VolumePaths) -> None:
    """What commands left that were killed."""
    for place, owner in owners(paths).items():
        if owner is not None and not is_alive(owner.process):
            await clear_place(place)


async def end(paths: VolumePaths, snapshot: str, timeout: float = 60.0) -> int:
    """Have those leave who look at a snapshot, or at any; how many there were. Raises TimeoutProblem."""
    found = owners(paths, snapshot)
    alive = tuple(owner.process for owner in found.values() if owner is not None and is_alive(owner.process))
    for process in alive:
        send(process, signal.SIGTERM)
    if not await gone(alive, timeout):
        raise TimeoutProblem("leaving of those who look at the snapshot", timeout)
    await clear_stale(paths)
    return len(found)
