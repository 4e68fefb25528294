"""One replica's disk: a small ext4 of its own, which can be full, and can lose its power."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import trio

from share_manager.errors import CommandError
from share_manager.share.commands import run
from share_manager.share.filesystem import unmount
from share_manager.share.procfs import mount_at

# fs/ext4/ext4.h: EXT4_IOC_SHUTDOWN, EXT4_GOING_FLAGS_NOLOGFLUSH
_SHUTDOWN, _NOLOGFLUSH = 0x8004587D, 2
_FILLER = "filler"
_LOOP_MAJOR = 7


class Disk:
    """`size` bytes. `place` is where it is mounted. `lock` is held from the loss of power to its return."""

    def __init__(self, directory: Path, name: str, size: int) -> None:
        self.name = name
        self.image = directory / f"{name}.disk"
        self.place = directory / f"{name}.mnt"
        self.lock = trio.Lock()
        self._size = size

    async def make(self) -> None:
        with self.image.open("wb") as file:
            file.truncate(self._size)
        self.place.mkdir()
        await run("mkfs.ext4", "-q", "-F", "-m", "0", "-b", "4096", str(self.image))
        await self.mount()

    async def mount(self) -> None:
        await run("mount", "-o", "loop,noatime", str(self.image), str(self.place))

    @contextlib.contextmanager
    def _inside(self) -> Iterator[int]:
        """A descriptor of its root directory. Raises OSError when it is not mounted: what lies there then is not ours
        to fill, let alone to shut down."""
        fd = os.open(self.place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            device = os.fstat(fd).st_dev
            if os.major(device) != _LOOP_MAJOR or device == self.image.stat().st_dev:
                raise OSError(errno.ENXIO, f"nothing is mounted at {self.place}")
            yield fd
        finally:
            os.close(fd)

    def fill(self) -> None:
        """Not a block is left. Raises OSError."""
        with self._inside() as root:
            fd = os.open(_FILLER, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=root)
            try:
                step = 1 << 28
                while step >= 4096:
                    try:
                        os.posix_fallocate(fd, os.fstat(fd).st_size, step)
                    except OSError as error:
                        if error.errno != errno.ENOSPC:
                            raise
                        step //= 2
            finally:
                os.close(fd)

    def free(self) -> None:
        """Raises OSError."""
        with self._inside() as root, contextlib.suppress(FileNotFoundError):
            os.unlink(_FILLER, dir_fd=root)

    def cut(self) -> None:
        """Whatever was not synced is gone, and every further access fails. Raises OSError."""
        with self._inside() as root:
            fcntl.ioctl(root, _SHUTDOWN, struct.pack("I", _NOLOGFLUSH))

    async def release(self, kill_user: Callable[[], None]) -> None:
        """Unmount it; `kill_user` ends whoever has a file open."""
        with trio.fail_after(60):
            while mount_at(self.place) is not None:
                kill_user()
                with contextlib.suppress(CommandError):
                    await unmount(self.place, busy_for=0.0)

    async def remove(self) -> None:
        with contextlib.suppress(OSError):
            self.free()
        await unmount(self.place)
        self.image.unlink(missing_ok=True)


@contextlib.asynccontextmanager
async def disks(directory: Path, names: list[str], size: int) -> AsyncIterator[dict[str, Disk]]:
    made = {name: Disk(directory, name, size) for name in names}
    try:
        for disk in made.values():
            await disk.make()
        yield made
    finally:
        with trio.CancelScope(shield=True):
            for disk in made.values():
                await _regardless(disk.remove)


async def _regardless(act: Callable[[], Awaitable[None]]) -> None:
    # the others have to go as well; what stays is found by the search for leftovers
    with contextlib.suppress(Exception):
        await act()
