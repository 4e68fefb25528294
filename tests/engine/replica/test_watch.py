from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from engine.wire import messages
from engine.wire.frame import REPLY, Frame, FrameReader, FrameType, Status, encode_frame
from tests.engine.replica.client import Client, Closed, connect
from tests.engine.replica.inside import inside, until


def token(epoch: int, incarnation: int = 1) -> bytes:
    return messages.encode(messages.Token(epoch=epoch, incarnation=incarnation))


@asynccontextmanager
async def watching(address: str, epoch: int, incarnation: int = 1) -> AsyncIterator[Client]:
    async with connect(address) as watch:
        assert (await watch.call(FrameType.WATCH, token(epoch, incarnation)))[1] == Status.OK
        yield watch


async def test_a_watch_confirms_its_owner_until_there_is_another(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as old:
        await old.open(1)
        async with watching(replica.address, 1) as watch, connect(replica.address) as new:
            for _ in range(3):
                assert (await watch.call(FrameType.CONFIRM))[1] == Status.OK
                assert (await watch.call(FrameType.PING))[1] == Status.OK
            await new.open(2)
            stale = await watch.call(FrameType.CONFIRM)
            assert stale[1] == Status.STALE_EPOCH
            assert messages.decode_token(stale[5]) == (2, 1)
            assert (await watch.call(FrameType.PING))[1] == Status.OK
            async with watching(replica.address, 2) as next_watch:
                assert (await next_watch.call(FrameType.CONFIRM))[1] == Status.OK


async def test_what_a_watch_confirmed_counts_for_the_next_epoch(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica:
        async with connect(replica.address) as old, watching_of(replica.address, old) as watch:
            await trio.sleep(0.3)
            assert (await watch.call(FrameType.CONFIRM))[1] == Status.OK
        async with connect(replica.address) as new:
            reply = messages.decode((await new.open(2))[5], messages.OpenReply)
            assert reply.older_age is not None
            assert reply.older_age < 0.3


@asynccontextmanager
async def watching_of(address: str, owner: Client) -> AsyncIterator[Client]:
    await owner.open(1)
    async with watching(address, 1) as watch:
        yield watch


async def test_who_is_not_the_owner_gets_no_watch(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica:

        async def status(epoch: int, incarnation: int = 1) -> int:
            async with connect(replica.address) as stranger:
                answer = await stranger.call(FrameType.WATCH, token(epoch, incarnation))
                with pytest.raises(Closed):
                    await stranger.receive()
                return answer[1]

        assert await status(1) == Status.NOT_OPEN
        async with connect(replica.address) as owner:
            await owner.open(3, 2)
            assert await status(3) == Status.STALE_EPOCH
            assert await status(4) == Status.NOT_OPEN
            async with watching(replica.address, 3, 2):
                # one is enough
                assert await status(3, 2) == Status.NOT_OPEN
            await until(lambda: replica.server.watched is None)
            async with watching(replica.address, 3, 2):
                pass
            assert (await owner.call(FrameType.WATCH, token(3, 2)))[1] == Status.BAD_REQUEST


async def test_nothing_else_can_be_asked_there(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as owner:
        async with watching_of(replica.address, owner) as watch:
            with pytest.raises(Closed):
                await watch.call(FrameType.READ, offset=0, length=4096)
        async with connect(replica.address) as hasty:
            await hasty.stream.send_all(encode_frame(FrameType.WATCH, 1, token(1)) + encode_frame(FrameType.CONFIRM, 2))
            with pytest.raises(Closed):
                await hasty.receive()
        assert (await owner.call(FrameType.CONFIRM))[1] == Status.OK


class Stall:
    """Takes the place of fdatasync: asks on the watch what it is told while the disk is not ready."""

    def __init__(self, watch: Client) -> None:
        self.sock = watch.stream.socket
        self.answers: list[Frame] = []
        self.calls = 0
        self.error: OSError | None = None

    def __call__(self, fd: int) -> None:
        self.calls += 1
        if self.error is not None:
            raise self.error
        plain = socket.socket(fileno=os.dup(self.sock.fileno()))
        with plain:
            plain.setblocking(True)
            plain.settimeout(5)
            plain.sendall(encode_frame(FrameType.PING, 500) + encode_frame(FrameType.CONFIRM, 501))
            reader = FrameReader()
            while len(self.answers) < 2 * self.calls:
                reader.received(plain.recv_into(reader.space()))
                self.answers += reader.frames()
            plain.setblocking(False)


AHEAD = encode_frame(FrameType.FLUSH, 101, length=1)


async def test_it_answers_while_the_disk_holds_up_everything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with inside(tmp_path, aio=True) as replica, connect(replica.address) as owner:
        async with watching_of(replica.address, owner) as watch:
            stall = Stall(watch)
            monkeypatch.setattr(os, "fdatasync", stall)
            await owner.stream.send_all(AHEAD)
            assert (await owner.receive())[:3] == (FrameType.FLUSH | REPLY, Status.OK, 101)
            assert [answer[:3] for answer in stall.answers] == [
                (FrameType.PING | REPLY, Status.OK, 500),
                (FrameType.CONFIRM | REPLY, Status.OK, 501),
            ]
            # a flush with others behind it is the kernel's business
            assert (await owner.flush())[1] == Status.OK
            assert stall.calls == 1
        # and so is every flush when there is no watch any more
        await until(lambda: replica.server.watched is None)
        await owner.stream.send_all(AHEAD)
        assert (await owner.receive())[1] == Status.OK
        assert stall.calls == 1


async def test_a_sync_in_place_that_fails_is_the_end_of_the_replica(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with inside(tmp_path, aio=True) as replica, connect(replica.address) as owner:
        async with watching_of(replica.address, owner) as watch:
            stall = Stall(watch)
            stall.error = OSError(5, "Input/output error")
            monkeypatch.setattr(os, "fdatasync", stall)
            await owner.stream.send_all(AHEAD)
            assert (await owner.receive())[:2] == (FrameType.FLUSH | REPLY, Status.IO_ERROR)
        await until(lambda: replica.clean is False)
