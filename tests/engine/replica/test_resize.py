from __future__ import annotations

import errno
from pathlib import Path

import pytest

from engine.store import inspect_replica
from engine.store.resize import Growth
from engine.wire import messages
from engine.wire.frame import Frame, FrameType, Status
from tests.engine.replica.client import Client, connect
from tests.engine.replica.conftest import ReplicaProcess
from tests.engine.replica.inside import SIZE, inside

BLOCK = 4096


async def resize(client: Client, size: int) -> Frame:
    return await client.call(FrameType.RESIZE, messages.encode(messages.Resize(size=size)))


async def test_a_replica_grows_under_its_owner_and_survives_a_kill(replica: ReplicaProcess) -> None:
    async with connect(replica.address) as client:
        await client.open(1)
        assert (await client.write(SIZE, b"x" * BLOCK))[1] == Status.OUT_OF_RANGE
        for _ in range(2):
            assert (await resize(client, 2 * SIZE))[1] == Status.OK
        assert (await client.write(2 * SIZE - BLOCK, b"x" * BLOCK))[1] == Status.OK
        assert (await client.read(SIZE, BLOCK))[5] == bytes(BLOCK)
        # one that is larger already has nothing to do: an earlier attempt may have come further with it
        assert (await resize(client, SIZE))[1] == Status.OK
        assert (await resize(client, 2 * SIZE + 1))[1] == Status.BAD_REQUEST
        assert (await client.status()).size == 2 * SIZE
        await client.flush()
    replica.kill()
    assert inspect_replica(replica.directory).size == 2 * SIZE
    replica.start()
    async with connect(replica.address) as client:
        reply = messages.decode((await client.open(2))[5], messages.OpenReply)
        assert reply.size == 2 * SIZE
        assert (await client.read(2 * SIZE - BLOCK, BLOCK))[5] == b"x" * BLOCK


async def test_only_the_owner_can_grow_it(replica: ReplicaProcess) -> None:
    async with connect(replica.address) as client, connect(replica.address) as stranger:
        await client.open(1)
        assert (await resize(stranger, 2 * SIZE))[1] == Status.NOT_OPEN
        assert (await client.status()).size == SIZE


async def test_without_room_it_keeps_its_size_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Growth) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        with monkeypatch.context() as patch:
            patch.setattr(Growth, "run", full)
            assert (await resize(client, 2 * SIZE))[1] == Status.NO_SPACE
        assert (await client.write(0, b"x" * BLOCK))[1] == Status.OK
        assert (await resize(client, 2 * SIZE))[1] == Status.OK
        assert (await client.read(2 * SIZE - BLOCK, BLOCK))[1] == Status.OK
