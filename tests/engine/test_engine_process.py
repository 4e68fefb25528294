"""The engine as its supervisor sees it: a process with a FUSE descriptor, a control socket and exit statuses."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
import trio

from engine.client import EngineClient, EngineOperationError, EngineStatus, EngineUnreachableError
from engine.controller.driver import attach
from engine.frontend import FRONTENDS
from engine.frontend.fuse_device import FuseDevice
from engine.launch import EngineConfig, engine_argv
from engine.operations import Resize, Resized
from engine.record import bump_epoch
from engine.secret import read_secret
from tests.engine.cluster import Cluster, cluster, until

pytestmark = pytest.mark.system

BLOCK = 4096


class Engine:
    def __init__(
        self,
        of: Cluster,
        name: str = "engine",
        frontend: str = "pyfuse3",
        epoch: int | None = None,
        **settings: Any,
    ) -> None:
        self.cluster = of
        self.name = name
        self.control = of.directory / f"{name}.sock"
        self.device = FuseDevice.mount(of.directory / name)
        self.config = EngineConfig(
            record=str(of.store.path),
            secret_file=str(of.secret),
            epoch=bump_epoch(of.store).epoch if epoch is None else epoch,
            frontend=frontend,
            fuse_fd=self.device.fd,
            block_file=str(self.device.path),
            control=str(self.control),
            open_timeout=5.0,
            reconnect_interval=0.1,
            **settings,
        )
        self._start(self.config)

    def _start(self, config: EngineConfig) -> None:
        self.config = config
        with (self.cluster.directory / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                engine_argv(config, self.cluster.directory / f"{self.name}.json"),
                stdout=subprocess.PIPE,
                stderr=log,
                pass_fds=[fd for fd in (self.device.fd, config.lifeline_fd) if fd >= 0],
            )
        assert self.process.stdout is not None
        self.first: dict[str, Any] = json.loads(self.process.stdout.readline())

    def take_over(self, before: EngineStatus) -> None:
        """Kill the engine, and start another one on the same file, which is told the last known of its predecessor."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        incarnation = self.config.incarnation + 1
        instances = {replica.name: replica.instance for replica in before.replicas}
        self._start(msgspec.structs.replace(self.config, incarnation=incarnation, resume=True, instances=instances))

    async def status(self) -> EngineStatus:
        return await EngineClient(self.control).status()

    async def wait(self) -> int:
        with trio.fail_after(20):
            return await trio.to_thread.run_sync(self.process.wait, abandon_on_cancel=True)

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.device.abort()
        self.device.unmount()
        self.device.close()


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Cluster]:
    with cluster(tmp_path) as made:
        yield made


@pytest.fixture
def engine(three: Cluster) -> Iterator[Engine]:
    made = Engine(three)
    try:
        yield made
    finally:
        made.end()


def write(path: Path, offset: int, data: bytes, sync: bool = True) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        assert os.pwrite(fd, data, offset) == len(data)
        if sync:
            os.fsync(fd)
    finally:
        os.close(fd)


async def thread(act: Any, *arguments: Any) -> Any:
    with trio.fail_after(20):
        return await trio.to_thread.run_sync(act, *arguments, abandon_on_cancel=True)


async def test_every_fsync_of_the_file_is_one_flush_of_every_replicas_disk(three: Cluster, engine: Engine) -> None:
    assert engine.first["event"] == "ready"
    before = {name: (await three.status(name)).flushes for name in three.names}
    for i in range(7):
        await thread(write, engine.device.path, i * BLOCK, bytes([i]) * BLOCK)
    for name in three.names:
        assert (await three.status(name)).flushes == before[name] + 7
    assert (await engine.status()).operations["flush"].count == 7


async def test_status_says_what_runs(three: Cluster, engine: Engine) -> None:
    status = await engine.status()
    assert (status.volume, status.state, status.pid, status.epoch) == ("vol", "ready", engine.process.pid, 1)
    assert {replica.name: replica.state for replica in status.replicas} == dict.fromkeys(three.names, "in_sync")
    assert status.size == three.size


async def test_sigterm_detaches_cleanly_and_everything_is_on_the_replicas(three: Cluster, engine: Engine) -> None:
    data = os.urandom(3 * BLOCK)
    await thread(write, engine.device.path, 5 * BLOCK, data, False)
    engine.process.send_signal(signal.SIGTERM)
    assert await engine.wait() == 0
    for name in three.names:
        assert (await three.status(name)).dirty_regions == 0
    three.stop()
    three.assert_identical()
    assert three.contents("r3")[5 * BLOCK : 8 * BLOCK] == data


async def test_it_gives_up_its_right_when_the_last_one_is_dead_who_could_answer_by_it(three: Cluster) -> None:
    ours, theirs = os.pipe2(os.O_CLOEXEC)
    engine = Engine(three, right_lasts=30.0, lifeline_fd=ours)
    # stands for the NFS server: it has the other end as well
    server = subprocess.Popen(["sleep", "60"], pass_fds=(theirs,))
    try:
        await thread(write, engine.device.path, 0, b"x" * BLOCK, False)
        # the share manager dies
        os.close(theirs)
        client = EngineClient(engine.control)
        async with client.right() as news:
            first = (await anext(news)).until
            while (await anext(news)).until <= first:
                pass
        assert engine.process.poll() is None
        server.kill()
        assert await engine.wait() == 0
        for name in three.names:
            assert (await three.status(name)).dirty_regions == 0
        # whoever comes next would have to wait half a minute otherwise
        following = attach(
            three.store, read_secret(three.secret), epoch=bump_epoch(three.store).epoch, right_lasts=30.0
        )
        async with following.running():
            assert following.right.news().older_at is None
            assert (await following.read(0, BLOCK))[:1] == b"x"
    finally:
        server.kill()
        server.wait()
        engine.end()
        os.close(ours)


@pytest.mark.parametrize("frontend", FRONTENDS)
async def test_a_killed_engine_loses_nothing_that_was_acknowledged(three: Cluster, frontend: str) -> None:
    rng = Random(3)
    expected: dict[int, bytes] = {}
    for _ in range(3):
        engine = Engine(three, frontend=frontend)
        try:

            def work(path: Path = engine.device.path) -> None:
                fd = os.open(path, os.O_RDWR)
                try:
                    for block, content in expected.items():
                        assert os.pread(fd, BLOCK, block * BLOCK) == content
                    for _ in range(50):
                        block, data = rng.randrange(three.size // BLOCK), rng.randbytes(BLOCK)
                        os.pwrite(fd, data, block * BLOCK)
                        expected[block] = data
                finally:
                    os.close(fd)

            await thread(work)
            engine.process.kill()
            assert await engine.wait() == -signal.SIGKILL
        finally:
            engine.end()
    async with three.attached() as volume:
        for block, content in expected.items():
            assert await volume.read(block * BLOCK, BLOCK) == content
        await until(lambda: volume.state == "ready")
    three.stop()
    three.assert_identical()


async def test_a_second_engine_fences_the_first_one_which_exits_with_3(three: Cluster, engine: Engine) -> None:
    other = Engine(three, "other")
    try:
        assert other.first["event"] == "ready"
        assert await engine.wait() == 3
        assert engine.process.stdout is not None
        said = json.loads(engine.process.stdout.readline())
        assert said["class"] == "FencedError"
        assert "epoch 2.1" in said["message"]
        await thread(write, other.device.path, 0, b"x" * BLOCK)
    finally:
        other.end()


async def test_with_no_replica_it_exits_with_4_and_one_clear_line(three: Cluster) -> None:
    three.abandon()
    engine = Engine(three)
    try:
        assert engine.first["class"] == "NoReplicaError"
        assert "none of its in-sync replicas answers" in engine.first["message"]
        assert await engine.wait() == 4
    finally:
        engine.end()


async def test_losing_every_replica_ends_it_and_leaves_requests_waiting(three: Cluster, engine: Engine) -> None:
    outcome: list[int] = []

    async def write_and_wait() -> None:
        try:
            await thread(write, engine.device.path, 0, b"y" * BLOCK)
            outcome.append(0)
        except OSError as error:
            outcome.append(error.errno or -1)

    async with trio.open_nursery() as nursery:
        for name in three.names:
            os.kill(three.processes[name].pid, signal.SIGSTOP)
        nursery.start_soon(write_and_wait)
        await trio.sleep(0.1)
        three.abandon()
        assert await engine.wait() == 4
        assert outcome == []
        # whoever holds the descriptor decides
        engine.device.abort()
    assert outcome
    assert outcome[0] > 0
    assert three.store.read().in_sync


async def test_an_old_epoch_does_not_even_start(three: Cluster) -> None:
    bump_epoch(three.store)
    bump_epoch(three.store)
    engine = Engine(three, epoch=1)
    try:
        assert engine.first["class"] == "FencedError"
        assert await engine.wait() == 3
    finally:
        engine.end()


async def test_nonsense_on_the_control_socket_harms_nothing(three: Cluster, engine: Engine) -> None:
    for noise in (
        b"\n",
        b"{}\n",
        b'{"op": 5}\n',
        b"x" * 70000 + b"\n",
        bytes(range(256)) + b"\n",
    ):
        stream = await trio.open_unix_socket(engine.control)
        async with stream:
            with contextlib.suppress(trio.BrokenResourceError):
                await stream.send_all(noise)
                assert await stream.receive_some() == b""
    stream = await trio.open_unix_socket(engine.control)
    async with stream:
        await stream.send_all(b'{"op": "dance"}\n')
        assert b"does not know the operation 'dance'" in await stream.receive_some()
    assert (await engine.status()).state == "ready"


async def test_events_tell_of_a_replica_that_leaves_and_returns(three: Cluster, engine: Engine) -> None:
    seen: list[tuple[str, str]] = []
    async with EngineClient(engine.control).events() as events:
        with trio.fail_after(30):
            async for event in events:
                seen.append((event.event, event.replica))
                if len(seen) == 3:
                    three.kill("r2")
                    await thread(write, engine.device.path, 0, b"z" * BLOCK)
                elif event.event == "replica_left":
                    three.start("r2")
                elif event.event == "replica_in_sync" and len(seen) > 3:
                    break
    assert seen[:3] == [("replica_in_sync", name) for name in three.names]
    assert [event for event in seen[3:] if event[0] != "resync_progress"] == [
        ("replica_left", "r2"),
        ("replica_resyncing", "r2"),
        ("replica_in_sync", "r2"),
    ]


async def test_an_engine_that_is_gone_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(EngineUnreachableError, match="does not answer"):
        await EngineClient(tmp_path / "nothing").status()


async def test_another_engine_takes_over_the_file_under_load_and_nobody_sees_an_error(three: Cluster) -> None:
    engine = Engine(three, frontend="device")
    rng = Random(11)
    expected: dict[int, bytes] = {}
    stop = False

    def work(share: int) -> int:
        """Writes, syncs and reads back its own blocks; any error or wrong byte raises."""
        done = 0
        own = Random(share)
        fd = os.open(engine.device.path, os.O_RDWR)
        try:
            while not stop:
                block, data = own.randrange(share, three.size // BLOCK, 4), own.randbytes(BLOCK)
                os.pwrite(fd, data, block * BLOCK)
                expected[block] = data
                if own.random() < 0.2:
                    os.fsync(fd)
                known = own.randrange(share, three.size // BLOCK, 4)
                assert os.pread(fd, BLOCK, known * BLOCK) == expected.get(known, bytes(BLOCK))
                done += 1
        finally:
            os.close(fd)
        return done

    try:
        # the first close settles that no later one waits for an engine, as a child being born of this process would
        await thread(write, engine.device.path, 0, bytes(BLOCK))
        async with trio.open_nursery() as nursery:
            counts: list[int] = []

            async def worker(share: int) -> None:
                counts.append(await trio.to_thread.run_sync(work, share))

            for share in range(4):
                nursery.start_soon(worker, share)
            for _ in range(3):
                before = await engine.status()
                assert before.resumable
                await trio.sleep(rng.uniform(0.2, 0.5))
                await trio.to_thread.run_sync(engine.take_over, before)
                assert engine.first["event"] == "ready", engine.first
            await trio.sleep(0.3)
            stop = True
        assert min(counts) > 10
        status = await engine.status()
        assert status.incarnation == 4
        await until(lambda: three.store.read().in_sync == tuple(three.names))
        engine.process.send_signal(signal.SIGTERM)
        assert await engine.wait() == 0
    finally:
        stop = True
        engine.end()
    three.stop()
    three.assert_identical()
    content = three.contents("r1")
    for block, data in expected.items():
        assert content[block * BLOCK : (block + 1) * BLOCK] == data


async def test_an_engine_of_a_lower_incarnation_is_fenced_by_the_one_that_took_over(three: Cluster) -> None:
    engine = Engine(three, frontend="device")
    try:
        os.kill(engine.process.pid, signal.SIGSTOP)
        first = engine.process
        instances = {name: (await three.status(name)).instance for name in three.names}
        engine._start(msgspec.structs.replace(engine.config, incarnation=2, resume=True, instances=instances))
        assert engine.first["event"] == "ready"
        await thread(write, engine.device.path, 0, b"2" * BLOCK)
        os.kill(first.pid, signal.SIGCONT)
        with trio.fail_after(20):
            assert await trio.to_thread.run_sync(first.wait, abandon_on_cancel=True) == 3
        assert first.stdout is not None
        first.stdout.close()
    finally:
        engine.end()


async def test_a_replica_that_restarted_with_the_engine_does_not_count_for_the_one_that_takes_over(
    three: Cluster,
) -> None:
    engine = Engine(three, frontend="device")
    try:
        await thread(write, engine.device.path, 0, b"1" * BLOCK)
        before = await engine.status()
        three.kill("r1")
        three.start("r1")
        await thread(engine.take_over, before)
        assert engine.first["event"] == "ready", engine.first
        states = {replica.name: replica.state for replica in (await engine.status()).replicas}
        assert (states["r2"], states["r3"]) == ("in_sync", "in_sync")
        assert await thread(with_block, engine.device.path) == b"1" * BLOCK
        with trio.fail_after(20):
            while set(three.store.read().in_sync) != set(three.names):
                await trio.sleep(0.02)
        # it left and joined again: the record was written for both
        assert three.store.read().version >= 4
    finally:
        engine.end()


async def test_nobody_takes_over_when_every_replica_restarted(three: Cluster) -> None:
    engine = Engine(three, frontend="device")
    try:
        await thread(write, engine.device.path, 0, b"1" * BLOCK)
        before = await engine.status()
        engine.process.kill()
        three.abandon()
        three.start()
        await thread(engine.take_over, before)
        assert engine.first["class"] == "NoReplicaError"
        assert await engine.wait() == 4
    finally:
        engine.end()


def with_block(path: Path) -> bytes:
    with path.open("rb", buffering=0) as file:
        return file.read(BLOCK)


async def test_an_operation_over_the_control_socket_answers_its_result_or_its_error(
    three: Cluster, engine: Engine
) -> None:
    client = EngineClient(engine.control)
    assert await client.run(Resize(size=2 * three.size), Resized) == Resized(size=2 * three.size, before=three.size)
    assert (await engine.status()).size == (await thread(os.stat, engine.device.path)).st_size == 2 * three.size
    await thread(write, engine.device.path, 2 * three.size - BLOCK, b"g" * BLOCK)
    with pytest.raises(EngineOperationError, match="can only grow, not shrink") as caught:
        await client.run(Resize(size=three.size), Resized)
    assert caught.value.kind == "ResizeError"
