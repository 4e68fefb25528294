from __future__ import annotations

import errno
from pathlib import Path

import pytest

from engine.store import Store, clone, create_replica, link_replica, read_origin
from engine.wire import messages
from engine.wire.frame import FrameType, Status
from tests.engine.replica.client import UUID, Client, Closed, connect
from tests.engine.replica.conftest import ReplicaProcess
from tests.engine.replica.inside import inside

MIB = 1 << 20
SIZE = 64 * MIB


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """`r1`, a clone of a replica with two snapshots that hold 24 MiB together."""
    create_replica(tmp_path / "source", volume="src", uuid="other", replica="r1", size=SIZE)
    store = Store.open(tmp_path / "source")
    for name, start in (("a", 0), ("b", 8)):
        for at in range(start * MIB, (start + 12) * MIB, MIB):
            store.write(at, name.encode() * MIB)
        store.snapshot(name)
    store.close()
    link_replica(tmp_path / "source", "b", tmp_path / "r1", volume="vol1", uuid=UUID, replica="r1")
    return tmp_path


async def pull(client: Client, budget: int = 4 * MIB, *, finish: bool = True) -> messages.PullReply:
    reply = await client.call(FrameType.PULL, messages.encode(messages.Pull(budget=budget, finish=finish)))
    assert reply[1] == Status.OK, reply
    return messages.decode(reply[5], messages.PullReply)


async def check(client: Client) -> None:
    for at, byte in ((0, b"a"), (8 * MIB - 1, b"a"), (8 * MIB, b"b"), (20 * MIB - 1, b"b"), (20 * MIB, b"\0")):
        assert (await client.read(at, 1))[5] == byte


async def test_a_clone_is_pulled_while_it_is_written_to(linked: Path) -> None:
    async with inside(linked) as replica, connect(replica.address) as client:
        opened = messages.decode((await client.open(1))[5], messages.OpenReply)
        assert opened.origin == "src@b"
        await check(client)
        first = await pull(client, finish=False)
        assert (first.done, first.complete, first.copied) == (False, False, 4 * MIB)
        assert 0 < first.passed < first.total
        await client.write(30 * MIB, b"new")
        snapshot = messages.Snapshot(name="own", created="2024-05-06T07:08:09Z")
        assert (await client.call(FrameType.SNAPSHOT, messages.encode(snapshot)))[1] == Status.OK
        while not (last := await pull(client, finish=False)).complete:
            pass
        assert (await pull(client, finish=False)).complete
        assert last.passed == 24 * MIB
        reply = messages.decode((await client.call(FrameType.SNAPSHOTS))[5], messages.SnapshotsReply)
        assert {entry.name: (entry.pinned, entry.removed) for entry in reply.snapshots} == {
            "a": (True, True),
            "b": (True, False),
            "own": (False, False),
        }
        assert (await pull(client)).done
        assert (await pull(client)).done
        await check(client)
        assert (await client.read(30 * MIB, 3))[5] == b"new"
        reply = messages.decode((await client.call(FrameType.SNAPSHOTS))[5], messages.SnapshotsReply)
        assert [entry.name for entry in reply.snapshots] == ["b", "own"]
    assert read_origin(linked / "r1") is None


async def test_a_killed_replica_goes_on_pulling_where_it_was(linked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = ReplicaProcess(linked).start()
    async with connect(running.address) as client:
        await client.open(1)
        while not (step := await pull(client, finish=False)).copied or step.passed < 18 * MIB:
            pass
        running.kill()
        with pytest.raises(Closed):
            await client.receive()
    origin = read_origin(linked / "r1")
    assert origin is not None
    assert origin.cursor >= clone.SYNC_EVERY
    running.start()
    async with connect(running.address) as client:
        await client.open(2)
        await check(client)
        copied = 0
        while not (step := await pull(client)).done:
            copied += step.copied
        assert copied <= 8 * MIB
        await check(client)
    assert running.terminate() == 0


async def test_a_full_disk_stops_a_pull_and_nothing_else(linked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with inside(linked) as replica, connect(replica.address) as client:
        await client.open(1)
        with monkeypatch.context() as patch:
            patch.setattr(clone, "pwrite_all", full)
            reply = await client.call(FrameType.PULL, messages.encode(messages.Pull(budget=MIB)))
            assert reply[1] == Status.NO_SPACE
        await check(client)
        while not (await pull(client)).done:
            pass
        await check(client)


async def test_only_the_owner_may_pull(linked: Path) -> None:
    async with inside(linked) as replica, connect(replica.address) as client, connect(replica.address) as other:
        await client.open(1)
        reply = await other.call(FrameType.PULL, messages.encode(messages.Pull(budget=MIB)))
        assert reply[1] == Status.NOT_OPEN
