"""What every frontend must do with a volume; a new one is added to FRONTENDS and passes this."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import trio

from engine.frontend import FRONTENDS, frontend, session
from engine.frontend.fuse_device import FuseDevice
from engine.ops import READ, UNMAP, WRITE, BlockRequest
from engine.poller import Poller

pytestmark = [pytest.mark.system, pytest.mark.parametrize("name", FRONTENDS)]

SIZE = 8 << 20
BLOCK = 4096


class MemoryVolume:
    """A volume that counts and can be told to fail."""

    def __init__(self) -> None:
        self.size = SIZE
        self.poller = Poller()
        self.data = bytearray(SIZE)
        self.flushes = 0
        self.writes: list[tuple[int, int]] = []
        self.error = 0
        self.hold: trio.Event | None = None
        self.concurrent = self.most_concurrent = 0
        self.nursery: trio.Nursery | None = None
        self.watchers: list[Callable[[], None]] = []

    async def _enter(self) -> None:
        self.concurrent += 1
        self.most_concurrent = max(self.most_concurrent, self.concurrent)
        try:
            if self.hold is not None:
                await self.hold.wait()
        finally:
            self.concurrent -= 1
        if self.error:
            raise OSError(self.error, os.strerror(self.error))

    async def read(self, offset: int, length: int) -> bytes:
        await self._enter()
        return bytes(self.data[offset : offset + length])

    async def write(self, offset: int, data: bytes) -> None:
        await self._enter()
        self.writes.append((offset, len(data)))
        self.data[offset : offset + len(data)] = data

    async def unmap(self, offset: int, length: int) -> None:
        await self._enter()
        self.data[offset : offset + length] = bytes(length)

    async def flush(self) -> None:
        await self._enter()
        self.flushes += 1

    def submit(self, request: BlockRequest) -> None:
        assert self.nursery is not None
        self.nursery.start_soon(self._execute, request)

    def kick(self) -> None:
        return

    def watch_size(self, changed: Callable[[], None]) -> None:
        self.watchers.append(changed)

    def grow(self, size: int) -> None:
        self.data.extend(bytes(size - self.size))
        self.size = size
        for changed in self.watchers:
            changed()

    async def _execute(self, request: BlockRequest) -> None:
        data = b""
        try:
            if request.op == READ:
                data = await self.read(request.offset, request.length)
            elif request.op == WRITE:
                await self.write(request.offset, bytes(request.payload))
            elif request.op == UNMAP:
                await self.unmap(request.offset, request.length)
            else:
                await self.flush()
        except OSError as error:
            request.finish(error.errno or errno.EIO, b"")
        else:
            request.finish(0, data)


@contextlib.asynccontextmanager
async def served(name: str, directory: Path) -> AsyncIterator[tuple[MemoryVolume, Path]]:
    volume = MemoryVolume()
    device = FuseDevice.mount(directory / "block")
    try:
        async with trio.open_nursery() as volume.nursery, frontend(name).serve(volume, device.fd):
            volume.nursery.start_soon(volume.poller.run, volume.kick)
            yield volume, device.path
            volume.nursery.cancel_scope.cancel()
    finally:
        device.abort()
        device.unmount()
        device.close()


async def thread(act: Callable[..., Any], *arguments: Any) -> Any:
    """File operations must not block the loop that serves them."""
    with trio.fail_after(20):
        return await trio.to_thread.run_sync(act, *arguments, abandon_on_cancel=True)


def with_file(path: Path, flags: int, act: Callable[[int], Any]) -> Any:
    fd = os.open(path, flags)
    try:
        return act(fd)
    finally:
        os.close(fd)


async def test_it_is_one_file_of_the_volumes_size(name: str, tmp_path: Path) -> None:
    async with served(name, tmp_path) as (_, path):
        stat = await thread(os.stat, path)
        assert stat.st_size == SIZE
        assert stat.st_mode & 0o170777 == 0o100600


async def test_random_reads_and_writes_match_a_model(name: str, tmp_path: Path) -> None:
    rng = Random(1)
    model = bytearray(SIZE)

    def work(fd: int) -> None:
        for _ in range(150):
            offset = rng.randrange(SIZE)
            length = min(rng.choice((1, 511, BLOCK, 3 * BLOCK + 7, 300_000, 2 << 20)), SIZE - offset)
            if rng.random() < 0.5:
                data = rng.randbytes(length)
                assert os.pwrite(fd, data, offset) == length
                model[offset : offset + length] = data
            else:
                assert os.pread(fd, length, offset) == model[offset : offset + length]

    async with served(name, tmp_path) as (volume, path):
        await thread(with_file, path, os.O_RDWR, work)
        assert volume.data == model


async def test_every_fsync_is_a_flush_and_is_never_faked(name: str, tmp_path: Path) -> None:
    def work(fd: int) -> None:
        for i in range(3):
            os.pwrite(fd, b"x", i)
            os.fsync(fd)
            os.fdatasync(fd)

    async with served(name, tmp_path) as (volume, path):
        await thread(with_file, path, os.O_RDWR, work)
        assert volume.flushes == 6


async def test_a_write_is_answered_only_when_the_volume_has_it(name: str, tmp_path: Path) -> None:
    async with served(name, tmp_path) as (volume, path):
        volume.hold = trio.Event()
        returned = False

        async def write() -> None:
            nonlocal returned
            await thread(with_file, path, os.O_RDWR, lambda fd: os.pwrite(fd, b"data", 0))
            returned = True

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            with trio.fail_after(10):
                while not volume.concurrent:
                    await trio.sleep(0.005)
            assert not returned
            volume.hold.set()
        assert volume.data[:4] == b"data"


async def test_requests_run_side_by_side(name: str, tmp_path: Path) -> None:
    async with served(name, tmp_path) as (volume, path):
        volume.hold = trio.Event()
        async with trio.open_nursery() as nursery:
            for i in range(8):

                def read(fd: int, at: int = i * BLOCK) -> bytes:
                    return os.pread(fd, BLOCK, at)

                nursery.start_soon(thread, with_file, path, os.O_RDONLY, read)
            with trio.fail_after(10):
                while volume.concurrent < 8:
                    await trio.sleep(0.005)
            volume.hold.set()
        assert volume.most_concurrent == 8


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
async def test_errors_reach_the_caller_as_they_are(name: str, tmp_path: Path, code: int) -> None:
    async with served(name, tmp_path) as (volume, path):
        volume.error = code

        def work(fd: int) -> list[int | None]:
            seen = []
            for act in (lambda: os.pread(fd, 1, 0), lambda: os.pwrite(fd, b"x", 0), lambda: os.fsync(fd)):
                try:
                    act()
                except OSError as error:
                    seen.append(error.errno)
            return seen

        assert await thread(with_file, path, os.O_RDWR, work) == [code, code, code]
        volume.error = 0
        await thread(with_file, path, os.O_RDWR, lambda fd: os.pwrite(fd, b"x", 0))


async def test_the_end_of_the_volume_is_the_end_of_the_file(name: str, tmp_path: Path) -> None:
    def work(fd: int) -> None:
        assert os.pread(fd, 100, SIZE) == b""
        assert os.pread(fd, 100, SIZE - 10) == bytes(10)
        with pytest.raises(OSError) as caught:
            os.pwrite(fd, b"x" * 20, SIZE)
        assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
        with pytest.raises(PermissionError):
            os.ftruncate(fd, SIZE // 2)

    async with served(name, tmp_path) as (volume, path):
        await thread(with_file, path, os.O_RDWR, work)
        assert (await thread(os.stat, path)).st_size == SIZE
        assert len(volume.data) == SIZE


async def test_a_loop_device_on_it_does_direct_io_and_flushes(name: str, tmp_path: Path) -> None:
    def work(path: Path, volume: MemoryVolume) -> None:
        loop = subprocess.run(
            ["losetup", "--direct-io=on", "-b", "4096", "-f", "--show", str(path)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        try:
            dio = subprocess.run(["losetup", "-n", "-O", "DIO", loop], check=True, capture_output=True, text=True)
            assert dio.stdout.strip() == "1"
            before = volume.flushes
            with open(loop, "r+b", buffering=0) as device:
                device.write(b"y" * 3 * BLOCK)
                os.fsync(device.fileno())
            assert volume.flushes == before + 1
        finally:
            subprocess.run(["losetup", "-d", loop], check=True)

    async with served(name, tmp_path) as (volume, path):
        await thread(work, path, volume)
        assert volume.data[: 3 * BLOCK] == b"y" * 3 * BLOCK
        assert all(offset % BLOCK == 0 and length % BLOCK == 0 for offset, length in volume.writes)


async def test_while_somebody_keeps_the_descriptor_requests_wait_for_the_next_server(name: str, tmp_path: Path) -> None:
    """A server that ends does not fail the file: whoever still holds /dev/fuse decides."""
    device = FuseDevice.mount(tmp_path / "block")
    try:
        async with trio.open_nursery() as nursery:
            outcome: list[object] = []

            async def read() -> None:
                try:
                    outcome.append(await thread(with_file, device.path, os.O_RDONLY, lambda fd: os.pread(fd, 1, 0)))
                except OSError as error:
                    outcome.append(error.errno)

            volume = MemoryVolume()
            async with frontend(name).serve(volume, device.fd), trio.open_nursery() as serving:
                serving.start_soon(volume.poller.run, volume.kick)
                await thread(os.stat, device.path)
                serving.cancel_scope.cancel()
            nursery.start_soon(read)
            await trio.sleep(0.2)
            assert outcome == []
            device.abort()
        assert outcome in ([errno.ECONNABORTED], [errno.ENOTCONN], [errno.EIO])
    finally:
        device.unmount()
        device.close()


@pytest.mark.parametrize("mode", [0x03, 0x11], ids=["punch-hole", "zero-range"])
async def test_a_discarded_range_reads_as_zeros_or_is_refused(name: str, tmp_path: Path, mode: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    start, length = 3 * BLOCK, (2 << 20) + 5 * BLOCK

    def work(fd: int) -> int:
        os.pwrite(fd, b"\xff" * SIZE, 0)
        if libc.fallocate(fd, mode, ctypes.c_long(start), ctypes.c_long(length)):
            return ctypes.get_errno()
        assert os.pread(fd, SIZE, 0) == b"\xff" * start + bytes(length) + b"\xff" * (SIZE - start - length)
        return 0

    async with served(name, tmp_path) as (_, path):
        # libfuse's Python binding has no handler for it
        assert await thread(with_file, path, os.O_RDWR, work) == (errno.EOPNOTSUPP if name == "pyfuse3" else 0)


async def test_more_large_writes_at_once_than_are_taken_in_at_a_time(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    length = 128 << 10
    monkeypatch.setattr(session, "_MAX_BULK", 4 * length)
    async with served(name, tmp_path) as (volume, path):
        volume.hold = trio.Event()
        count = SIZE // length
        async with trio.open_nursery() as nursery:
            for i in range(count):

                def write(fd: int, at: int = i * length, data: bytes = bytes([i + 1]) * length) -> None:
                    assert os.pwrite(fd, data, at) == length

                nursery.start_soon(thread, with_file, path, os.O_RDWR, write)
            with trio.fail_after(10):
                while not volume.concurrent:
                    await trio.sleep(0.005)
            volume.hold.set()
        assert all(volume.data[i * length : (i + 1) * length] == bytes([i + 1]) * length for i in range(count))


async def test_a_grown_volume_is_a_larger_file_and_a_larger_loop_device(name: str, tmp_path: Path) -> None:
    async with served(name, tmp_path) as (volume, path):
        argv = ["losetup", "--find", "--show", "--direct-io=on", "--sector-size", str(BLOCK), str(path)]
        device = (await thread(subprocess.check_output, argv)).decode().strip()
        try:
            assert (await thread(os.stat, path)).st_size == SIZE

            def write(fd: int) -> int:
                return os.pwrite(fd, b"g" * BLOCK, 2 * SIZE - BLOCK)

            with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
                await thread(with_file, path, os.O_RDWR, write)
            volume.grow(2 * SIZE)
            await thread(subprocess.check_call, ["losetup", "--set-capacity", device])
            sectors = int(await thread(Path(f"/sys/block/{Path(device).name}/size").read_text))
            assert sectors * 512 == 2 * SIZE
            assert (await thread(os.stat, path)).st_size == 2 * SIZE
            assert await thread(with_file, device, os.O_RDWR | os.O_DSYNC, write) == BLOCK
            assert volume.data[-BLOCK:] == b"g" * BLOCK
        finally:
            await thread(subprocess.check_call, ["losetup", "--detach", device])
