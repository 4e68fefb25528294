"""Checksums over the wire, with data through the page cache and past it."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import trio
from crc32c import crc32c

from engine.store import create_replica
from engine.store.digest import BAD, GOOD, HELD, UNSUMMED
from engine.wire import messages
from engine.wire.frame import FrameType, Status
from tests.engine.replica.client import UUID, Client, connect
from tests.engine.replica.conftest import SIZE, ReplicaProcess

BLOCK = 4096
REGION = 1 << 20
DATA = os.urandom(2 * REGION)


@pytest.fixture
def at_rest(tmp_path: Path) -> Iterator[ReplicaProcess]:
    """The first two regions have content, and checksums soon."""
    create_replica(tmp_path / "r1", volume="vol1", uuid=UUID, replica="r1", size=SIZE)
    with (tmp_path / "r1" / "volume-head-000.img").open("r+b") as image:
        image.write(DATA)
    running = ReplicaProcess(tmp_path)
    running.config = msgspec.structs.replace(running.config, rest=0)
    yield running.start()
    if running.process is not None:
        running.kill()


async def ready(client: Client) -> None:
    await client.open(1)
    with trio.fail_after(20):
        while (await client.status()).summed_regions < 2:
            await trio.sleep(0.02)


def flip(replica: ReplicaProcess, offset: int) -> None:
    fd = os.open(replica.directory / "volume-head-000.img", os.O_RDWR)
    try:
        os.pwrite(fd, bytes([os.pread(fd, 1, offset)[0] ^ 4]), offset)
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


async def digest(client: Client, offset: int) -> tuple[tuple[int, ...], bytes, int]:
    body = messages.encode(messages.Digest())
    _, status, _, more, count, payload = await client.call(FrameType.DIGEST, body, offset=offset, length=REGION)
    assert status == Status.OK, payload
    return struct.unpack_from(f"<{count}I", payload), payload[4 * count :], more


async def mend(client: Client, offset: int, data: bytes) -> int:
    body = messages.encode(messages.Mend(data=data))
    return (await client.call(FrameType.MEND, body, offset=offset, length=len(data)))[1]


@pytest.mark.parametrize(
    ("offset", "length"), [(0, BLOCK), (0, REGION), (3 * BLOCK, 2 * BLOCK), (1000, 200), (512, REGION)]
)
async def test_damage_is_told_with_its_block_and_put_back(at_rest: ReplicaProcess, offset: int, length: int) -> None:
    async with connect(at_rest.address) as client:
        await ready(client)
        bad = (offset + length // 2) // BLOCK * BLOCK
        flip(at_rest, bad + 7)
        _, status, _, where, size, payload = await client.read(offset, length)
        assert (status, where, size) == (Status.CORRUPT, bad, BLOCK)
        assert messages.decode(payload, messages.Corrupt).snapshot == ""
        assert (await client.status()).corrupt == 1
        # only what belongs there
        assert await mend(client, bad, bytes(BLOCK)) == Status.CORRUPT
        assert (await client.read(offset, length))[1] == Status.CORRUPT
        assert await mend(client, bad, DATA[bad : bad + BLOCK]) == Status.OK
        assert (await client.read(offset, length))[5] == DATA[offset : offset + length]
        status_now = await client.status()
        assert (status_now.dirty_regions, status_now.summed_regions) == (0, 2)
    assert (at_rest.directory / "volume-head-000.img").read_bytes()[: 2 * REGION] == DATA


async def test_a_write_takes_the_checksums_of_its_region(at_rest: ReplicaProcess) -> None:
    async with connect(at_rest.address) as client:
        await ready(client)
        await client.write(BLOCK, bytes(BLOCK))
        assert (await client.read(0, 3 * BLOCK))[5] == DATA[:BLOCK] + bytes(BLOCK) + DATA[2 * BLOCK : 3 * BLOCK]
        assert (await client.status()).summed_regions == 1
        # nothing remembers what belongs there
        assert await mend(client, 0, DATA[:BLOCK]) == Status.CORRUPT
        _, flags, _ = await digest(client, 0)
        assert set(flags) == {HELD | UNSUMMED}


async def test_a_digest_tells_what_the_disk_has(at_rest: ReplicaProcess) -> None:
    async with connect(at_rest.address) as client:
        await ready(client)
        flip(at_rest, REGION + 9 * BLOCK)
        sums, flags, more = await digest(client, REGION)
        assert more == SIZE
        assert [at for at, flag in enumerate(flags) if flag != HELD | GOOD] == [9]
        assert flags[9] == HELD | BAD
        for block in range(256):
            content = DATA[REGION + block * BLOCK :][:BLOCK]
            assert (sums[block] == crc32c(content)) == (block != 9)
        assert await digest(client, 4 * REGION) == ((), b"", SIZE)


@pytest.mark.parametrize(("offset", "length"), [(100, BLOCK), (0, 100), (REGION - BLOCK, 2 * BLOCK)])
async def test_a_digest_is_of_whole_blocks_of_one_region(at_rest: ReplicaProcess, offset: int, length: int) -> None:
    async with connect(at_rest.address) as client:
        await client.open(1)
        body = messages.encode(messages.Digest())
        assert (await client.call(FrameType.DIGEST, body, offset=offset, length=length))[1] == Status.BAD_REQUEST
        assert await mend(client, 100, bytes(BLOCK)) == Status.BAD_REQUEST
