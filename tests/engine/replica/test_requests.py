from __future__ import annotations

import socket
from pathlib import Path

import pytest
import trio

from engine.replica import direct, executor
from engine.store import Store
from engine.wire import messages
from engine.wire.frame import REPLY, FrameType, Status, decode_written, encode_frame
from tests.engine.replica.client import connect
from tests.engine.replica.conftest import ReplicaProcess
from tests.engine.replica.inside import SIZE, inside, until

MIB = 1 << 20


async def test_what_is_written_is_read_back(replica: ReplicaProcess) -> None:
    async with connect(replica.address) as client:
        assert client.replica == "r1"
        assert (await client.open(1))[1] == Status.OK
        assert (await client.write(8192, b"x" * 4096))[1] == Status.OK
        assert (await client.flush())[1] == Status.OK
        assert (await client.read(4096, 12288))[5] == bytes(4096) + b"x" * 4096 + bytes(4096)
        assert (await client.unmap(8192, 4096))[1] == Status.OK
        assert (await client.read(8192, 4096))[5] == bytes(4096)
        status = await client.status()
        assert (status.writes, status.flushes, status.unmaps, status.dirty_regions) == (1, 1, 1, 1)
        assert (status.reads, status.read_bytes, status.written_bytes) == (2, 16384, 4096)


async def test_open_tells_the_state_of_the_replica(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        reply = messages.decode((await client.open(3, 2))[5], messages.OpenReply)
        assert reply == messages.OpenReply(
            size=SIZE, region_size=MIB, dirty_regions=0, tracked=(), rebuilding=False, watch=True
        )
        assert (replica.store.token, replica.store.meta.dirty) == ((3, 2), True)
        assert (await client.open(3, 2, uuid="another"))[1] == Status.WRONG_VOLUME


@pytest.mark.parametrize("gathers", [True, False])
async def test_writes_that_come_together_are_answered_together_to_who_knows_it(tmp_path: Path, gathers: bool) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1, gathers=gathers)
        # their region's intent bit is set then
        await client.write(0, b"0", seq=9)
        ranges = {10: (4096, b"x"), 11: (8192, b"yy"), 12: (SIZE, b"out"), 13: (12288, b"zzz")}
        frames = [
            encode_frame(FrameType.WRITE, seq, data, offset=offset, length=len(data))
            for seq, (offset, data) in ranges.items()
        ]
        await client.stream.send_all(b"".join([*frames, encode_frame(FrameType.PING, 14)]))
        kinds: list[tuple[int, int]] = []
        done: set[int] = set()
        while len(done) < 5:
            kind, status, seq, _, length, payload = await client.receive()
            kinds.append((kind, status))
            if kind == FrameType.WRITTEN | REPLY:
                assert seq == decode_written(payload)[0]
                assert length == len(decode_written(payload))
                done |= set(decode_written(payload))
            else:
                done.add(seq)
        assert done == {*ranges, 14}
        write = FrameType.WRITE | REPLY
        alone = [kind for kind in kinds if kind == (write, 0)]
        others = [(write, 6), (FrameType.PING | REPLY, 0)]
        if gathers and replica.server.io == "direct":
            # together are those that the disk completes together
            of_writes = (write, 0), (FrameType.WRITTEN | REPLY, 0)
            assert sorted(kind for kind in kinds if kind not in of_writes) == sorted(others)
        elif gathers:
            assert sorted(kinds) == sorted([*others, (FrameType.WRITTEN | REPLY, 0)])
        else:
            assert sorted(kinds) == sorted([*alone, *others])
            assert len(alone) == 3
        assert (await client.read(4096, 3 * 4096))[5] == b"x".ljust(4096, b"\0") + b"yy".ljust(4096, b"\0") + (
            b"zzz".ljust(4096, b"\0")
        )
        status_now = await client.status()
        assert (status_now.writes, status_now.written_bytes) == (4, 7)


@pytest.mark.parametrize("kind", ["read", "write", "unmap"])
@pytest.mark.parametrize(
    ("offset", "length", "status"),
    [
        (SIZE, 4096, Status.OUT_OF_RANGE),
        (SIZE - 4096, 8192, Status.OUT_OF_RANGE),
        ((1 << 64) - 4096, 8192, Status.OUT_OF_RANGE),
        (0, 0, Status.BAD_REQUEST),
        (0, MIB + 1, Status.BAD_REQUEST),
        (0, (1 << 32) - 1, Status.OUT_OF_RANGE),
        (SIZE - 1, 1, Status.OK),
        (0, MIB, Status.OK),
    ],
)
async def test_ranges(tmp_path: Path, kind: str, offset: int, length: int, status: Status) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        payload = bytes(min(length, MIB + 4096)) if kind == "write" else b""
        if kind == "write" and length > len(payload):
            status = Status.OUT_OF_RANGE
        reply = await client.call(FrameType[kind.upper()], payload, offset=offset, length=length)
        assert reply[1] == status
        assert (await client.status()).dirty_regions == (status == Status.OK and kind != "read")


async def test_a_write_whose_length_is_not_its_payloads_is_refused(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        assert (await client.call(FrameType.WRITE, b"x" * 100, length=4096))[1] == Status.BAD_REQUEST
        assert (await client.call(FrameType.READ, b"x" * 100, length=100))[1] == Status.BAD_REQUEST


async def test_without_an_open_only_harmless_requests_are_served(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        assert (await client.call(FrameType.PING))[1] == Status.OK
        assert (await client.status()).replica == "r1"
        for kind in set(FrameType) - {
            FrameType.HELLO, FrameType.AUTH, FrameType.PING, FrameType.STATUS, FrameType.OPEN, FrameType.WATCH,
            FrameType.WRITTEN,
        }:  # fmt: skip
            payload = {
                FrameType.TRACK: messages.encode(messages.Track(names=())),
                FrameType.STATE: messages.encode(messages.State(rebuilding=True)),
            }.get(kind, b"")
            assert (await client.call(kind, payload, length=4096))[1] == Status.NOT_OPEN
        assert not replica.store.meta.rebuilding


async def test_maps_are_kept_for_departed_replicas(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        await client.write(2 * MIB, b"x", seq=1)
        assert (await client.track("r2"))[1] == Status.OK
        await client.write(5 * MIB - 1, b"xx", seq=2)
        assert (await client.track("r2", "r3"))[1] == Status.OK
        assert (await client.settled(10, inherited=True))[1] == Status.OK
        await client.unmap(9 * MIB, MIB)
        for name, first in (("", 0b00110100), ("r2", 0b00110100), ("r3", 0b00110100)):
            reply = await client.bitmap(name)
            assert (reply[4], reply[5]) == (8, bytes((first, 2, 0, 0, 0, 0, 0, 0)))
        assert (await client.bitmap("r3", offset=1, length=2))[3:] == (1, 8, b"\x02\0")
        assert (await client.bitmap("r3", offset=99))[3:] == (99, 8, b"")
        assert (await client.bitmap("r9"))[1] == Status.BAD_REQUEST
        for bad in ("", "../x", "a/b", "a\n", "x" * 64):
            assert (await client.track("r2", bad))[1] == Status.BAD_REQUEST
        assert (await client.status()).tracked == ("r2", "r3")
        assert (await client.track("r3"))[1] == Status.OK
        assert [path.name for path in (tmp_path / "r1").glob("changes-*")] == ["changes-r3.map"]


async def test_a_clean_close_leaves_nothing_dirty(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        await client.write(0, b"x" * 4096)
        assert (await client.call(FrameType.CLOSE))[1] == Status.OK
        assert replica.sync.finished == 1
        assert (replica.store.meta.dirty, replica.store.maps.dirty_regions) == (False, 0)
        assert (await client.read(0, 4096))[1] == Status.NOT_OPEN
        assert (await client.open(1))[1] == Status.OK
    store = Store.open(tmp_path / "r1")
    assert store.maps.dirty_regions == 0


async def test_a_close_keeps_what_an_earlier_crash_left_unequal(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica:
        async with connect(replica.address) as client:
            await client.open(1)
            await client.write(0, b"x" * 4096, seq=1)
        async with connect(replica.address) as client:
            reply = messages.decode((await client.open(2))[5], messages.OpenReply)
            assert reply.dirty_regions == 1
            await client.write(5 * MIB, b"x", seq=1)
            await client.call(FrameType.CLOSE)
            assert (replica.store.maps.dirty_regions, replica.store.meta.dirty) == (1, True)
            await client.open(2)
            await client.settled(0, inherited=True)
            await client.call(FrameType.CLOSE)
            assert (replica.store.maps.dirty_regions, replica.store.meta.dirty) == (0, False)


async def test_the_rebuilding_mark_survives(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        for mark in (True, False, True):
            await client.call(FrameType.STATE, messages.encode(messages.State(rebuilding=mark)))
            await client.call(FrameType.STATE, messages.encode(messages.State()))
            assert replica.store.meta.rebuilding is mark
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        assert messages.decode((await client.open(1))[5], messages.OpenReply).rebuilding


async def test_one_sync_of_the_maps_lets_all_waiting_writes_through(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        replica.map_gate.clear()
        await client.send(FrameType.WRITE, b"a" * 4096, offset=0, length=4096)
        await until(lambda: replica.map_syncs == 1)
        for number in range(1, 20):
            await client.send(FrameType.WRITE, b"b" * 4096, offset=number * 3 * MIB, length=4096)
        await client.send(FrameType.READ, offset=0, length=4096)
        assert (await client.receive())[5] == bytes(4096)
        replica.map_gate.set()
        assert {(await client.receive())[1] for _ in range(20)} == {Status.OK}
        assert replica.map_syncs == 2


async def test_a_sequential_writer_seldom_waits_for_the_maps(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        for number in range(64):
            assert (await client.write(number * MIB, b"x" * MIB))[1] == Status.OK
        assert replica.map_syncs < 10


async def test_a_reader_that_does_not_read_is_not_buffered_without_end(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        frames = b"".join(encode_frame(FrameType.READ, seq, offset=0, length=MIB) for seq in range(100))
        await client.stream.send_all(frames)
        await trio.sleep(0.2)
        serving = replica.server.owner
        assert serving is not None
        submitted = direct.LARGE_COUNT * MIB if replica.disk is not None else MIB
        assert serving._unsent <= executor.MAX_UNSENT + submitted + MIB
        async with connect(replica.address) as other:
            assert (await other.call(FrameType.PING))[1] == Status.OK
        replies = [(await client.receive())[:3] for _ in range(100)]
        assert sorted(replies) == [(FrameType.READ | REPLY, 0, seq) for seq in range(100)]


async def test_replies_survive_a_narrow_socket(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        serving = replica.server.owner
        assert serving is not None
        serving._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        await client.write(0, bytes(range(256)) * 4096)
        frames = b"".join(encode_frame(FrameType.READ, seq, offset=seq * 3, length=9999) for seq in range(2000))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.stream.send_all, frames)
            waiting = set(range(2000))
            while waiting:
                reply = await client.receive()
                seq = reply[2]
                waiting.remove(seq)
                assert reply[5] == (bytes(range(256)) * 41)[seq * 3 % 256 :][:9999]


async def test_tcp_works_as_well(tmp_path: Path, replica: ReplicaProcess) -> None:
    replica.terminate()
    over_tcp = ReplicaProcess(tmp_path, listen="tcp:127.0.0.1:0").start()
    try:
        assert not over_tcp.address.endswith(":0")
        async with connect(over_tcp.address) as client:
            await client.open(1)
            await client.write(4096, b"tcp!")
            assert (await client.read(4096, 4))[5] == b"tcp!"
    finally:
        over_tcp.kill()
