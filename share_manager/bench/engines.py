"""Engines to measure: replica servers over TCP and the engine on them, with nothing of a share around."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path

import trio

from engine.frontend.fuse_device import FuseDevice
from engine.launch import EngineConfig, ReplicaConfig, engine_argv, replica_argv
from engine.record import FileRecordStore, ReplicaRecord, VolumeRecord, bump_epoch
from engine.secret import create_secret
from engine.store import IoMode, create_replica
from share_manager.bench.processes import Server, UnavailableError, serving

START_SECONDS = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def said(server: Server, word: str, log: Path | None = None) -> None:
    """Wait until the process has printed `word`, or written it to `log`. Raises UnavailableError."""
    with trio.move_on_after(START_SECONDS):
        while word not in (log or server.stdout).read_text(errors="replace"):
            server.check()
            await trio.sleep(0.02)
        return
    raise UnavailableError(f"{server.name} was not ready within {START_SECONDS:g} s: {server.why()}")


def engine_file(
    replicas: int, *, io: IoMode = "buffered", unix: bool = False
) -> Callable[[Path, str, int], AbstractAsyncContextManager[tuple[Path, tuple[int, ...]]]]:
    """A context: in a directory, under a name, of a size, it gives the block file and the processes that serve it."""

    @contextlib.asynccontextmanager
    async def opened(directory: Path, name: str, size: int) -> AsyncIterator[tuple[Path, tuple[int, ...]]]:
        home = directory / name
        home.mkdir()
        secret, record_file, block_file = home / "secret", home / "record.json", home / "block"
        create_secret(secret)
        identity = str(uuid.uuid4())
        members = tuple(
            ReplicaRecord(
                name=f"r{number}",
                address=f"unix:{home}/r{number}.sock" if unix else f"tcp:127.0.0.1:{free_port()}",
                directory=str(home / f"r{number}"),
            )
            for number in range(1, replicas + 1)
        )
        try:
            async with AsyncExitStack() as stack:
                pids: list[int] = []
                for member in members:
                    create_replica(
                        Path(member.directory), volume="bench", uuid=identity, replica=member.name, size=size
                    )
                    config = ReplicaConfig(
                        directory=member.directory, listen=member.address, secret_file=str(secret), io=io
                    )
                    argv = replica_argv(config, home / f"{member.name}.json")
                    server = await stack.enter_async_context(serving(f"{name}-{member.name}", argv, directory))
                    await said(server, "listening")
                    pids.append(server.pid)
                store = FileRecordStore(record_file)
                store.create(
                    VolumeRecord(
                        volume="bench",
                        uuid=identity,
                        size=size,
                        replicas=members,
                        in_sync=tuple(member.name for member in members),
                    )
                )
                device = FuseDevice.mount(block_file)
                stack.callback(_let_go, device)
                engine = EngineConfig(
                    record=str(record_file),
                    secret_file=str(secret),
                    epoch=bump_epoch(store).epoch,
                    fuse_fd=device.fd,
                    block_file=str(block_file),
                    control=str(home / "engine.sock"),
                )
                argv = engine_argv(engine, home / "engine.json")
                server = await stack.enter_async_context(serving(name, argv, directory, pass_fds=(device.fd,)))
                await said(server, "ready")
                # the engine's is the last one: should it die, the file fails, and nobody waits for ever
                device.close()
                pids.append(server.pid)
                yield block_file, tuple(pids)
        finally:
            shutil.rmtree(home, ignore_errors=True)

    return opened


def _let_go(device: FuseDevice) -> None:
    device.close()
    device.unmount()
    with contextlib.suppress(OSError):
        os.unlink(device.path)
