from __future__ import annotations

from pathlib import Path

import trio

from engine.wire import messages
from engine.wire.frame import REPLY, FrameType, Status, encode_frame
from tests.engine.replica.client import Client, connect
from tests.engine.replica.conftest import ReplicaProcess
from tests.engine.replica.inside import inside, until


async def opened(client: Client, epoch: int, incarnation: int = 1) -> float | None:
    """For how long an older epoch has not been confirmed."""
    reply = await client.open(epoch, incarnation)
    assert reply[1] == Status.OK
    return messages.decode(reply[5], messages.OpenReply).older_age


async def close(client: Client, *, kept: bool) -> None:
    body = messages.encode(messages.Close(kept=kept))
    assert (await client.call(FrameType.CLOSE, body))[1] == Status.OK


async def test_only_the_owner_is_confirmed(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as old, connect(replica.address) as new:
        assert (await old.call(FrameType.CONFIRM))[1] == Status.NOT_OPEN
        await opened(old, 1)
        assert (await old.call(FrameType.CONFIRM))[1] == Status.OK
        await opened(new, 2)
        await old.receive()
        assert (await old.call(FrameType.CONFIRM))[1] == Status.STALE_EPOCH
        assert (await new.call(FrameType.CONFIRM))[1] == Status.OK


async def test_a_confirmation_does_not_wait_for_a_flush_that_came_with_it(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        replica.sync.gate.clear()
        confirm, ahead = encode_frame(FrameType.CONFIRM, 100), encode_frame(FrameType.FLUSH, 101, length=1)
        await client.stream.send_all(confirm + ahead)
        await until(lambda: replica.sync.started == 1)
        assert (await client.receive())[:3] == (FrameType.CONFIRM | REPLY, Status.OK, 100)
        replica.sync.gate.set()
        assert (await client.receive())[2] == 101
        replica.sync.gate.clear()
        await client.stream.send_all(ahead + confirm)
        assert (await client.receive())[2] == 100
        replica.sync.gate.set()
        assert (await client.receive())[2] == 101


async def test_an_open_tells_when_an_older_epoch_was_confirmed(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica:
        async with connect(replica.address) as one:
            assert await opened(one, 1) is None
            await trio.sleep(0.3)
            for kind in (FrameType.CONFIRM, FrameType.FLUSH):
                assert (await one.call(kind))[1] == Status.OK
        async with connect(replica.address) as again:
            # of the same attachment
            assert await opened(again, 1, 2) is None
        async with connect(replica.address) as two:
            await trio.sleep(0.1)
            age = await opened(two, 2)
            assert age is not None
            assert 0.1 <= age < 0.3


async def test_who_leaves_in_order_leaves_no_right_behind(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica:
        async with connect(replica.address) as one:
            await opened(one, 1)
            await close(one, kept=False)
        async with connect(replica.address) as two:
            assert await opened(two, 2) is None
            await close(two, kept=True)
        async with connect(replica.address) as three:
            assert await opened(three, 3) is not None
            # as earlier releases do it
            assert (await three.call(FrameType.CLOSE))[1] == Status.OK
        async with connect(replica.address) as four:
            # 3 did not serve, for all that is known
            assert await opened(four, 4) is not None


async def test_a_restarted_replica_counts_from_its_start(replica: ReplicaProcess) -> None:
    async with connect(replica.address) as client:
        assert await opened(client, 1) is None
        await close(client, kept=True)
    replica.kill()
    replica.start()
    async with connect(replica.address) as client:
        age = await opened(client, 2)
        assert age is not None
        assert age < 10
        await close(client, kept=False)
    replica.kill()
    replica.start()
    async with connect(replica.address) as client:
        assert await opened(client, 3) is None
