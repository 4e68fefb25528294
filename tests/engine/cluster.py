"""Real replica servers, one process each, and their volume's record, in a directory of the test's."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import trio

from engine.address import Address
from engine.controller.connection import ReplicaConnection
from engine.controller.driver import Controller, attach
from engine.launch import ReplicaConfig, replica_argv
from engine.record import FileRecordStore, ReplicaRecord, VolumeRecord, bump_epoch
from engine.secret import create_secret, read_secret
from engine.store import create_replica
from engine.wire import messages
from engine.wire.frame import FrameType

UUID = "3c9c1b1e-6a53-4c0a-8d3b-1f1d0f0c7a11"


class Cluster:
    def __init__(
        self, directory: Path, replicas: int = 3, size: int = 16 << 20, tcp: bool = False, rest: float = 60.0
    ) -> None:
        self.directory = directory
        self.rest = rest
        self._ports = dict(enumerate(free_ports(replicas) if tcp else ()))
        self.size = size
        self.names = [f"r{i + 1}" for i in range(replicas)]
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.secret = directory / "secret"
        create_secret(self.secret)
        for name in self.names:
            create_replica(directory / name, volume="vol", uuid=UUID, replica=name, size=size)
        self.store = FileRecordStore(directory / "record.json")
        self.store.create(
            VolumeRecord(
                volume="vol",
                uuid=UUID,
                size=size,
                replicas=tuple(
                    ReplicaRecord(name=name, address=self.address(name), directory=str(directory / name))
                    for name in self.names
                ),
                in_sync=tuple(self.names),
            )
        )

    def new_replica(self, name: str) -> ReplicaRecord:
        """An empty replica of a volume that has data, its server started."""
        create_replica(self.directory / name, volume="vol", uuid=UUID, replica=name, size=self.size, rebuilding=True)
        if name not in self.names:
            self.names.append(name)
        self.start(name)
        return ReplicaRecord(name=name, address=self.address(name), directory=str(self.directory / name))

    def socket(self, name: str) -> Path:
        return self.directory / f"{name}.sock"

    def address(self, name: str) -> str:
        port = self._ports.get(self.names.index(name))
        return f"unix:{self.socket(name)}" if port is None else f"tcp:127.0.0.1:{port}"

    def start(self, *names: str) -> None:
        for name in names or self.names:
            config = ReplicaConfig(
                directory=str(self.directory / name),
                listen=self.address(name),
                secret_file=str(self.secret),
                rest=self.rest,
            )
            with (self.directory / f"{name}.log").open("ab") as log:
                self.processes[name] = subprocess.Popen(
                    replica_argv(config, self.directory / f"{name}.json"), stdout=subprocess.PIPE, stderr=log
                )
        for name in names or self.names:
            stdout = self.processes[name].stdout
            assert stdout is not None
            assert b"listening" in stdout.readline(), (self.directory / f"{name}.log").read_text()

    def kill(self, name: str) -> None:
        process = self.processes.pop(name)
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()

    def stop(self) -> None:
        for name in list(self.processes):
            self.processes[name].send_signal(signal.SIGCONT)
            self.processes[name].terminate()
        for name, process in self.processes.items():
            assert process.stdout is not None
            process.stdout.close()
            try:
                assert process.wait(10) == 0, f"{name} left with {process.returncode}"
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise
        self.processes.clear()

    def abandon(self) -> None:
        for name in list(self.processes):
            self.kill(name)

    @contextlib.asynccontextmanager
    async def attached(
        self, request_timeout: float = 8.0, store: FileRecordStore | None = None, right_lasts: float = 0.0
    ) -> AsyncIterator[Controller]:
        record = bump_epoch(self.store)
        controller = attach(
            store or self.store,
            read_secret(self.secret),
            epoch=record.epoch,
            open_timeout=5.0,
            request_timeout=request_timeout,
            reconnect_interval=0.05,
            right_lasts=right_lasts,
        )
        async with controller.running():
            yield controller

    async def status(self, name: str) -> messages.StatusReply:
        """What a replica says of itself, over a connection of its own."""
        address = Address.parse(self.address(name))
        connection = await ReplicaConnection.connect(name, 1, address, read_secret(self.secret))
        try:
            async with trio.open_nursery() as nursery:

                async def deliver() -> None:
                    while True:
                        await trio.lowlevel.wait_readable(connection.sock)
                        for frame in connection.receive():
                            connection.deliver(frame)

                nursery.start_soon(deliver)
                answer = await connection.call(FrameType.STATUS)
                nursery.cancel_scope.cancel()
        finally:
            connection.close()
        return messages.decode(answer[5], messages.StatusReply)

    def contents(self, name: str) -> bytes:
        return (self.directory / name / "volume-head-000.img").read_bytes()

    def assert_identical(self) -> None:
        contents = {name: self.contents(name) for name in self.names}
        first = contents[self.names[0]]
        for name, content in contents.items():
            if content != first:
                where = next(i for i in range(len(first)) if content[i] != first[i])
                raise AssertionError(f"{name} differs from {self.names[0]} at {where}")


def free_ports(count: int) -> list[int]:
    """Ports of the loopback address that nobody listens on; held together, so that they differ."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@contextlib.contextmanager
def cluster(
    directory: Path, replicas: int = 3, size: int = 16 << 20, tcp: bool = False, rest: float = 60.0
) -> Iterator[Cluster]:
    made = Cluster(directory, replicas, size, tcp, rest)
    try:
        made.start()
        yield made
    finally:
        made.abandon()


async def until(condition: object, timeout: float = 20.0, what: str = "the condition") -> None:
    """Wait until `condition()` is true, looking every few milliseconds. Raises AssertionError at the deadline."""
    assert callable(condition)
    with trio.move_on_after(timeout):
        while not condition():
            await trio.sleep(0.01)
        return
    raise AssertionError(f"{what} did not come true within {timeout} s")
