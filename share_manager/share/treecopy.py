"""Files out of a tree that others have made, such as a snapshot of what clients wrote.

Nothing in it is trusted: symbolic links are copied and never followed, so nothing outside the tree can be reached; what
is made at the destination is made anew, through descriptors, and never through a name that somebody else could change.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import msgspec

from engine.store.chain import extents
from share_manager.errors import InvalidValueError, PathNotFoundError

_BUFFER = 1 << 20
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Copied(msgspec.Struct, kw_only=True):
    """`bytes` of content. `skipped` are sockets and devices, which mean nothing elsewhere."""

    files: int = 0
    directories: int = 0
    links: int = 0
    bytes: int = 0
    skipped: list[str] = msgspec.field(default_factory=list)


def copy_out(root: Path, path: str, destination: Path) -> tuple[Path, Copied]:
    """Copy `path` below `root` with owners, modes, times and extended attributes; what was made, and how much.

    Into `destination` when that is a directory, else to that name, which must be free. Hard links become files of their
    own. Raises InvalidValueError, PathNotFoundError, OSError.
    """
    parts = [part for part in PurePosixPath(path).parts if part != "/"]
    if ".." in parts:
        raise InvalidValueError("path", path, "it leads out with '..'")
    name = parts[-1] if parts else ""
    if destination.is_dir() and not destination.is_symlink():
        if name:
            destination = destination / name
        elif any(destination.iterdir()):
            raise PathNotFoundError(str(destination), "all of a snapshot goes into an empty directory, or a new one")
    if not destination.parent.is_dir():
        raise PathNotFoundError(str(destination.parent), "there is no such directory to copy to")
    copied = Copied()
    with _parent(root, parts, path) as source, _opened(destination.parent) as target:
        if name:
            _copy(source, name, target, destination.name, copied, name)
        else:
            with contextlib.suppress(FileExistsError):
                os.mkdir(destination.name, 0o700, dir_fd=target)
            _fill(source, target, destination.name, copied, "")
    return destination, copied


@contextlib.contextmanager
def _opened(directory: Path) -> Iterator[int]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _parent(root: Path, parts: list[str], path: str) -> Iterator[int]:
    """The directory that holds the last of `parts`, found without following a link. Raises PathNotFoundError."""
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for number, part in enumerate(parts[:-1], 1):
            try:
                deeper = os.open(part, _DIRECTORY, dir_fd=fd)
            except OSError as error:
                reason = {
                    errno.ENOENT: "is not in this snapshot",
                    # Linux says so for a link too, because of O_DIRECTORY
                    errno.ENOTDIR: "is no directory; a symbolic link is not followed: name what it points to",
                    errno.ELOOP: "is a symbolic link, which is not followed: name what it points to",
                }.get(error.errno or 0, error.strerror or str(error))
                raise PathNotFoundError("/".join(parts[:number]), reason) from None
            os.close(fd)
            fd = deeper
        if parts:
            try:
                os.stat(parts[-1], dir_fd=fd, follow_symlinks=False)
            except FileNotFoundError:
                raise PathNotFoundError(path, "is not in this snapshot") from None
        yield fd
    finally:
        os.close(fd)


def _copy(source: int, name: str, target: int, new: str, copied: Copied, shown: str) -> None:
    found = os.stat(name, dir_fd=source, follow_symlinks=False)
    try:
        if stat.S_ISDIR(found.st_mode):
            os.mkdir(new, 0o700, dir_fd=target)
            fd = os.open(name, _DIRECTORY, dir_fd=source)
            try:
                _fill(fd, target, new, copied, shown)
            finally:
                os.close(fd)
        elif stat.S_ISREG(found.st_mode):
            _copy_file(source, name, target, new, copied)
        elif stat.S_ISLNK(found.st_mode):
            os.symlink(os.readlink(name, dir_fd=source), new, dir_fd=target)
            copied.links += 1
            os.chown(new, found.st_uid, found.st_gid, dir_fd=target, follow_symlinks=False)
            os.utime(new, ns=(found.st_atime_ns, found.st_mtime_ns), dir_fd=target, follow_symlinks=False)
        else:
            copied.skipped.append(shown)
    except FileExistsError:
        raise PathNotFoundError(
            shown, "there is something of that name at the destination: nothing is replaced"
        ) from None


def _fill(source: int, target: int, new: str, copied: Copied, shown: str) -> None:
    into = os.open(new, _DIRECTORY, dir_fd=target)
    try:
        for name in sorted(os.listdir(source)):
            _copy(source, name, into, name, copied, f"{shown}/{name}" if shown else name)
        _take_attributes(source, into)
        copied.directories += 1
    finally:
        os.close(into)


def _copy_file(source: int, name: str, target: int, new: str, copied: Copied) -> None:
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=source)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        into = os.open(new, flags, 0o600, dir_fd=target)
        try:
            size = os.fstat(fd).st_size
            for start, end in extents(fd, 0, size):
                at = start
                while at < end and (data := os.pread(fd, min(_BUFFER, end - at), at)):
                    written = os.pwrite(into, data, at)
                    at += written
                    copied.bytes += written
            os.ftruncate(into, size)
            _take_attributes(fd, into)
            copied.files += 1
        finally:
            os.close(into)
    finally:
        os.close(fd)


def _take_attributes(source: int, target: int) -> None:
    for key in os.listxattr(source):
        # not every file system takes every kind
        with contextlib.suppress(OSError):
            os.setxattr(target, key, os.getxattr(source, key))
    found = os.fstat(source)
    os.fchown(target, found.st_uid, found.st_gid)
    os.fchmod(target, stat.S_IMODE(found.st_mode))
    os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns))
