from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from engine.wire import messages
from engine.wire.frame import FrameType, Status
from engine.wire.layers import decode_layer, encode_layer
from tests.engine.replica.client import Client, Closed, connect
from tests.engine.replica.inside import SIZE, inside, until

BLOCK = 4096
MIB = 1 << 20
WHEN = "2024-05-06T07:08:09Z"


def entry(name: str, parent: str = "", *, live: bool = True) -> messages.SnapshotEntry:
    return messages.SnapshotEntry(
        name=name, parent=parent, created=WHEN, user_created=True, removed=False, live=live, children=1, size=SIZE,
        allocated=0, labels={"k": "v"},
    )  # fmt: skip


async def read_layer(client: Client, name: str, offset: int, length: int) -> tuple[int, list[tuple[int, int]], bytes]:
    body = messages.encode(messages.ReadLayer(name=name))
    reply = await client.call(FrameType.READ_LAYER, body, offset=offset, length=length)
    assert reply[1] == Status.OK, reply
    found, data = decode_layer(reply[5], reply[4])
    return reply[4], list(found), bytes(data)


async def write_layer(client: Client, name: str, offset: int, length: int, *pieces: tuple[int, bytes]) -> int:
    found = [(start, len(data)) for start, data in pieces]
    body = encode_layer(name, found, b"".join(data for _, data in pieces))
    return (await client.call(FrameType.WRITE_LAYER, body, offset=offset, length=length))[1]


async def state(client: Client, rebuilding: bool) -> None:
    reply = await client.call(FrameType.STATE, messages.encode(messages.State(rebuilding=rebuilding)))
    assert reply[1] == Status.OK


async def begin(client: Client, *snapshots: messages.SnapshotEntry) -> messages.RebuildState:
    body = messages.encode(messages.BeginRebuild(snapshots=snapshots))
    reply = await client.call(FrameType.BEGIN_REBUILD, body)
    assert reply[1] == Status.OK, reply
    return messages.decode(reply[5], messages.RebuildState)


async def save(client: Client, told: messages.RebuildState) -> int:
    return (await client.call(FrameType.REBUILD_STATE, messages.encode(told)))[1]


async def test_the_head_is_read_and_written_as_it_is_with_its_holes(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        await client.write(BLOCK, b"a" * BLOCK)
        await client.write(3 * BLOCK, b"b" * 10)
        block = b"b" * 10 + bytes(BLOCK - 10)
        found = [(BLOCK, BLOCK), (3 * BLOCK, BLOCK)]
        assert await read_layer(client, "", 0, MIB) == (MIB, found, b"a" * BLOCK + block)
        # nothing follows: the range goes on to the end
        assert await read_layer(client, "", MIB, MIB) == (SIZE - MIB, [], b"")
        assert await write_layer(client, "", 0, MIB, (0, b"n" * BLOCK), (3 * BLOCK, b"m" * BLOCK)) == Status.OK
        assert (await client.read(0, 4 * BLOCK))[5] == b"n" * BLOCK + bytes(2 * BLOCK) + b"m" * BLOCK
        assert (await read_layer(client, "", 0, MIB))[1] == [(0, BLOCK), (3 * BLOCK, BLOCK)]
        # a flush waits for it, and its intent is noted
        assert (await client.flush())[1] == Status.OK
        assert (await client.status()).dirty_regions == 1


async def test_a_hole_in_the_head_shows_what_lies_below(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        await client.write(0, b"old" + bytes(BLOCK - 3))
        await client.call(FrameType.SNAPSHOT, messages.encode(messages.Snapshot(name="s", created=WHEN)))
        await client.write(0, b"new")
        assert (await client.read(0, 3))[5] == b"new"
        assert (await read_layer(client, "s", 0, BLOCK))[1:] == ([(0, BLOCK)], b"old" + bytes(BLOCK - 3))
        assert await write_layer(client, "", 0, MIB) == Status.OK
        assert (await client.read(0, 3))[5] == b"old"


async def test_a_replica_is_filled_and_remembers_how_far(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica:
        async with connect(replica.address) as client:
            await client.open(1)
            await client.write(0, b"what was here")
            await state(client, True)
            assert (await begin(client, entry("a"), entry("b", "a"))) == messages.RebuildState(
                snapshots={"a": messages.Filled(cursor=0), "b": messages.Filled(cursor=0)}
            )
            assert (await client.read(0, 13))[5] == bytes(13)
            await client.write(7 * MIB + 5, b"client")
            assert await write_layer(client, "a", 0, MIB, (BLOCK, b"a" * BLOCK)) == Status.OK
            assert (await client.read(BLOCK, 1))[5] == b"a"
            # an empty range may be longer than any other
            assert await write_layer(client, "a", MIB, SIZE - MIB) == Status.OK
            assert await write_layer(client, "", 0, MIB, (0, b"h" * BLOCK)) == Status.OK
            assert (await client.read(0, 1))[5] == b"h"
            assert (await client.status()).dirty_regions == 2
            told = messages.RebuildState(snapshots={"a": messages.Filled(cursor=SIZE, copied=BLOCK)}, head=MIB)
            assert await save(client, told) == Status.OK
            # what was filled is no intent any more, what the client wrote is one
            assert (await client.bitmap())[5][0] == 1 << 7
        async with connect(replica.address) as client:
            reply = messages.decode((await client.open(2))[5], messages.OpenReply)
            assert (reply.rebuilding, reply.rebuild) == (True, True)
            await state(client, True)
            again = await begin(client, entry("a"), entry("b", "a"))
            assert again == msgspec.structs.replace(told, snapshots={**told.snapshots, "b": messages.Filled(cursor=0)})
            await state(client, False)
            assert await save(client, told) == Status.BAD_REQUEST
            assert await write_layer(client, "a", 0, MIB) == Status.BAD_REQUEST
        async with connect(replica.address) as client:
            reply = messages.decode((await client.open(3))[5], messages.OpenReply)
            assert (reply.rebuilding, reply.rebuild) == (False, False)


async def test_a_failed_sync_of_what_was_filled_ends_the_replica(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        await state(client, True)
        await begin(client, entry("a"))
        replica.sync.error = OSError(5, "Input/output error")
        assert await save(client, messages.RebuildState(head=MIB)) == Status.IO_ERROR
        await until(lambda: replica.clean is False)
    assert replica.store.rebuild is not None
    assert replica.store.rebuild.head == 0


@pytest.mark.parametrize(
    ("kind", "body", "offset", "length", "status"),
    [
        (FrameType.READ_LAYER, messages.encode(messages.ReadLayer()), 1, BLOCK, Status.BAD_REQUEST),
        (FrameType.READ_LAYER, messages.encode(messages.ReadLayer()), SIZE, BLOCK, Status.OUT_OF_RANGE),
        (FrameType.READ_LAYER, messages.encode(messages.ReadLayer()), 0, 2 * MIB, Status.BAD_REQUEST),
        (FrameType.READ_LAYER, messages.encode(messages.ReadLayer(name="no")), 0, BLOCK, Status.NOT_FOUND),
        (FrameType.WRITE_LAYER, encode_layer("", [], b""), BLOCK // 2, BLOCK, Status.BAD_REQUEST),
        (FrameType.WRITE_LAYER, encode_layer("", [], b""), SIZE, BLOCK, Status.OUT_OF_RANGE),
        (FrameType.WRITE_LAYER, encode_layer("", [], b""), 0, 2 * MIB, Status.BAD_REQUEST),
        (FrameType.WRITE_LAYER, encode_layer("a", [], b""), 0, BLOCK, Status.BAD_REQUEST),
        (FrameType.BEGIN_REBUILD, messages.encode(messages.BeginRebuild(snapshots=())), 0, 0, Status.BAD_REQUEST),
        (FrameType.REBUILD_STATE, messages.encode(messages.RebuildState()), 0, 0, Status.BAD_REQUEST),
    ],
)
async def test_what_cannot_be_is_refused_and_before_an_open_everything(
    tmp_path: Path, kind: FrameType, body: bytes, offset: int, length: int, status: Status
) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        assert (await client.call(kind, body, offset=offset, length=length))[1] == Status.NOT_OPEN
        await client.open(1)
        assert (await client.call(kind, body, offset=offset, length=length))[1] == status


@pytest.mark.parametrize("kind", [FrameType.READ_LAYER, FrameType.WRITE_LAYER, FrameType.BEGIN_REBUILD])
async def test_nonsense_ends_the_connection_and_nothing_else(tmp_path: Path, kind: FrameType) -> None:
    async with inside(tmp_path) as replica:
        async with connect(replica.address) as client:
            await client.open(1)
            with pytest.raises(Closed):
                await client.call(kind, b"\x07\x00\xc1", offset=0, length=BLOCK)
        async with connect(replica.address) as client:
            assert (await client.open(2))[1] == Status.OK
