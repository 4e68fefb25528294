from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import trio

from engine.controller.driver import Controller, attach
from engine.errors import FencedError, NoReplicaError, RecordError
from engine.record import FileRecordStore, VolumeRecord, bump_epoch
from engine.secret import create_secret, read_secret
from tests.engine.cluster import Cluster, cluster, until

BLOCK = 4096


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Cluster]:
    with cluster(tmp_path) as made:
        yield made


def in_sync(volume: Controller) -> set[str]:
    return {replica.name for replica in volume.status("", "").replicas if replica.state == "in_sync"}


async def test_what_was_written_is_read_back_and_on_every_replica(three: Cluster) -> None:
    data = os.urandom(3 * BLOCK)
    async with three.attached() as volume:
        await volume.write(BLOCK, data)
        assert await volume.read(0, 5 * BLOCK) == bytes(BLOCK) + data + bytes(BLOCK)
        await volume.unmap(2 * BLOCK, BLOCK)
        assert await volume.read(2 * BLOCK, BLOCK) == bytes(BLOCK)
    three.stop()
    three.assert_identical()
    assert three.contents("r1")[BLOCK : 2 * BLOCK] == data[:BLOCK]


async def test_replicas_over_tcp_are_written_killed_and_brought_back(tmp_path: Path) -> None:
    with cluster(tmp_path, tcp=True) as three:
        async with three.attached() as volume:
            data = os.urandom(1 << 20)
            await volume.write(0, data)
            three.kill("r1")
            await volume.write(1 << 20, data)
            assert three.store.read().in_sync == ("r2", "r3")
            three.start("r1")
            await until(lambda: in_sync(volume) == set(three.names))
            assert await volume.read(1 << 19, 1 << 20) == data[1 << 19 :] + data[: 1 << 19]
        three.stop()
        three.assert_identical()


async def test_a_replica_that_is_doubted_is_not_waited_for_as_long_as_others(three: Cluster) -> None:
    doubts: tuple[tuple[tuple[str, ...], str], ...] = ((("r3",), "within 1.5 s"), (("r2",), "within 0.5 s"))
    for doubted, reason in doubts:
        record = bump_epoch(three.store)
        three.store.swap(record.version, record.next(in_sync=("r1", "r2")))
        key = read_secret(three.secret)
        volume = attach(three.store, key, epoch=record.epoch, open_timeout=1.5, doubted=doubted)
        three.processes["r2"].send_signal(signal.SIGSTOP)
        try:
            async with volume.running():
                assert in_sync(volume) == {"r1"}
                assert reason in volume.core.reason("r2")
        finally:
            three.processes["r2"].send_signal(signal.SIGCONT)


async def test_every_flush_reaches_every_replica(three: Cluster) -> None:
    async with three.attached() as volume:
        before = {name: (await three.status(name)).flushes for name in three.names}
        for i in range(5):
            await volume.write(i * BLOCK, bytes(BLOCK))
            await volume.flush()
        for name in three.names:
            assert (await three.status(name)).flushes == before[name] + 5


async def test_reads_are_spread_over_the_replicas(three: Cluster) -> None:
    async with three.attached() as volume:
        for _ in range(30):
            await volume.read(0, BLOCK)
        for name in three.names:
            assert (await three.status(name)).reads >= 10


async def test_requests_outside_the_volume_are_refused(three: Cluster) -> None:
    async with three.attached() as volume:
        for offset, length in ((three.size, 1), (three.size - 1, 2), (-1, 2), (0, 0)):
            with pytest.raises(OSError, match="outside the volume"):
                await volume.read(offset, length)


async def test_a_killed_replica_leaves_the_record_before_the_write_is_acknowledged_and_comes_back(
    three: Cluster,
) -> None:
    rng = Random(5)
    expected = bytearray(three.size)
    async with three.attached() as volume:

        async def write(offset: int) -> None:
            data = rng.randbytes(BLOCK)
            expected[offset : offset + BLOCK] = data
            await volume.write(offset, data)

        await write(0)
        for victim in three.names:
            three.kill(victim)
            await write(rng.randrange(three.size // BLOCK) * BLOCK)
            assert victim not in three.store.read().in_sync
            for _ in range(20):
                await write(rng.randrange(three.size // BLOCK) * BLOCK)
            three.start(victim)
            for _ in range(20):
                await write(rng.randrange(three.size // BLOCK) * BLOCK)
            await until(lambda: in_sync(volume) == set(three.names), what="the replica's return")
            assert set(three.store.read().in_sync) == set(three.names)
        assert await volume.read(0, 1 << 20) == expected[: 1 << 20]
    three.stop()
    three.assert_identical()
    assert three.contents("r2") == expected


async def test_only_what_changed_is_copied_to_a_returning_replica(three: Cluster) -> None:
    async with three.attached() as volume:
        for region in range(8):
            await volume.write(region << 20, os.urandom(BLOCK))
        await volume.flush()
        three.kill("r2")
        await volume.write(2 << 20, os.urandom(BLOCK))
        three.start("r2")
        await until(lambda: in_sync(volume) == set(three.names))
        written = (await three.status("r2")).written_bytes
        # its own intents may name what it had written since the last settled flush, but never the whole volume
        assert written <= 9 << 20


async def test_a_hanging_replica_leaves_at_its_deadline_and_returns_when_it_wakes(three: Cluster) -> None:
    async with three.attached(request_timeout=0.6) as volume:
        os.kill(three.processes["r3"].pid, signal.SIGSTOP)
        await volume.write(0, b"x" * BLOCK)
        assert three.store.read().in_sync == ("r1", "r2")
        os.kill(three.processes["r3"].pid, signal.SIGCONT)
        await until(lambda: in_sync(volume) == set(three.names))
    three.stop()
    three.assert_identical()


async def test_a_lower_epoch_is_refused_for_good_and_its_requests_stay_unanswered(three: Cluster) -> None:
    answered = False
    with pytest.raises(ExceptionGroup) as caught:
        async with three.attached() as old, trio.open_nursery() as nursery:
            await old.write(0, b"a" * BLOCK)
            async with three.attached() as new:

                async def late_write() -> None:
                    nonlocal answered
                    await old.write(0, b"b" * BLOCK)
                    answered = True

                nursery.start_soon(late_write)
                await old.failed.wait()
                assert isinstance(old.failure, FencedError)
                assert await new.read(0, BLOCK) == b"a" * BLOCK
                await new.write(0, b"c" * BLOCK)
                assert not answered
                raise old.failure
    assert caught.group_contains(FencedError)
    record = three.store.read()
    assert record.epoch == 2
    assert set(record.in_sync) == set(three.names)


async def test_stale_replicas_alone_cannot_attach(three: Cluster) -> None:
    async with three.attached() as volume:
        three.kill("r1")
        await volume.write(0, b"new" + bytes(BLOCK - 3))
        three.kill("r2")
        await volume.write(BLOCK, bytes(BLOCK))
    assert three.store.read().in_sync == ("r3",)
    three.kill("r3")
    three.start("r1", "r2")
    with pytest.raises(ExceptionGroup) as caught:
        async with three.attached():
            raise AssertionError("attached to stale replicas")
    assert caught.group_contains(NoReplicaError, match="none of its in-sync replicas answers")
    three.start("r3")
    async with three.attached() as volume:
        assert (await volume.read(0, 3)) == b"new"


async def test_unreachable_members_are_out_of_the_record_before_the_first_read(three: Cluster) -> None:
    three.kill("r2")
    async with three.attached() as volume:
        assert three.store.read().in_sync == ("r1", "r3")
        assert await volume.read(0, BLOCK) == bytes(BLOCK)


@pytest.mark.parametrize("seed", range(3))
async def test_after_a_crash_replicas_read_the_same(three: Cluster, seed: int) -> None:
    rng = Random(seed)

    with pytest.raises(ExceptionGroup) as caught:
        async with three.attached() as volume, trio.open_nursery() as nursery:

            async def writer() -> None:
                while True:
                    offset = rng.randrange(three.size // BLOCK) * BLOCK
                    await volume.write(offset, rng.randbytes(BLOCK))

            for _ in range(8):
                nursery.start_soon(writer)
            await trio.sleep(0.2)
            # as if the process had gone: connections break with requests on their way
            for connection in list(volume._connections.values()):
                connection.sock.shutdown(socket.SHUT_RDWR)
            await volume.failed.wait()
            assert volume.failure is not None
            raise volume.failure
    assert caught.group_contains(NoReplicaError)
    # what a crash may leave: one replica lacks a write that the others have, with its intent noted
    async with three.attached() as volume:
        first = [await volume.read(offset, 1 << 20) for offset in range(0, three.size, 1 << 20)]
        for _ in range(2):
            assert [await volume.read(offset, 1 << 20) for offset in range(0, three.size, 1 << 20)] == first
        await until(lambda: volume.state == "ready" and in_sync(volume) == set(three.names))
    three.stop()
    three.assert_identical()


class _Unreachable(FileRecordStore):
    """A record store that can be cut off."""

    away = False

    def swap(self, expected_version: int, new: VolumeRecord) -> None:
        if self.away:
            raise RecordError("the record store does not answer")
        super().swap(expected_version, new)


async def test_with_the_record_store_away_only_writes_that_need_it_wait(three: Cluster) -> None:
    store = _Unreachable(three.store.path)
    async with three.attached(store=store) as volume:
        store.away = True
        await volume.write(0, b"1" * BLOCK)
        three.kill("r1")
        acknowledged = False

        async def write() -> None:
            nonlocal acknowledged
            await volume.write(0, b"2" * BLOCK)
            acknowledged = True

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            await until(lambda: volume.state == "waiting")
            assert await volume.read(BLOCK, BLOCK) == bytes(BLOCK)
            assert not acknowledged
            store.away = False
            await until(lambda: acknowledged)
        assert three.store.read().in_sync == ("r2", "r3")


async def test_a_server_that_does_not_know_the_secret_is_not_a_replica(three: Cluster, tmp_path: Path) -> None:
    three.kill("r2")
    (tmp_path / "other").mkdir()
    right = three.secret
    three.secret = tmp_path / "other" / "secret"
    create_secret(three.secret)
    three.start("r2")
    three.secret = right
    async with three.attached() as volume:
        await volume.write(0, bytes(BLOCK))
        assert three.store.read().in_sync == ("r1", "r3")


class _Corrupter:
    """Sits on a replica's address and passes everything on, until it is told to flip a bit of the next large answer."""

    def __init__(self, path: Path, behind: Path) -> None:
        self.path = path
        self.behind = behind
        self.armed = False

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        listener = trio.socket.socket(trio.socket.AF_UNIX)
        await listener.bind(str(self.path))
        listener.listen()
        with listener:
            async with trio.open_nursery() as nursery:
                task_status.started()
                while True:
                    accepted, _ = await listener.accept()
                    nursery.start_soon(self._pass, trio.SocketStream(accepted))

    async def _pass(self, client: trio.SocketStream) -> None:
        async with client, await trio.open_unix_socket(self.behind) as replica, trio.open_nursery() as nursery:
            nursery.start_soon(self._copy, client, replica, False)
            await self._copy(replica, client, True)
            nursery.cancel_scope.cancel()

    async def _copy(self, source: trio.SocketStream, target: trio.SocketStream, answers: bool) -> None:
        try:
            async for chunk in source:
                if answers and self.armed and len(chunk) > 2000:
                    self.armed = False
                    chunk = chunk[:1000] + bytes([chunk[1000] ^ 4]) + chunk[1001:]
                await target.send_all(chunk)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return


async def test_a_replica_whose_answer_fails_its_checksum_leaves_and_the_read_is_answered_by_another(
    three: Cluster,
) -> None:
    real = three.directory / "r2-real.sock"
    three.socket("r2").rename(real)
    corrupter = _Corrupter(three.socket("r2"), real)
    data = os.urandom(BLOCK)
    async with trio.open_nursery() as nursery:
        await nursery.start(corrupter.serve)
        async with three.attached() as volume:
            await volume.write(0, data)
            corrupter.armed = True
            for _ in range(6):
                assert await volume.read(0, BLOCK) == data
            assert not corrupter.armed
            await until(lambda: "checksum" in volume.core.reason("r2") or "r2" not in in_sync(volume))
            await until(lambda: in_sync(volume) == set(three.names), what="the return of the replica")
            # left, was brought up to date, and joined again: three records
            assert three.store.read().version >= 4
        nursery.cancel_scope.cancel()


async def test_an_attachment_must_hold_the_recorded_epoch(three: Cluster) -> None:
    bump_epoch(three.store)
    from engine.controller.driver import attach
    from engine.secret import read_secret

    with pytest.raises(FencedError):
        attach(three.store, read_secret(three.secret), epoch=7)
