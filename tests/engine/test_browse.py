"""Snapshots as files: real replicas, a real engine without a file, a real FUSE mount."""

from __future__ import annotations

import contextlib
import errno
import json
import random
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from engine.browse.reader import open_snapshot
from engine.client import EngineClient, EngineOperationError
from engine.controller import browse, snapshots
from engine.controller.progress import Progress
from engine.launch import BrowseConfig, EngineConfig, browse_argv, engine_argv
from engine.operations import SnapshotCreate, SnapshotCreated, SnapshotDelete, SnapshotDeleted, SnapshotOpen
from engine.record import bump_epoch
from engine.wire.frame import FrameType, encode_frame
from tests.engine.cluster import Cluster, cluster

pytestmark = pytest.mark.system

MIB = 1 << 20
SIZE = 16 * MIB


class Process:
    def __init__(self, argv: list[str], log: Path) -> None:
        with log.open("ab") as stderr:
            self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=stderr)
        assert self.process.stdout is not None
        self.first: dict[str, Any] = json.loads(self.process.stdout.readline())

    def end(self, *, kill: bool = False) -> int:
        assert self.process.stdout is not None
        if self.process.poll() is None:
            self.process.kill() if kill else self.process.terminate()
        status = self.process.wait(20)
        self.process.stdout.close()
        return status


class Volume:
    def __init__(self, of: Cluster) -> None:
        self.cluster = of
        self.control = of.directory / "engine.sock"
        self.client = EngineClient(self.control)
        self.engine = self.attach()
        self.contents: dict[str, bytes] = {}

    def attach(self) -> Process:
        config = EngineConfig(
            record=str(self.cluster.store.path),
            secret_file=str(self.cluster.secret),
            epoch=bump_epoch(self.cluster.store).epoch,
            frontend="none",
            control=str(self.control),
            open_timeout=5.0,
            reconnect_interval=0.1,
        )
        return Process(engine_argv(config, self.cluster.directory / "engine.json"), self.cluster.directory / "log")


async def write(of: Cluster, seed: int, snapshot: str = "") -> bytes:
    """Fill parts of the volume, perhaps keep that, and return what it holds."""
    chance = random.Random(seed)
    async with of.attached() as controller:
        for _ in range(6):
            await controller.write(chance.randrange(15) * MIB + 4096, chance.randbytes(MIB // 2))
        if snapshot:
            await snapshots.create(controller, SnapshotCreate(name=snapshot), Progress())
        return b"".join([await controller.read(at, MIB) for at in range(0, SIZE, MIB)])


@pytest.fixture
async def volume(tmp_path: Path) -> AsyncIterator[Volume]:
    """Two replicas, snapshots `a` and `b`, and a head that differs from both."""
    with cluster(tmp_path, replicas=2, size=SIZE) as of:
        contents = {name: await write(of, seed, name) for seed, name in enumerate("ab")}
        await write(of, 3)
        made = Volume(of)
        made.contents = contents
        yield made
        made.engine.end(kill=True)


@pytest.fixture
def files(volume: Volume) -> Iterator[Path]:
    target = volume.cluster.directory / "snapshots"
    target.mkdir()
    config = BrowseConfig(control=str(volume.control), mountpoint=str(target))
    served = Process(browse_argv(config, volume.cluster.directory / "browse.json"), volume.cluster.directory / "log")
    try:
        assert served.first["event"] == "ready"
        yield target
    finally:
        subprocess.run(["umount", str(target)], check=True)
        # it leaves by itself
        assert served.process.wait(20) == 0
        served.end()


async def in_thread(argv: list[str]) -> bytes:
    """By another process: one that forks while it has a file of the mount open can hang."""
    done = await trio.run_process(argv, capture_stdout=True)
    return done.stdout


async def test_snapshots_are_read_only_files(volume: Volume, files: Path) -> None:
    assert await in_thread(["ls", str(files)]) == b"a.img\nb.img\n"
    for name, content in volume.contents.items():
        assert await in_thread(["cat", str(files / f"{name}.img")]) == content
    size, blocks, mode = (await in_thread(["stat", "-c", "%s %b %a", str(files / "a.img")])).split()
    assert (int(size), mode) == (SIZE, b"400")
    assert 0 < int(blocks) * 512 < SIZE
    for argv in (["touch", str(files / "new")], ["rm", str(files / "a.img")], ["dd", f"of={files / 'a.img'}"]):
        done = await trio.run_process(argv, check=False, capture_stderr=True, stdin=b"")
        assert b"Read-only file system" in done.stderr
    assert await in_thread(["cat", str(files / "b.img")]) == volume.contents["b"]


async def test_what_is_open_cannot_be_deleted_and_what_is_deleted_cannot_be_opened(volume: Volume, files: Path) -> None:
    async with open_snapshot(volume.control, "a") as reader:
        with pytest.raises(EngineOperationError, match="is being read: end the"):
            await volume.client.run(SnapshotDelete(name="a"), SnapshotDeleted)
        assert await reader.read(MIB, MIB) == volume.contents["a"][MIB : 2 * MIB]
    with trio.fail_after(10):
        while True:
            with contextlib.suppress(EngineOperationError):
                await volume.client.run(SnapshotDelete(name="a"), SnapshotDeleted)
                break
            await trio.sleep(0.02)
    with trio.fail_after(10):
        while b"a.img" in await in_thread(["ls", str(files)]):
            await trio.sleep(0.1)
    done = await trio.run_process(["cat", str(files / "a.img")], check=False, capture_stderr=True)
    assert b"No such file" in done.stderr
    # the merging of one below changes nothing
    assert await in_thread(["cat", str(files / "b.img")]) == volume.contents["b"]


async def test_reads_go_on_when_a_replica_dies_and_when_the_engine_is_replaced(volume: Volume, files: Path) -> None:
    async with open_snapshot(volume.control, "b") as reader:
        first = (await volume.client.status()).replicas[0].name
        assert await reader.read(0, MIB) == volume.contents["b"][:MIB]
        volume.cluster.kill(first)
        for at in range(0, SIZE, MIB):
            assert await reader.read(at, MIB) == volume.contents["b"][at : at + MIB]
        volume.cluster.start(first)
        volume.engine.end(kill=True)
        async with trio.open_nursery() as nursery:

            async def restart() -> None:
                await trio.sleep(0.2)
                volume.engine = await trio.to_thread.run_sync(volume.attach)

            nursery.start_soon(restart)
            for at in range(0, SIZE, MIB):
                assert await reader.read(at, MIB) == volume.contents["b"][at : at + MIB]
        with pytest.raises(EngineOperationError, match="is being read"):
            await volume.client.run(SnapshotDelete(name="b"), SnapshotDeleted)
    assert await in_thread(["cat", str(files / "b.img")]) == volume.contents["b"]


async def test_a_reader_that_does_not_read_holds_nobody_up(volume: Volume) -> None:
    stream = await trio.open_unix_socket(volume.control)
    async with stream, open_snapshot(volume.control, "b") as other:
        await stream.send_all(b'{"op":"snapshot_open","name":"a"}\n')
        assert b'"result"' in await stream.receive_some()
        with trio.move_on_after(2):
            for seq in range(200):
                await stream.send_all(encode_frame(FrameType.READ_SNAPSHOT, seq, offset=0, length=browse.MAX_READ))
        with trio.fail_after(10):
            assert await other.read(0, MIB) == volume.contents["b"][:MIB]


@pytest.mark.parametrize(
    "noise",
    [
        b"x" * 100,
        encode_frame(FrameType.WRITE, 1, b"data", length=4),
        encode_frame(FrameType.READ_SNAPSHOT, 1, b"name", length=4),
        encode_frame(FrameType.READ_SNAPSHOT, 1, length=0),
        encode_frame(FrameType.READ_SNAPSHOT, 1, length=browse.MAX_READ + 1),
    ],
)
async def test_nonsense_ends_the_connection_and_nothing_else(volume: Volume, noise: bytes) -> None:
    stream = await trio.open_unix_socket(volume.control)
    async with stream:
        await stream.send_all(b'{"op":"snapshot_open","name":"a"}\n')
        assert b'"result"' in await stream.receive_some()
        await stream.send_all(noise)
        assert await stream.receive_some() == b""
    assert (await volume.client.status()).state == "ready"


async def test_what_is_beyond_the_end_or_unknown_is_said(volume: Volume) -> None:
    async with open_snapshot(volume.control, "a") as reader:
        assert await reader.read(SIZE - 10, 100) == volume.contents["a"][-10:]
        assert await reader.read(SIZE, 100) == b""
        with pytest.raises(OSError) as caught:
            await reader._read(SIZE, 100)
        assert caught.value.errno == errno.EINVAL
    with pytest.raises(EngineOperationError, match="has no snapshot 'z'"):
        await volume.client.run(SnapshotOpen(name="z"), SnapshotCreated)
