"""Through real servers on a real file system: agreement with a model at depth, kills under load, a full disk."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from engine.store import Store, create_replica
from engine.wire.frame import REPLY, FrameType, Status
from tests.disks import small_disk
from tests.engine.replica.client import UUID, Client, connect
from tests.engine.replica.conftest import SIZE, ReplicaProcess
from tests.engine.replica.inside import inside, until

MIB = 1 << 20

pytestmark = pytest.mark.parametrize("tmp_path", ["disk", "direct"], indirect=True)


class Load:
    """Random requests at depth that never overlap in flight, as the engine sends them, and what they must give."""

    def __init__(self, client: Client, seed: int, model: bytearray) -> None:
        self.client = client
        self.random = random.Random(seed)
        self.model = model
        self.flying: dict[int, tuple[int, int, int, bytes]] = {}

    def choose(self) -> tuple[int, int, int]:
        pick = self.random
        kind = pick.choice([FrameType.READ] * 4 + [FrameType.WRITE] * 5 + [FrameType.UNMAP, FrameType.FLUSH])
        if kind == FrameType.FLUSH:
            return kind, 0, 0
        base = pick.choice([0, 0, 0, 5 * MIB, pick.randrange(SIZE // MIB - 2) * MIB])
        if pick.random() < 0.5:
            offset, length = base + pick.randrange(64) * 4096, pick.choice([1, 1, 1, 2, 8, 31, 64, 256]) * 4096
        else:
            length = pick.choice([1, 100, 512, 4095, 4096, 5000, 70000, MIB])
            offset = base + pick.randrange(64 * 4096)
        return kind, offset, length

    def clashes(self, kind: int, offset: int, length: int) -> bool:
        return any(
            offset < at + size and at < offset + length and (kind != FrameType.READ or other != FrameType.READ)
            for other, at, size, _ in self.flying.values()
        )

    async def run(self, count: int, depth: int) -> None:
        for _ in range(count):
            kind, offset, length = self.choose()
            while len(self.flying) >= depth or self.clashes(kind, offset, length):
                await self.take()
            data = self.random.randbytes(length) if kind == FrameType.WRITE else b""
            expected = bytes(self.model[offset : offset + length]) if kind == FrameType.READ else b""
            if kind in (FrameType.WRITE, FrameType.UNMAP):
                self.model[offset : offset + length] = data or bytes(length)
            self.flying[await self.client.send(kind, data, offset=offset, length=length)] = (
                kind, offset, length, expected,
            )  # fmt: skip
        while self.flying:
            await self.take()

    async def take(self) -> None:
        kind, status, seq, offset, length, payload = await self.client.receive()
        asked, at, size, expected = self.flying.pop(seq)
        assert (kind, status, offset, length) == (asked | REPLY, Status.OK, at, size)
        assert payload == expected, f"read {at}+{size}"


@pytest.mark.parametrize("seed", range(4))
async def test_it_agrees_with_a_model(replica: ReplicaProcess, seed: int) -> None:
    model = bytearray(SIZE)
    async with connect(replica.address) as client:
        await client.open(1)
        assert f'"io": "{replica.config.io}"' in replica.log
        await Load(client, seed, model).run(1500, depth=[1, 8, 40, 200][seed])
        for at in range(0, SIZE, MIB):
            assert (await client.read(at, MIB))[5] == model[at : at + MIB]
    assert replica.terminate() == 0
    store = Store.open(replica.directory)
    assert store.read(0, SIZE) == model
    store.close()


async def test_a_kill_under_load_keeps_what_was_answered(replica: ReplicaProcess) -> None:
    acknowledged: dict[int, int] = {}
    sent: dict[int, list[int]] = {}
    free = list(range(200))
    seed = random.Random(7)
    for epoch in range(1, 4):
        async with connect(replica.address) as client:
            await client.open(epoch)
            for place in sent:  # not overlapping: a place is written again only after its answer
                found = (await client.read(place * 5000, 5000))[5]
                # a write that nobody answered may be there in part: the kernel looks for SIGKILL between pages
                values = sorted({int.from_bytes(found[at : at + 2], "big") for at in range(0, 5000, 2)})
                assert set(values) <= set(sent[place])
                assert values[0] >= acknowledged.get(place, 0)
                sent[place] = values
                acknowledged[place] = values[0]
            flying: dict[int, tuple[int, int]] = {}

            async def pump(client: Client, flying: dict[int, tuple[int, int]]) -> None:
                while True:
                    while len(flying) < 64:
                        place = free.pop(seed.randrange(len(free)))
                        value = sent.get(place, [0])[-1] + 1
                        sent.setdefault(place, [0]).append(value)
                        seq = client.seq + 1
                        flying[seq] = (place, value)
                        await client.send(
                            FrameType.WRITE, value.to_bytes(2, "big") * 2500, offset=place * 5000, length=5000
                        )
                    seq = (await client.receive())[2]
                    place, value = flying.pop(seq)
                    acknowledged[place] = value
                    free.append(place)

            with trio.move_on_after(0.4):
                await pump(client, flying)
            free.extend(place for place, _ in flying.values())
            replica.kill()
        replica.start()
    assert len(acknowledged) > 100


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "small", 24 * MIB) as mounted:
        yield mounted


async def test_a_full_disk_refuses_writes_and_tears_nothing(tmp_path: Path, disk: Path) -> None:
    directory = disk / "r1"
    create_replica(directory, volume="vol1", uuid=UUID, replica="r1", size=64 * MIB)
    replica = ReplicaProcess(tmp_path, directory=directory).start()
    try:
        good = set()
        async with connect(replica.address) as client:
            await client.open(1)
            for number in range(200):
                block = bytes((number + 1,)) * 262144
                await client.send(FrameType.WRITE, block, offset=number * 262144, length=262144, seq=number)
            for _ in range(200):
                reply = await client.receive()
                assert reply[1] in (Status.OK, Status.NO_SPACE)
                if reply[1] == Status.OK:
                    good.add(reply[2])
            assert 20 < len(good) < 90
            assert (await client.flush())[1] == Status.OK
            replica.kill()
            replica.start()
        async with connect(replica.address) as client:
            assert (await client.open(2))[1] == Status.OK
            for number in good:
                assert (await client.read(number * 262144, 262144))[5] == bytes((number + 1,)) * 262144
            for number in list(good)[:8]:
                assert (await client.unmap(number * 262144, 262144))[1] == Status.OK
            assert (await client.write(63 * MIB + 4096, b"fits again" * 4096))[1] == Status.OK
            assert (await client.call(FrameType.CLOSE))[1] == Status.OK
        assert f'"io": "{replica.config.io}"' in replica.log
        assert replica.terminate() == 0
    finally:
        if replica.process is not None:
            replica.kill()


async def test_what_the_page_cache_lacks_is_read_past_it(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address) as client:
        await client.open(1)
        data = random.Random(3).randbytes(MIB)
        await client.write(0, data)
        disk = replica.disk
        assert disk is not None
        before = disk.prepared
        assert (await client.read(0, MIB))[5] == data
        assert (disk.prepared == before) is (replica.store.cache is not None)
        await client.flush()
        fd = os.open(tmp_path / "r1" / "volume-head-000.img", os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
        before = disk.prepared
        disk.held = lambda opcode, offset: offset == 4096
        slow = await client.send(FrameType.READ, offset=5000, length=10000)
        await until(lambda: len(disk.waiting) == 1)
        assert (await client.call(FrameType.PING))[1] == Status.OK
        # another block than those that are being read
        assert (await client.write(20480, b"new"))[1] == Status.OK
        assert (await client.unmap(40960, 4096))[1] == Status.OK
        disk.release()
        reply = await client.receive()
        assert (reply[2], reply[5]) == (slow, data[5000:15000])
        assert disk.prepared > before
        assert (await client.read(0, MIB))[5] == data[:20480] + b"new" + data[20483:40960] + bytes(4096) + data[45056:]
