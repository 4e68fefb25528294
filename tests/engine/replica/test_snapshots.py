from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import msgspec
import pytest
import trio

from engine.replica.backlog import MAX_BACKGROUND
from engine.store import chain, coalesce, layout, switch
from engine.wire import messages
from engine.wire.frame import REPLY, Frame, FrameType, Status, encode_frame
from tests.engine.replica.client import Client, Closed, connect
from tests.engine.replica.inside import SIZE, inside, io_of, until

MIB = 1 << 20
WHEN = "2024-05-06T07:08:09Z"


def named(name: str) -> bytes:
    return messages.encode(messages.Snapshot(name=name, created=WHEN))


def reading(name: str) -> bytes:
    return messages.encode(messages.ReadSnapshot(name=name))


async def snapshot(client: Client, name: str) -> Frame:
    return await client.call(FrameType.SNAPSHOT, named(name))


async def remove(client: Client, name: str) -> Frame:
    return await client.call(FrameType.REMOVE_SNAPSHOT, messages.encode(messages.RemoveSnapshot(name=name)))


async def revert(client: Client, name: str) -> Frame:
    return await client.call(FrameType.REVERT, messages.encode(messages.Revert(name=name, created=WHEN)))


async def look(client: Client, name: str, offset: int, length: int) -> Frame:
    return await client.call(FrameType.READ_SNAPSHOT, reading(name), offset=offset, length=length)


async def step(client: Client, name: str, budget: int = MIB) -> Frame:
    return await client.call(FrameType.COALESCE, messages.encode(messages.Coalesce(name=name, budget=budget)))


async def listed(client: Client) -> dict[str, messages.SnapshotEntry]:
    reply = await client.call(FrameType.SNAPSHOTS)
    assert reply[1] == Status.OK
    return {entry.name: entry for entry in messages.decode(reply[5], messages.SnapshotsReply).snapshots}


async def test_a_snapshot_is_made_read_reverted_to_and_merged_away(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        for name in ("a", "b", "c"):
            await client.write(0, name.encode() * MIB)
            if name == "b":
                await client.write(MIB, b"b" * MIB)
            assert (await snapshot(client, name))[1] == Status.OK
        assert (await look(client, "a", MIB - 1, 2))[3:] == (MIB - 1, 2, b"a\0")
        assert (await client.read(0, 1))[5] == b"c"
        assert (await revert(client, "a"))[1] == Status.OK
        assert (await client.read(MIB - 1, 2))[5] == b"a\0"
        assert (await revert(client, "c"))[1] == Status.OK
        assert (await remove(client, "a"))[1] == Status.OK
        reply = messages.decode((await step(client, "a", MIB))[5], messages.CoalesceReply)
        assert reply == messages.CoalesceReply(done=False, copied=MIB, left=2 * MIB)
        while not messages.decode((await step(client, "a"))[5], messages.CoalesceReply).done:
            assert (await client.read(MIB, 1))[5] == b"b"
        found = await listed(client)
        assert list(found) == ["b", "c"]
        assert found["b"] == messages.SnapshotEntry(
            name="b", parent="", created=WHEN, user_created=True, removed=False, live=True, children=1, size=SIZE,
            allocated=2 * MIB,
        )  # fmt: skip
        assert (await client.read(0, 1))[5] == b"c"


@pytest.mark.parametrize(
    ("kind", "payload", "status", "text"),
    [
        (FrameType.SNAPSHOT, named("a"), Status.EXISTS, b"snapshot 'a' exists already"),
        (FrameType.SNAPSHOT, named("../a"), Status.BAD_REQUEST, b"cannot be the name of a snapshot"),
        (FrameType.REVERT, messages.encode(messages.Revert(name="z", created=WHEN)), Status.NOT_FOUND, b"'z'"),
        (FrameType.REMOVE_SNAPSHOT, messages.encode(messages.RemoveSnapshot(name="z")), Status.NOT_FOUND, b"'z'"),
        (FrameType.COALESCE, messages.encode(messages.Coalesce(name="a", budget=1)), Status.IN_USE, b"not marked"),
        (FrameType.READ_SNAPSHOT, reading("z"), Status.NOT_FOUND, b"no snapshot 'z'"),
    ],
)
async def test_what_cannot_be_done_is_said(
    tmp_path: Path, kind: FrameType, payload: bytes, status: Status, text: bytes
) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        await snapshot(client, "a")
        reply = await client.call(kind, payload, length=1)
        assert reply[1] == status
        assert text in reply[5]
        for offset, length, wrong in ((SIZE, 1, Status.OUT_OF_RANGE), (0, 0, Status.BAD_REQUEST)):
            assert (await look(client, "a", offset, length))[1] == wrong
        assert (await client.read(0, 1))[1] == Status.OK


@pytest.mark.parametrize(
    "kind", [kind for kind in FrameType if kind >= 20 and kind not in (FrameType.SNAPSHOTS, FrameType.CONFIRM)]
)
async def test_a_malformed_request_closes_the_connection(tmp_path: Path, kind: FrameType) -> None:
    async with inside(tmp_path) as replica:
        async with connect(replica.address) as client:
            await client.open(1)
            await client.send(kind, b"\xc1", length=1)
            with pytest.raises(Closed):
                await client.receive()
        async with connect(replica.address) as client:
            assert (await client.open(1))[1] == Status.OK


async def test_a_snapshot_holds_what_came_before_and_nothing_that_came_after(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        replica.map_gate.clear()
        batch = b"".join(
            (
                encode_frame(FrameType.WRITE, 1, b"before", offset=0, length=6),
                encode_frame(FrameType.FLUSH, 2),
                encode_frame(FrameType.WRITE, 3, b"before", offset=9 * MIB, length=6),
                encode_frame(FrameType.SNAPSHOT, 4, named("a")),
                encode_frame(FrameType.WRITE, 5, b"behind", offset=0, length=6),
                encode_frame(FrameType.WRITE, 6, b"behind", offset=30 * MIB, length=6),
                encode_frame(FrameType.READ_SNAPSHOT, 7, reading("a"), offset=0, length=6),
            )
        )
        await client.stream.send_all(batch)
        await until(lambda: replica.map_syncs == 1)
        async with connect(replica.address) as other:  # the loop is not blocked meanwhile
            assert (await other.call(FrameType.PING))[1] == Status.OK
        assert replica.store.list_snapshots() == []
        replica.map_gate.set()
        replies = {reply[2]: reply for reply in [await client.receive() for _ in range(7)]}
        assert {reply[1] for reply in replies.values()} == {Status.OK}
        assert replies[7][5] == b"before"
        assert (await look(client, "a", 9 * MIB, 6))[5] == b"before"
        assert (await look(client, "a", 30 * MIB, 6))[5] == bytes(6)
        assert (await client.read(0, 6))[5] == b"behind"
        assert replica.sync.finished == 2


def past_the_cache(base: Path) -> list[str]:
    """Files below that this process has open with O_DIRECT."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            name = os.readlink(f"/proc/self/fd/{fd}")
            if name.startswith(str(base)) and fcntl.fcntl(int(fd), fcntl.F_GETFL) & os.O_DIRECT:
                found.append(name)
        except OSError:  # the one of the listing, or closed meanwhile
            continue
    return found


@pytest.mark.parametrize("tmp_path", ["disk", "direct"], indirect=True)
async def test_a_snapshot_under_writes_ends_what_goes_past_the_page_cache(tmp_path: Path) -> None:
    count, unit, cold = 100, 16384, 40 * MIB
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        server, store, disk = replica.server, replica.store, replica.disk
        assert disk is not None
        await client.open(1)
        assert server.io == io_of(tmp_path)
        assert past_the_cache(tmp_path) == [str(tmp_path / "r1" / "volume-head-000.img")]
        model = bytearray(b"." * 2 * MIB)
        await client.write(0, bytes(model[:MIB]))
        await client.write(MIB, bytes(model[MIB:]))

        def writes(first: int, letter: bytes) -> list[bytes]:
            frames = []
            for number in range(count):
                # every other one of whole blocks
                offset, length = number * unit + number % 2 * 100, 8192 - number % 2 * 3192
                frames.append(
                    encode_frame(FrameType.WRITE, first + number, letter * length, offset=offset, length=length)
                )
                model[offset : offset + length] = letter * length
            return frames

        disk.held = lambda opcode, offset: True
        frames = [encode_frame(FrameType.READ, 900, offset=cold, length=4096), *writes(1000, b"b")]
        frames += [encode_frame(FrameType.UNMAP, 901, offset=12288, length=4096)]
        model[12288:16384] = bytes(4096)
        frames += [encode_frame(FrameType.WRITE, 902, b"parked", offset=9 * MIB, length=6)]
        before = bytes(model)
        frames += [encode_frame(FrameType.SNAPSHOT, 2000, named("a")), *writes(3000, b"a")]
        frames += [encode_frame(FrameType.WRITE, 3900, b"behind", offset=9 * MIB, length=6)]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.stream.send_all, b"".join(frames))
            await until(lambda: len(disk.waiting) >= (1 if store.cache is not None else count + 1))
            await trio.sleep(0.05)
            assert (store.direct >= 0, replica.sync.started, len(store.chain)) == (True, 0, 1)
            disk.release()
            replies = [await client.receive() for _ in frames]
        assert {reply[1] for reply in replies} == {Status.OK}
        order = [reply[2] for reply in replies]
        assert {*order[: count + 3]} == {900, 901, 902, *range(1000, 1000 + count)}
        assert order[count + 3] == 2000

        for switched in (False, True):
            if switched:
                assert (await revert(client, "a"))[1] == Status.OK
                model[:] = before
            assert (store.direct, store.cache, server.io) == (-1, None, "buffered")
            assert past_the_cache(tmp_path) == []
            prepared = disk.prepared
            assert (await client.write(5000, b"new"))[1] == Status.OK
            model[5000:5003] = b"new"
            assert (await client.unmap(2 * MIB - 4096, 4096))[1] == Status.OK
            model[-4096:] = bytes(4096)
            assert (await client.read(0, MIB))[5] + (await client.read(MIB, MIB))[5] == model
            assert (await client.read(9 * MIB, 6))[5] == (b"parked" if switched else b"behind")
            assert (await client.read(cold, 4096))[5] == bytes(4096)
            assert (await look(client, "a", 0, MIB))[5] + (await look(client, "a", MIB, MIB))[5] == before
            assert (await look(client, "a", 9 * MIB, 6))[5] == b"parked"
            assert (await client.flush())[1] == Status.OK
            assert disk.prepared == prepared
        await client.call(FrameType.CLOSE)
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        assert (replica.store.direct, replica.store.cache, replica.server.io) == (-1, None, "buffered")
        assert past_the_cache(tmp_path) == []
        assert (await client.read(0, MIB))[5] + (await client.read(MIB, MIB))[5] == model


async def test_data_waits_for_a_snapshot_and_not_for_a_coalesce(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        await snapshot(client, "a")
        await client.write(0, b"x" * MIB)
        replica.sync.gate.clear()
        number = await client.send(FrameType.SNAPSHOT, named("b"))
        await client.send(FrameType.READ, offset=0, length=1)
        await until(lambda: replica.sync.started == 2)
        await trio.sleep(0.02)
        replica.sync.gate.set()
        assert (await client.receive())[2] == number
        assert (await client.receive())[5] == b"x"

        await remove(client, "a")
        gate = replica.map_gate
        gate.clear()
        inner = chain.pwrite_all

        def held(fd: int, data: bytes, offset: int) -> None:
            assert gate.wait(10)
            inner(fd, data, offset)

        monkeypatch.setattr(coalesce, "pwrite_all", held)
        wanted = messages.encode(messages.Coalesce(name="a", budget=16 * MIB))
        merging = await client.send(FrameType.COALESCE, wanted)
        assert (await client.read(0, 1))[5] == b"x"
        assert (await client.write(1, b"y"))[1] == Status.OK
        assert (await client.flush())[1] == Status.OK
        assert (await look(client, "b", 0, 2))[5] == b"xx"
        gate.set()
        reply = await client.receive()
        assert (reply[2], messages.decode(reply[5], messages.CoalesceReply).done) == (merging, True)
        assert (await client.read(0, 3))[5] == b"xyx"


async def test_a_new_owner_comes_after_the_snapshot_of_the_old_one_or_instead(tmp_path: Path) -> None:
    async with (
        inside(tmp_path) as replica,
        connect(replica.address) as old,
        connect(replica.address) as new,
    ):
        await old.open(1)
        await old.write(0, b"x")
        replica.sync.gate.clear()
        await old.send(FrameType.SNAPSHOT, named("a"))
        await until(lambda: replica.sync.started == 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(new.open, 2)
            await until(lambda: replica.server.token == (2, 1))
            replica.sync.gate.set()
        # deposed before the head was changed, so it was not
        assert await listed(new) == {}
        assert {(await old.receive())[1] for _ in range(2)} == {Status.STALE_EPOCH}
        assert (await snapshot(new, "a"))[1] == Status.OK


async def test_many_reads_of_snapshots_are_not_buffered_without_end(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        await client.write(0, bytes(range(256)) * 4096)
        await snapshot(client, "a")
        frames = b"".join(
            encode_frame(FrameType.READ_SNAPSHOT, seq, reading("a"), offset=0, length=MIB) for seq in range(100)
        )
        await client.stream.send_all(frames)
        await trio.sleep(0.2)
        serving = replica.server.owner
        assert serving is not None
        assert serving._unsent <= (8 + MAX_BACKGROUND + 2) * MIB
        async with connect(replica.address) as other:
            assert (await other.call(FrameType.PING))[1] == Status.OK
        seen = set()
        for _ in range(100):
            reply = await client.receive()
            assert reply[0] == FrameType.READ_SNAPSHOT | REPLY
            assert reply[5] == bytes(range(256)) * 4096
            seen.add(reply[2])
        assert seen == set(range(100))


@pytest.mark.parametrize(("code", "renamed"), [(errno.ENOSPC, False), (errno.EIO, False), (errno.EIO, True)])
async def test_a_failed_change_of_the_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, renamed: bool
) -> None:
    def broken(directory: Path, meta: layout.VolumeMeta) -> None:
        if renamed:
            layout.write_volume_meta(directory, meta)
        raise OSError(code, os.strerror(code))

    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        await client.write(0, b"x")
        monkeypatch.setattr(switch, "write_volume_meta", broken)
        reply = await snapshot(client, "a")
        if not renamed:
            assert reply[1] == (Status.NO_SPACE if code == errno.ENOSPC else Status.IO_ERROR)
            monkeypatch.undo()
            assert (await snapshot(client, "a"))[1] == Status.OK
            assert (await look(client, "a", 0, 1))[5] == b"x"
        else:
            assert reply[1] == Status.IO_ERROR
            await until(lambda: replica.clean is False)


async def test_a_failed_sync_of_a_coalesce_fails_the_replica(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        for name in "ab":
            await client.write(0, name.encode())
            await snapshot(client, name)
        await remove(client, "a")
        monkeypatch.setattr(os, "fsync", broken)
        assert (await step(client, "a"))[1] == Status.IO_ERROR
        await until(lambda: replica.clean is False)


async def test_a_failed_sync_is_not_a_snapshot(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        replica.sync.error = OSError(errno.EIO, "Input/output error")
        assert (await snapshot(client, "a"))[1] == Status.IO_ERROR
        await until(lambda: replica.clean is False)
        assert replica.store.list_snapshots() == []
        assert replica.sync.started == 1


async def test_snapshots_are_there_after_a_restart(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        await client.write(0, b"x")
        await snapshot(client, "a")
        await client.write(0, b"y")
        await client.call(FrameType.CLOSE)
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        assert (await look(client, "a", 0, 1))[5] == b"x"
        assert (await client.read(0, 1))[5] == b"y"


def test_254_snapshots_fit_into_one_answer() -> None:
    entry = messages.SnapshotEntry(
        name="x" * 128, parent="y" * 128, created=WHEN, user_created=False, removed=True, live=True, children=254,
        size=1 << 62, allocated=1 << 62, labels={"k" * 1000: "v" * 1040},
    )  # fmt: skip
    assert len(msgspec.json.encode(entry.labels)) <= 2048
    assert len(messages.encode(messages.SnapshotsReply(snapshots=(entry,) * 254))) < MIB
