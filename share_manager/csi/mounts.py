"""Mounts of this node: seen in mountinfo, changed and touched by child processes only.

A call into a file system whose server is away does not return, and a process in it cannot always be killed. So this
process looks at /proc/self/mountinfo (proc(5)), which asks no server, and everything that walks into a mount is a child
with a time limit, which is killed and left behind when it has to be.
"""

from __future__ import annotations

import contextlib
import enum
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from share_manager.csi.errors import InternalError
from share_manager.errors import CommandError, TimeoutProblem
from share_manager.share.commands import run
from share_manager.share.procfs import mount_lines

MOUNTINFO = Path("/proc/self/mountinfo")
LOOK = 5.0
"""Seconds for a server to answer a look into a mount; then the mount counts as hung."""
CHANGE = 30.0
"""Seconds for a change of the mount table."""
_STALE = ("stale file handle", "stale nfs file handle")
_BUSY = "busy"


class Mount(msgspec.Struct, frozen=True, kw_only=True):
    """`device` is the number of its superblock, `root` where in it the mount begins. Options by name."""

    device: str
    root: str
    place: str
    options: dict[str, str]
    kind: str
    source: str
    shown: dict[str, str]

    @property
    def is_nfs(self) -> bool:
        return self.kind in ("nfs", "nfs4")

    @property
    def read_only(self) -> bool:
        return "ro" in self.options or "ro" in self.shown

    @property
    def share(self) -> str:
        """The path on the server, of NFS."""
        return self.source.partition(":/")[2] if not self.source.startswith("[") else self.source.partition("]:/")[2]

    @property
    def server(self) -> str:
        return self.source.removesuffix(f":/{self.share}").strip("[]")


class Health(enum.Enum):
    ALIVE = "its server answers"
    STALE = "its server knows it no more"
    HUNG = "its server does not answer"


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Of a filesystem, in bytes and inodes. `available` is what users without privileges get."""

    total: int
    free: int
    available: int
    inodes: int
    inodes_free: int


class BusyError(InternalError):
    def __init__(self, place: str) -> None:
        super().__init__(f"{place} is still in use by a process on this node")


class StaleError(InternalError):
    def __init__(self, place: str) -> None:
        super().__init__(f"{place} is stale: its server knows it no more; delete the pods that use it")


def parse_mountinfo(text: str) -> Iterator[Mount]:
    for line in mount_lines(text):
        yield Mount(
            device=line.device,
            root=line.root,
            place=line.target,
            options=_options(line.options),
            kind=line.fstype,
            source=line.source,
            shown=_options(line.shown),
        )


def _options(text: str) -> dict[str, str]:
    return {name: value for name, _, value in (word.partition("=") for word in text.split(","))}


def mounts() -> list[Mount]:
    """Of this mount namespace, in the order in which they were made."""
    return list(parse_mountinfo(MOUNTINFO.read_text(errors="surrogateescape")))


def mount_at(place: str) -> Mount | None:
    """The topmost one there."""
    return next((mount for mount in reversed(mounts()) if mount.place == place), None)


async def make_place(place: str, *, parents: bool) -> None:
    """A directory, which may be there. Never looks into what is mounted on it. Raises InternalError."""
    try:
        if parents:
            Path(place).parent.mkdir(parents=True, exist_ok=True, mode=0o750)
        os.mkdir(place, 0o750)
    except FileExistsError:
        pass
    except OSError as error:
        raise InternalError(f"cannot make the directory {place}: {error.strerror or error}") from error


def drop_place(place: str) -> None:
    """Raises InternalError when it is not an empty directory."""
    try:
        os.rmdir(place)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise InternalError(f"cannot remove the directory {place}: {error.strerror or error}") from error


async def mount_nfs(source: str, place: str, options: str, timeout: float) -> None:
    """Raises CommandError, TimeoutProblem, MissingProgramError."""
    # retry: the caller decides for how long it is worth trying
    await run("mount.nfs", source, place, "-o", f"{options},retry=0", timeout=timeout)


async def bind(source: str, place: str, *, read_only: bool) -> None:
    """Raises CommandError, TimeoutProblem."""
    await run("mount", "--no-canonicalize", "--bind", source, place, timeout=CHANGE)
    if read_only:
        try:
            await run("mount", "--no-canonicalize", "-o", "remount,bind,ro", place, timeout=CHANGE)
        except BaseException:
            # or it would stay there, writable
            with contextlib.suppress(CommandError, TimeoutProblem):
                await detach(place)
            raise


async def unmount(place: str) -> None:
    """Raises BusyError, CommandError, TimeoutProblem."""
    try:
        await run("umount", "--internal-only", "--no-canonicalize", place, timeout=CHANGE)
    except CommandError as error:
        if _BUSY in error.output:
            raise BusyError(place) from error
        if mount_at(place) is not None:
            raise


async def detach(place: str, *, force: bool = False) -> None:
    """Take it out of the tree even when its server is away. With `force` everything that is under way in the whole file
    system, wherever else it is mounted, fails with EIO. Raises CommandError, TimeoutProblem."""
    how = ("--force", "--lazy") if force else ("--lazy",)
    try:
        await run("umount", "--internal-only", "--no-canonicalize", *how, place, timeout=CHANGE)
    except CommandError:
        if mount_at(place) is not None:
            raise


async def write_back(place: str, timeout: float) -> None:
    """Have all that was written to a filesystem on its server. Raises StaleError, CommandError, TimeoutProblem."""
    await _look("sync", "--file-system", place, place=place, timeout=timeout)


async def health(place: str) -> Health:
    """Raises CommandError."""
    try:
        await usage(place)
    except StaleError:
        return Health.STALE
    except TimeoutProblem:
        return Health.HUNG
    return Health.ALIVE


async def usage(place: str) -> Usage:
    """Raises StaleError, CommandError, TimeoutProblem."""
    text = await _look("stat", "--file-system", "--format=%S %b %f %a %c %d", place, place=place, timeout=LOOK)
    block, total, free, available, inodes, inodes_free = (int(word) for word in text.split())
    return Usage(
        total=total * block,
        free=free * block,
        available=available * block,
        inodes=inodes,
        inodes_free=inodes_free,
    )


async def _look(*argv: str, place: str, timeout: float) -> str:
    try:
        _, text = await run(*argv, timeout=timeout)
    except CommandError as error:
        if any(word in error.output.lower() for word in _STALE):
            raise StaleError(place) from error
        raise
    return text
