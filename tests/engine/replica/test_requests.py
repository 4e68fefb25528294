from __future__ import annotations

from engine.wire.frame import Status
from tests.engine.replica.client import connect
from tests.engine.replica.conftest import ReplicaProcess


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
    assert replica.terminate() == 0
