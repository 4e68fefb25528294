"""What a POSIX filesystem does with names, links, owners, holes and attributes. Each returns what it saw."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

from tests.lab.workloads import channel


def attempt(operation: str, *, path: str, mode: int = 0o644) -> int:
    """The errno of one operation on `path`, 0 if it succeeded: `create`, `read`, `write`, `list`, `mkdir`."""
    try:
        if operation == "list":
            os.listdir(path)
        elif operation == "mkdir":
            os.mkdir(path, mode)
        else:
            flags = {"create": os.O_WRONLY | os.O_CREAT | os.O_EXCL, "read": os.O_RDONLY, "write": os.O_WRONLY}[
                operation
            ]
            fd = os.open(path, flags, mode)
            try:
                if operation == "read":
                    os.read(fd, 1)
                else:
                    os.write(fd, b"x")
            finally:
                os.close(fd)
    except OSError as error:
        return error.errno or -1
    return 0


def attempts(operations: list[tuple[str, str]], uid: int | None = None, gid: int = 0) -> list[int]:
    """`attempt` of each (operation, path) in order, as another user if `uid` is given."""
    if uid is not None:
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
    return [attempt(operation, path=path) for operation, path in operations]


def facts(path: str) -> dict[str, Any]:
    """Owner, group, mode, links, size, and what a symlink says."""
    found = os.lstat(path)
    return {
        "uid": found.st_uid,
        "gid": found.st_gid,
        "mode": oct(stat.S_IMODE(found.st_mode)),
        "kind": stat.filemode(found.st_mode)[0],
        "links": found.st_nlink,
        "size": found.st_size,
        "blocks": found.st_blocks,
        "target": os.readlink(path) if stat.S_ISLNK(found.st_mode) else None,
    }


def write_text(path: str, text: str, sync: bool = True) -> None:
    with Path(path).open("w") as file:
        file.write(text)
        file.flush()
        if sync:
            os.fsync(file.fileno())


def leave_dirty(path: str, text: str) -> None:
    """Open a file, and when told to stop write to it and end, without waiting for any of it to be stored."""
    with Path(path).open("w") as file:
        channel.emit("opened")
        while not channel.stopping(0.1):
            pass
        file.write(text)
        file.flush()
        channel.emit("written")
        # the end of the process closes it, which waits for the server
        os._exit(0)


def read_text(path: str) -> str:
    return Path(path).read_text()


def listing(directory: str) -> list[str]:
    return sorted(os.listdir(directory))


def rename_over(directory: str) -> dict[str, Any]:
    """Rename a file over another that is open: the name changes its content, the open one keeps its own."""
    old, new = Path(directory, "old"), Path(directory, "new")
    old.write_text("old")
    new.write_text("new")
    with old.open() as reader:
        os.rename(new, old)
        return {"name": old.read_text(), "open": reader.read(), "source_exists": new.exists()}


def open_unlinked(directory: str) -> dict[str, Any]:
    """Unlink a file that is open: the name is gone, the content stays usable."""
    path = Path(directory, "unlinked")
    with path.open("w+b", buffering=0) as file:
        file.write(b"before")
        path.unlink()
        gone = not path.exists()
        file.write(b" after")
        os.fsync(file.fileno())
        return {"gone": gone, "content": os.pread(file.fileno(), 64, 0).decode()}


def links(directory: str) -> dict[str, Any]:
    """Hard links and symlinks, also a dangling one."""
    path = Path(directory, "original")
    path.write_text("shared")
    os.link(path, Path(directory, "second"))
    Path(directory, "second").write_text("changed")
    os.symlink("original", Path(directory, "relative"))
    os.symlink("nowhere/at all", Path(directory, "dangling"))
    seen = {
        "links": os.stat(path).st_nlink,
        "content": path.read_text(),
        "same": _same(path, Path(directory, "second")),
    }
    path.unlink()
    seen["survivor"] = Path(directory, "second").read_text()
    seen["links_after"] = os.stat(Path(directory, "second")).st_nlink
    path.write_text("again")
    seen["through_symlink"] = Path(directory, "relative").read_text()
    return seen


def _same(one: Path, other: Path) -> bool:
    return os.stat(one).st_ino == os.stat(other).st_ino


def owners(directory: str) -> None:
    """Numeric owners and every permission bit that the share must carry."""
    for name, mode in (("plain", 0o640), ("none", 0o000), ("setuid", 0o4755), ("setgid", 0o2755)):
        path = Path(directory, name)
        path.write_text(name)
        os.chown(path, 1234, 5678)
        os.chmod(path, mode)
    sticky = Path(directory, "sticky")
    sticky.mkdir()
    os.chown(sticky, 4294967293, 70000)
    os.chmod(sticky, 0o1777)


def sparse(path: str, size: int, at: int) -> dict[str, Any]:
    """A file of `size` bytes with 4 KiB of data at `at`; where data and holes are, as far as the mount can say."""
    with Path(path).open("w+b", buffering=0) as file:
        fd = file.fileno()
        os.ftruncate(fd, size)
        os.pwrite(fd, b"d" * 4096, at)
        os.fsync(fd)
        found = os.fstat(fd)
        seen: dict[str, Any] = {"size": found.st_size, "blocks": found.st_blocks}
        seen["hole_is_zero"] = not any(os.pread(fd, 4096, at - 8192)) and not any(os.pread(fd, 4096, size - 4096))
        seen["data"] = os.pread(fd, 4096, at) == b"d" * 4096
        seen["first_data"] = os.lseek(fd, 0, os.SEEK_DATA)
        seen["hole_after"] = os.lseek(fd, at, os.SEEK_HOLE)
    return seen


def deallocate(path: str, offset: int, length: int) -> dict[str, Any]:
    """Punch a hole into a file of data, if the mount can."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    with Path(path).open("w+b", buffering=0) as file:
        fd = file.fileno()
        os.pwrite(fd, b"f" * (offset + length + 65536), 0)
        os.fsync(fd)
        before = os.fstat(fd).st_blocks
        code = libc.fallocate(fd, 3, ctypes.c_long(offset), ctypes.c_long(length))
        number = ctypes.get_errno() if code else 0
        os.fsync(fd)
        zero = not any(os.pread(fd, length, offset))
        return {"errno": number, "zero": zero, "before": before, "after": os.fstat(fd).st_blocks}


def attributes(path: str) -> dict[str, Any]:
    """Extended attributes of users, if the mount has them."""
    Path(path).write_text("x")
    try:
        os.setxattr(path, "user.colour", b"green")
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EPERM):
            return {"supported": False}
        raise
    seen = {"supported": True, "value": os.getxattr(path, "user.colour").decode(), "names": os.listxattr(path)}
    os.removexattr(path, "user.colour")
    seen["after"] = os.listxattr(path)
    return seen


def many(directory: str, tag: str, count: int) -> None:
    """`count` empty files in one directory."""
    for number in range(count):
        os.close(os.open(os.path.join(directory, f"{tag}-{number:05d}"), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))


def list_and_stat(directory: str) -> dict[str, int]:
    """Entries that a listing names, how many of them once only, and how many can be looked at."""
    names = [entry.name for entry in os.scandir(directory)]
    usable = sum(1 for name in names if stat.S_ISREG(os.stat(os.path.join(directory, name)).st_mode))
    return {"named": len(names), "different": len(set(names)), "usable": usable}
