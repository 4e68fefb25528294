"""Past the page cache: the same promises while the disk is slow, full, broken, and asked for parts of blocks."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import pytest
import trio

from engine.launch import ReplicaConfig, replica_argv
from engine.replica import __main__ as program
from engine.replica import direct, offloop
from engine.replica.aio import PREAD, PWRITE
from engine.replica.offloop import open_ring
from engine.store import Store, create_replica
from engine.wire import messages
from engine.wire.frame import REPLY, FrameType, Status, encode_frame
from tests.engine.replica.client import KEY, UUID, Closed, connect
from tests.engine.replica.inside import Disk, Inside, inside, until

MIB = 1 << 20

pytestmark = pytest.mark.parametrize("tmp_path", ["direct"], indirect=True)


def disk_of(replica: Inside) -> Disk:
    assert replica.disk is not None
    return replica.disk


async def test_ping_is_answered_while_the_disk_is_slow(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        disk_of(replica).held = lambda opcode, offset: opcode == PREAD and offset == 0
        slow = await client.send(FrameType.READ, offset=0, length=4096)
        await until(lambda: disk_of(replica).waiting != [])
        assert (await client.call(FrameType.PING))[1] == Status.OK
        assert (await client.read(4096, 4096))[1] == Status.OK
        disk_of(replica).release()
        assert (await client.receive())[:3] == (FrameType.READ | REPLY, Status.OK, slow)


async def test_a_batch_is_one_submission(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        before = disk_of(replica).batches
        frames = [encode_frame(FrameType.READ, seq, offset=seq * 4096, length=4096) for seq in range(100)]
        await client.stream.send_all(b"".join(frames))
        assert {(await client.receive())[2] for _ in range(100)} == set(range(100))
        assert disk_of(replica).prepared == 100
        # every wake-up with completions submits too, mostly nothing
        assert disk_of(replica).batches - before < 60


async def test_a_flush_waits_for_the_writes_before_it_only(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        await client.write(0, bytes(65536))
        disk_of(replica).held = lambda opcode, offset: opcode == PWRITE and offset in (0, 8192)
        first = await client.send(FrameType.WRITE, b"a" * 4096, offset=0, length=4096)
        flush = await client.send(FrameType.FLUSH)
        await until(lambda: len(disk_of(replica).waiting) == 1)
        assert (await client.write(4096, b"b" * 4096))[1] == Status.OK
        assert replica.sync.started == 0
        late = await client.send(FrameType.WRITE, b"c" * 4096, offset=8192, length=4096)
        await until(lambda: len(disk_of(replica).waiting) == 2)
        disk_of(replica).held = lambda opcode, offset: offset == 8192
        disk_of(replica).look()
        assert [(await client.receive())[2] for _ in range(2)] == [first, flush]
        assert replica.sync.finished == 1
        disk_of(replica).release()
        assert (await client.receive())[2] == late


async def test_an_open_waits_for_what_the_disk_has_of_the_old_engine(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as old, connect(replica.address) as new:
        await old.open(1)
        await old.write(0, bytes(65536))
        disk_of(replica).held = lambda opcode, offset: True
        frames = [
            encode_frame(FrameType.WRITE, 100 + at, b"o" * 4096, offset=at * 4096, length=4096) for at in range(8)
        ]
        frames += [encode_frame(FrameType.READ, 108, offset=40960, length=4096)]
        frames += [encode_frame(FrameType.FLUSH, 109)]
        await old.stream.send_all(b"".join(frames))
        await until(lambda: len(disk_of(replica).waiting) == 9)
        opened = await new.send(FrameType.OPEN, _open(2))
        answers = [await old.receive() for _ in range(2)]  # the flush, and that it was deposed
        with trio.move_on_after(0.1) as early:
            await new.receive()
        assert early.cancelled_caught
        disk_of(replica).release()
        reply = await new.receive()
        assert reply[:3] == (FrameType.OPEN | REPLY, Status.OK, opened)
        answers += [await old.receive() for _ in range(9)]
        assert {answer[1] for answer in answers} == {Status.STALE_EPOCH}
        assert all(len(answer[5]) < 100 for answer in answers)
        assert replica.server.counters.reads == 0
        assert (await new.read(0, 32768))[5] == b"o" * 32768
        assert (await new.flush())[1] == Status.OK


def _open(epoch: int) -> bytes:
    return messages.encode(messages.Open(volume_uuid=UUID, epoch=epoch, incarnation=1))


async def test_an_engine_that_leaves_leaves_its_writes_to_be_waited_for(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as new:
        async with connect(replica.address) as old:
            await old.open(1)
            await old.write(0, bytes(4096))
            disk_of(replica).held = lambda opcode, offset: True
            await old.send(FrameType.WRITE, b"o" * 100, offset=50, length=100)
            await until(lambda: len(disk_of(replica).waiting) == 1)
        await until(lambda: replica.server.owner is None)
        await new.send(FrameType.OPEN, _open(2))
        await trio.sleep(0.05)
        assert replica.server.owner is None
        disk_of(replica).release()
        assert (await new.receive())[1] == Status.OK
        assert (await new.read(50, 100))[5] == b"o" * 100


@pytest.mark.parametrize("how", ["stop", "close"])
async def test_leaving_finishes_what_the_disk_has(tmp_path: Path, how: str) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        await client.write(0, bytes(4096))
        disk_of(replica).held = lambda opcode, offset: True
        write = await client.send(FrameType.WRITE, b"w" * 4096, offset=0, length=4096)
        await until(lambda: len(disk_of(replica).waiting) == 1)
        if how == "stop":
            replica.server.stop()
        else:
            await client.send(FrameType.CLOSE)
        await trio.sleep(0.05)
        assert replica.sync.started == 0
        disk_of(replica).release()
        assert (await client.receive())[:3] == (FrameType.WRITE | REPLY, Status.OK, write)
        await until(lambda: replica.sync.finished == 1)
        if how == "stop":
            await until(lambda: replica.clean is True)
        else:
            assert (await client.receive())[:2] == (FrameType.CLOSE | REPLY, Status.OK)


async def test_a_connection_waits_when_the_slots_are_taken(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        disk_of(replica).held = lambda opcode, offset: True
        count = 3 * direct.SMALL_COUNT
        frames = [encode_frame(FrameType.READ, seq, offset=seq * 4096, length=4096) for seq in range(count)]
        await client.stream.send_all(b"".join(frames))
        await until(lambda: len(disk_of(replica).waiting) == direct.SMALL_COUNT)
        async with connect(replica.address) as other:
            assert (await other.call(FrameType.PING))[1] == Status.OK
        assert disk_of(replica).prepared == direct.SMALL_COUNT
        disk_of(replica).release()
        assert {(await client.receive())[2] for _ in range(count)} == set(range(count))


async def test_more_writes_than_slots_wait_for_their_intents(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        replica.map_gate.clear()
        count = 2 * direct.SMALL_COUNT
        for number in range(count):
            block = number.to_bytes(2, "big") * 2048
            await client.send(FrameType.WRITE, block, offset=number * 4096, length=4096, seq=number)
        await client.send(FrameType.FLUSH, seq=count)
        await client.send(FrameType.PING, seq=count + 1)
        assert (await client.receive())[2] == count + 1
        assert disk_of(replica).prepared == 0
        replica.map_gate.set()
        order = [(await client.receive())[2] for _ in range(count + 1)]
        assert sorted(order) == list(range(count + 1))
        assert order[-1] == count
        assert replica.sync.finished == 1
        for number in range(count):
            assert (await client.read(number * 4096, 4096))[5] == number.to_bytes(2, "big") * 2048


async def test_writes_that_share_a_block_go_one_after_the_other(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        await client.write(0, b"." * 8192)
        before = disk_of(replica).prepared
        disk_of(replica).held = lambda opcode, offset: opcode == PREAD
        await client.send(FrameType.WRITE, b"a" * 1000, offset=3500, length=1000)
        await client.send(FrameType.WRITE, b"b" * 1000, offset=4500, length=1000)
        await client.send(FrameType.UNMAP, offset=1000, length=500)
        await until(lambda: len(disk_of(replica).waiting) == 1)
        assert disk_of(replica).prepared == before + 1
        disk_of(replica).release()
        assert {(await client.receive())[1] for _ in range(3)} == {Status.OK}
        expected = b"." * 1000 + bytes(500) + b"." * 2000 + b"a" * 1000 + b"b" * 1000 + b"." * 2692
        assert (await client.read(0, 8192))[5] == expected


@pytest.mark.parametrize(
    ("code", "status"),
    [(errno.EIO, Status.IO_ERROR), (errno.ENOSPC, Status.NO_SPACE), (errno.EINVAL, Status.IO_ERROR)],
)
async def test_an_error_of_the_disk_is_told_for_its_request_alone(tmp_path: Path, code: int, status: Status) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        await client.write(0, bytes(65536))
        disk_of(replica).errors = lambda opcode, offset: -code if offset == 8192 else 0
        for reply in (
            await client.write(8192, b"x" * 4096),
            await client.write(8193, b"x"),
            await client.read(8192, 4096),
            await client.read(9000, 1),
        ):
            assert (reply[1], reply[5][:7]) == (status, b"[Errno ")
        assert (await client.write(0, b"fine" * 1024))[1] == Status.OK
        disk_of(replica).errors = lambda opcode, offset: 0
        assert (await client.write(8193, b"good"))[1] == Status.OK
        assert (await client.read(8193, 4))[5] == b"good"
        assert (await client.flush())[1] == Status.OK
        assert replica.server.direct is not None
        assert replica.server.direct.idle


async def test_short_transfers_go_on_where_they_stopped(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        await client.write(0, bytes(65536))
        disk_of(replica).errors = lambda opcode, offset: 4096
        data = random.Random(1).randbytes(40960)
        assert (await client.write(4096, data))[1] == Status.OK
        assert (await client.read(4096, 40960))[5] == data
        assert (await client.write(5000, b"!" * 10000))[1] == Status.OK
        disk_of(replica).errors = lambda opcode, offset: 0
        assert (await client.read(4096, 40960))[5] == data[:904] + b"!" * 10000 + data[10904:]
        disk_of(replica).errors = lambda opcode, offset: 512
        assert (await client.read(4096, 8192))[1] == Status.IO_ERROR


async def test_a_disk_that_does_not_know_nowait_is_used_without(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        codes = [-errno.EOPNOTSUPP, -errno.EAGAIN]
        disk_of(replica).errors = lambda opcode, offset: codes.pop(0) if codes else 0
        assert (await client.write(0, b"x" * 4096))[1] == Status.OK
        assert (await client.read(0, 4096))[5] == b"x" * 4096
        assert replica.server.direct is not None
        assert replica.server.direct._flags == 0


async def test_a_failed_sync_answers_what_waits_for_the_disk(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        await client.write(0, bytes(8192))
        replica.sync.error = OSError(5, "Input/output error")
        replica.sync.gate.clear()
        await client.send(FrameType.FLUSH, seq=50)
        await until(lambda: replica.sync.started == 1)
        disk_of(replica).held = lambda opcode, offset: True
        await client.send(FrameType.WRITE, b"w" * 4096, offset=0, length=4096, seq=51)
        await client.send(FrameType.FLUSH, seq=52)
        await until(lambda: len(disk_of(replica).waiting) == 1)
        replica.sync.gate.set()
        got = {}
        with pytest.raises(Closed):
            while True:
                reply = await client.receive()
                got[reply[2]] = reply[1]
        assert got.keys() >= {50, 52}
        assert set(got.values()) == {Status.IO_ERROR}
        await until(lambda: replica.clean is False)
        assert replica.sync.started == 1


def test_where_it_does_not_work_the_page_cache_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_replica(tmp_path / "r1", volume="vol1", uuid=UUID, replica="r1", size=MIB)
    monkeypatch.setattr("engine.store.direct._alignments", lambda fd: (0, 0))
    store = Store.open(tmp_path / "r1", "auto")
    assert store.direct == -1
    assert open_ring(store, "auto") is None
    store.close()
    monkeypatch.undo()
    store = Store.open(tmp_path / "r1")
    assert store.direct == -1
    store.close()

    def refused(depth: int) -> None:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(offloop, "Ring", refused)
    store = Store.open(tmp_path / "r1", "auto")
    assert store.direct >= 0
    assert open_ring(store, "auto") is None
    store.close()
    config = ReplicaConfig(
        directory=str(tmp_path / "r1"), listen=f"unix:{tmp_path}/s", secret_file=str(tmp_path / "secret"), io="direct"
    )
    (tmp_path / "secret").write_text(KEY.hex())
    assert program.main(replica_argv(config, tmp_path / "c.json")[-1:]) == 2


def test_a_chain_is_read_through_the_page_cache(tmp_path: Path) -> None:
    create_replica(tmp_path / "r1", volume="vol1", uuid=UUID, replica="r1", size=MIB)
    store = Store.open(tmp_path / "r1", "auto")
    assert store.direct >= 0
    store.close()
    snapshot, head = tmp_path / "r1" / "volume-snap-a.img", tmp_path / "r1" / "volume-head-000.img"
    snapshot.write_bytes(b"s" * MIB)
    Path(f"{snapshot}.meta").write_text('{"Name":"volume-snap-a.img","Parent":""}')
    Path(f"{head}.meta").write_text('{"Name":"volume-head-000.img","Parent":"volume-snap-a.img"}')
    store = Store.open(tmp_path / "r1", "direct")
    assert store.direct == -1
    assert store.read(0, 4096) == b"s" * 4096
    store.close()
