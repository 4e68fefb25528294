from __future__ import annotations

import contextlib
from pathlib import Path

import trio

from engine.wire.frame import REPLY, FrameType, Status, encode_frame
from tests.engine.replica.client import Closed, connect
from tests.engine.replica.inside import inside, until

MIB = 1 << 20


async def test_waiting_flushes_share_one_fdatasync_that_starts_after_them(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        replica.sync.gate.clear()
        await client.send(FrameType.FLUSH)
        await until(lambda: replica.sync.started == 1)
        for _ in range(10):
            await client.send(FrameType.FLUSH)
        await client.call(FrameType.PING)  # the loop is not blocked meanwhile
        replica.sync.gate.set()
        for _ in range(11):
            assert (await client.receive())[:2] == (FrameType.FLUSH | REPLY, Status.OK)
        assert replica.sync.finished == 2
        assert (await client.status()).flushes == 11


async def test_each_flush_is_one_fdatasync(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        for number in range(1, 6):
            await client.write(0, b"x")
            await client.flush()
            assert replica.sync.finished == number
        # a workload that comes back to its regions pays for their bits once
        assert replica.map_syncs == 1


async def test_a_flush_covers_writes_that_wait_for_their_intents(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        replica.map_gate.clear()
        first = await client.send(FrameType.WRITE, b"x" * 4096, offset=0, length=4096)
        first_flush = await client.send(FrameType.FLUSH)
        await until(lambda: replica.map_syncs == 1)
        second = await client.send(FrameType.WRITE, b"y" * 4096, offset=8 * MIB, length=4096)
        second_flush = await client.send(FrameType.FLUSH)
        await client.call(FrameType.PING)
        assert replica.sync.started == 0
        replica.map_gate.set()
        order = [(await client.receive())[2] for _ in range(4)]
        assert order.index(first) < order.index(first_flush)
        assert order.index(second) < order.index(second_flush)


async def test_a_write_is_answered_with_the_flush_that_was_asked_for_with_it(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        await client.write(0, b"the intent bit is there")
        replica.sync.gate.clear()
        both = encode_frame(FrameType.WRITE, 100, b"x" * 4096, offset=4096, length=4096)
        await client.stream.send_all(both + encode_frame(FrameType.FLUSH, 101, length=1))
        await until(lambda: replica.sync.started == 1)
        with trio.move_on_after(0.05) as waited:
            await client.receive()
        assert waited.cancelled_caught
        # what else is asked for takes its answer along, or a slow disk would look like a dead replica
        await client.send(FrameType.PING, seq=102)
        assert [(await client.receive())[2] for _ in range(2)] == [100, 102]
        replica.sync.gate.set()
        assert (await client.receive())[:3] == (FrameType.FLUSH | REPLY, Status.OK, 101)


async def test_a_flush_that_fails_holds_no_answer_back(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        replica.sync.error = OSError(5, "Input/output error")
        both = encode_frame(FrameType.WRITE, 100, b"x" * 4096, offset=4096, length=4096)
        await client.stream.send_all(both + encode_frame(FrameType.FLUSH, 101, length=1))
        assert (await client.receive())[1:3] == (Status.OK, 100)
        assert (await client.receive())[1:3] == (Status.IO_ERROR, 101)


async def test_a_failed_fdatasync_is_never_retried(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        await client.write(0, b"x")
        replica.sync.error = OSError(5, "Input/output error")
        replica.sync.gate.clear()
        await client.send(FrameType.FLUSH)
        await until(lambda: replica.sync.started == 1)
        await client.send(FrameType.FLUSH)
        await client.call(FrameType.PING)
        replica.sync.gate.set()
        for _ in range(2):
            reply = await client.receive()
            assert (reply[0], reply[1]) == (FrameType.FLUSH | REPLY, Status.IO_ERROR)
            assert b"fdatasync failed" in reply[5]
        with contextlib.suppress(Closed):
            assert (await client.read(0, 1))[1] == Status.IO_ERROR
        await until(lambda: replica.clean is not None)
        assert replica.clean is False
        assert replica.sync.started == 1


async def test_a_failed_sync_of_the_maps_fails_the_replica(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        begin = replica.store.maps.begin

        def broken() -> object:
            sync = begin()

            def fail() -> None:
                raise OSError(5, "Input/output error")

            sync.run = fail  # type: ignore[method-assign]
            return sync

        replica.store.maps.begin = broken  # type: ignore[method-assign, assignment]
        reply = await client.write(0, b"x")
        assert (reply[1], reply[5][:25]) == (Status.IO_ERROR, b"cannot write a region map")
        await until(lambda: replica.clean is False)
        assert replica.store.read(0, 1) == b"\0"


async def test_stopping_finishes_what_was_submitted(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        replica.map_gate.clear()
        await client.send(FrameType.WRITE, b"x" * 4096, offset=0, length=4096)
        await client.send(FrameType.FLUSH)
        await until(lambda: replica.map_syncs == 1)
        await client.call(FrameType.PING)
        replica.server.stop()
        await trio.sleep(0.05)
        assert replica.clean is None
        replica.map_gate.set()
        assert [(await client.receive())[1] for _ in range(2)] == [Status.OK, Status.OK]
        await until(lambda: replica.clean is True)
        assert replica.sync.finished == 2
        assert replica.store.read(0, 4096) == b"x" * 4096
        assert replica.store.meta.dirty


async def test_a_sync_that_fails_while_stopping_is_a_failure(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        replica.sync.error = OSError(5, "Input/output error")
        replica.sync.gate.clear()
        await client.send(FrameType.FLUSH)
        await until(lambda: replica.sync.started == 1)
        replica.server.stop()
        await trio.sleep(0.02)
        replica.sync.gate.set()
        assert (await client.receive())[1] == Status.IO_ERROR
        await until(lambda: replica.clean is False)
