from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
import trio

from engine.errors import EngineError
from engine.store import Store
from engine.wire import messages
from engine.wire.frame import REPLY, FrameType, Status
from tests.engine.replica.client import UUID, Client, Closed, connect
from tests.engine.replica.conftest import ReplicaProcess
from tests.engine.replica.inside import inside, until

MIB = 1 << 20


async def is_told(old: Client, highest: tuple[int, int]) -> None:
    """A deposed engine hears it unasked."""
    kind, status, seq, _, _, payload = await old.receive()
    assert (kind, status, seq) == (FrameType.OPEN | REPLY, Status.STALE_EPOCH, 0)
    assert messages.decode_token(payload) == highest


async def test_a_lower_token_is_refused_and_told_the_highest(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        assert (await client.open(5, 2))[1] == Status.OK
        async with connect(replica.address) as old:
            for token in ((5, 1), (4, 9)):
                reply = await old.open(*token)
                assert reply[1] == Status.STALE_EPOCH
                assert messages.decode_token(reply[5]) == (5, 2)
            assert (await old.read(0, 4096))[1] == Status.NOT_OPEN
        assert (await client.read(0, 4096))[1] == Status.OK


@pytest.mark.parametrize("token", [(2, 1), (1, 2), (1, 1)])
async def test_a_later_open_takes_over(tmp_path: Path, token: tuple[int, int]) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as old:
        await old.open(1, 1)
        await old.write(0, b"old!")
        async with connect(replica.address) as new:
            assert (await new.open(*token))[1] == Status.OK
            with trio.fail_after(5):
                if token == (1, 1):
                    with pytest.raises(Closed):
                        await old.write(0, b"late")
                else:
                    await is_told(old, token)
                    assert (await old.write(0, b"late"))[1] == Status.STALE_EPOCH
                    assert (await old.open(1, 1))[1] == Status.STALE_EPOCH
            assert (await new.read(0, 4))[5] == b"old!"
        async with connect(replica.address) as again:
            expected = Status.OK if token == (1, 1) else Status.STALE_EPOCH
            assert (await again.open(1, 1))[1] == expected


async def test_the_highest_token_survives_a_kill(replica: ReplicaProcess) -> None:
    async with connect(replica.address) as client:
        await client.open(9, 4)
    replica.kill()
    replica.start()
    async with connect(replica.address) as client:
        assert (await client.status()).epoch == 9
        assert (await client.open(9, 3))[1] == Status.STALE_EPOCH
        assert (await client.open(9, 4))[1] == Status.OK


async def test_parked_writes_of_an_old_engine_are_discarded(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as old, connect(replica.address) as new:
        await old.open(1)
        replica.map_gate.clear()
        await old.send(FrameType.WRITE, b"stale" * 100, offset=0, length=500)
        await until(lambda: replica.map_syncs == 1)
        await old.send(FrameType.WRITE, b"stale" * 100, offset=8 * MIB, length=500)
        await old.send(FrameType.FLUSH)
        await until(lambda: len(replica.server.gate._waiting) == 2)
        assert (await new.open(2))[1] == Status.OK
        replica.map_gate.set()
        assert {(await old.receive())[1] for _ in range(3)} == {Status.STALE_EPOCH}
        await is_told(old, (2, 1))
        assert (await new.flush())[1] == Status.OK
        assert (await new.read(0, 500))[5] == (await new.read(8 * MIB, 500))[5] == bytes(500)
        # the bits stay: what was applied of the old engine is for the new one to find out
        assert (await new.bitmap())[5][:2] == b"\1\1"
        assert (await new.write(8 * MIB, b"new"))[1] == Status.OK


async def test_an_open_that_cannot_be_recorded_still_fences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as old, connect(replica.address) as new:
        await old.open(1)

        def fail(epoch: int, incarnation: int) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(replica.store, "set_token", fail)
        assert (await new.open(2))[1] == Status.IO_ERROR
        assert (await new.write(0, b"x"))[1] == Status.NOT_OPEN
        await is_told(old, (2, 1))
        assert (await old.write(0, b"x"))[1] == Status.STALE_EPOCH
        monkeypatch.undo()
        assert (await new.open(2))[1] == Status.OK


async def test_of_concurrent_opens_the_highest_wins(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica:
        winners: list[int] = []

        async def write(client: Client, data: bytes) -> int:
            seq = await client.send(FrameType.WRITE, data, length=len(data))
            reply = await client.receive()
            if reply[2] == 0:
                # deposed meanwhile, and told so before its request was looked at
                assert reply[:2] == (FrameType.OPEN | REPLY, Status.STALE_EPOCH)
            else:
                assert (reply[0], reply[2]) == (FrameType.WRITE | REPLY, seq)
            return reply[1]

        async def claim(epoch: int) -> None:
            try:
                async with connect(replica.address) as client:
                    if (await client.open(epoch))[1] == Status.OK and await write(client, b"x") == Status.OK:
                        await trio.sleep(0.3)
                        if await write(client, b"%02d" % epoch) == Status.OK:
                            winners.append(epoch)
            except Closed:
                pass

        async with trio.open_nursery() as nursery:
            for epoch in (3, 9, 1, 7, 10, 2, 8, 4, 6, 5):
                nursery.start_soon(claim, epoch)
        assert winners == [10]
        assert replica.store.token == (10, 1)


async def test_no_write_of_an_old_engine_lands_after_the_new_ones_open(tmp_path: Path) -> None:
    """Each engine in turn writes its number all over, at depth, while its successors open."""
    async with inside(tmp_path) as replica:

        async def pump(client: Client, epoch: int) -> None:
            try:
                for turn in itertools.count():
                    await client.send(FrameType.WRITE, bytes((epoch,)) * 4096, offset=turn * 37 % 64 * MIB, length=4096)
            except Closed:
                pass

        async def engine(epoch: int, successor: trio.Event) -> None:
            async with connect(replica.address) as client, trio.open_nursery() as nursery:
                assert (await client.open(epoch))[1] == Status.OK
                before = [(await client.read(at * MIB, 1))[5][0] for at in range(64)]
                assert max(before) < epoch
                nursery.start_soon(pump, client, epoch)
                good = 0
                while (await client.receive())[1] == Status.OK:
                    good += 1
                    if good == 200:
                        successor.set()
                assert good >= 200
                for _ in range(100):
                    assert (await client.receive())[1] == Status.STALE_EPOCH
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for epoch in range(1, 8):
                successor = trio.Event()
                nursery.start_soon(engine, epoch, successor)
                await successor.wait()
            async with connect(replica.address) as last:
                await last.open(8)
                contents = [(await last.read(at * MIB, 4096))[5] for at in range(64)]
                await trio.sleep(0.1)
                assert contents == [(await last.read(at * MIB, 4096))[5] for at in range(64)]
                assert all(len(set(block)) == 1 for block in contents)


async def test_two_servers_cannot_serve_one_directory(replica: ReplicaProcess, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="another process is using it"):
        Store.open(replica.directory)
    (tmp_path / "second").mkdir()
    second = ReplicaProcess(tmp_path / "second", directory=replica.directory)
    with pytest.raises(AssertionError):
        second.start()
    assert second.process is not None
    assert second.process.wait(5) == 2
    assert second.process.stdout is not None
    second.process.stdout.close()
    assert "another process is using it" in second.log
    assert os.path.exists(replica.address.removeprefix("unix:"))
    async with connect(replica.address) as client:
        assert (await client.open(1, uuid=UUID))[1] == Status.OK
