from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from engine.launch import ReplicaConfig, replica_argv
from engine.replica import __main__ as program
from engine.store import Store, create_replica, inspect_replica
from engine.wire import messages
from engine.wire.frame import FrameType, Status
from tests.disks import small_disk
from tests.engine.replica.client import KEY, UUID, connect
from tests.engine.replica.conftest import ReplicaProcess

MIB = 1 << 20


async def test_sigterm_leaves_in_order(replica: ReplicaProcess) -> None:
    async with connect(replica.address) as client:
        await client.open(1)
        await client.write(0, b"kept")
        assert replica.terminate() == 0
    assert not os.path.exists(replica.address.removeprefix("unix:"))
    store = Store.open(replica.directory)
    assert store.read(0, 4) == b"kept"
    assert store.maps.dirty_regions == 1  # only a CLOSE says that the other replicas have it too
    store.close()


async def test_a_kill_leaves_the_intents_to_inherit(replica: ReplicaProcess) -> None:
    async with connect(replica.address) as client:
        instance = client.instance
        await client.open(1)
        await client.track("r2")
        await client.write(3 * MIB, b"x" * 4096)
        await client.write(40 * MIB, b"y" * 4096)
        replica.kill()
    assert inspect_replica(replica.directory).dirty
    replica.start()
    async with connect(replica.address) as client:
        assert client.instance != instance
        opened = messages.decode((await client.open(1, 2))[5], messages.OpenReply)
        assert (opened.dirty_regions, opened.tracked) == (2, ("r2",))
        assert (await client.bitmap())[5] == (await client.bitmap("r2"))[5] == bytes((8, 0, 0, 0, 0, 1, 0, 0))
        assert (await client.read(3 * MIB, 4096))[5] == b"x" * 4096
        assert (await client.settled(1000))[1] == Status.OK
        assert (await client.status()).dirty_regions == 2
        assert (await client.settled(1000, inherited=True))[1] == Status.OK
        assert (await client.status()).dirty_regions == 0


@pytest.fixture
def piped(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server whose stdout and stderr are pipes to this test, and its address."""
    create_replica(tmp_path / "r1", volume="vol1", uuid=UUID, replica="r1", size=MIB)
    (tmp_path / "secret").write_text(KEY.hex())
    address = f"unix:{tmp_path}/s"
    config = ReplicaConfig(directory=str(tmp_path / "r1"), listen=address, secret_file=str(tmp_path / "secret"))
    argv = replica_argv(config, tmp_path / "c.json")
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert json.loads(process.stdout.readline()) == {"event": "listening", "address": address}
            yield process, address
        finally:
            process.kill()


async def test_it_outlives_whoever_reads_its_output(piped: tuple[subprocess.Popen[bytes], str]) -> None:
    process, address = piped
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    process.stderr.close()
    for _ in range(3):
        async with connect(address, key=None) as client:
            await client.stream.send_all(b"noise" * 100)
        async with connect(address) as client:
            assert (await client.open(1))[1] == Status.OK
    process.terminate()
    assert await trio.to_thread.run_sync(process.wait) == 0


async def test_nor_does_a_reader_that_sleeps_stop_it(piped: tuple[subprocess.Popen[bytes], str]) -> None:
    process, address = piped
    assert process.stderr is not None
    for _ in range(600):  # more lines than a pipe holds
        async with connect(address, key=None) as client:
            with contextlib.suppress(trio.BrokenResourceError):
                await client.stream.send_all(b"noise" * 100)
    with trio.fail_after(20):
        async with connect(address) as client:
            assert (await client.open(1))[1] == Status.OK
    process.terminate()
    lines = await trio.to_thread.run_sync(process.stderr.read)
    assert await trio.to_thread.run_sync(process.wait) == 0
    assert all(json.loads(line) for line in lines.splitlines())


def test_the_socket_is_private_and_a_stale_one_is_replaced(tmp_path: Path, replica: ReplicaProcess) -> None:
    path = replica.address.removeprefix("unix:")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    replica.kill()
    assert os.path.exists(path)
    replica.start()
    assert replica.terminate() == 0


@pytest.mark.parametrize(
    ("listen", "secret", "reason"),
    [
        ("unix:{base}/taken", None, "another process answers there"),
        ("unix:{base}/secret", None, "a file that is not a socket"),
        ("unix:relative", None, "must be absolute"),
        ("tcp:127.0.0.1:{port}", None, "Address already in use"),
        ("udp:1", None, "unknown scheme"),
        ("unix:{base}/s", "zz", "cannot read the volume's secret"),
    ],
)
def test_what_keeps_it_from_starting_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], listen: str, secret: str | None, reason: str
) -> None:
    create_replica(tmp_path / "r1", volume="vol1", uuid=UUID, replica="r1", size=MIB)
    (tmp_path / "secret").write_text(secret or KEY.hex())
    with socket.socket(socket.AF_UNIX) as taken, socket.create_server(("127.0.0.1", 0)) as port:
        taken.bind(str(tmp_path / "taken"))
        taken.listen(1)
        config = ReplicaConfig(
            directory=str(tmp_path / "r1"),
            listen=listen.format(base=tmp_path, port=port.getsockname()[1]),
            secret_file=str(tmp_path / "secret"),
        )
        argv = replica_argv(config, tmp_path / "c.json")
        assert program.main(argv[-1:]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert reason in json.loads(err)["reason"]
    Store.open(tmp_path / "r1").close()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "small", 8 * MIB, "tmpfs") as mounted:
        yield mounted


async def test_a_full_disk_refuses_writes_and_tears_nothing(tmp_path: Path, disk: Path) -> None:
    directory = disk / "r1"
    create_replica(directory, volume="vol1", uuid=UUID, replica="r1", size=64 * MIB)
    replica = ReplicaProcess(tmp_path, directory=directory).start()
    try:
        written = []
        async with connect(replica.address) as client:
            await client.open(1)
            for number in range(64):
                block = bytes((number + 1,)) * 262144
                reply = await client.write(number * MIB, block)
                if reply[1] != Status.OK:
                    assert (reply[1], os.strerror(errno.ENOSPC).encode() in reply[5]) == (Status.NO_SPACE, True)
                    break
                written.append(number)
            assert 20 < len(written) < 40
            while (await client.write(60 * MIB + len(written) * 4096, b"z" * 4096))[1] == Status.OK:
                written.append(0)
            assert (await client.flush())[1] == Status.OK
        # a new attachment needs metadata: it must come up, or nobody could ever delete anything
        replica.kill()
        replica.start()
        async with connect(replica.address) as client:
            assert (await client.open(2))[1] == Status.OK
            assert (await client.track("r2", "r3"))[1] == Status.OK
            for number in dict.fromkeys(written):
                assert (await client.read(number * MIB, 262144))[5] == bytes((number + 1,)) * 262144
            assert (await client.unmap(0, MIB))[1] == Status.OK
            assert (await client.write(30 * MIB + 4096, b"fits again"))[1] == Status.OK
            assert (await client.call(FrameType.CLOSE))[1] == Status.OK
        assert replica.terminate() == 0
        assert inspect_replica(directory).epoch == 2
    finally:
        if replica.process is not None:
            replica.kill()


def test_creating_on_a_full_disk_leaves_nothing(disk: Path) -> None:
    (disk / "ballast").write_bytes(bytes(8 * MIB - 16384))
    with pytest.raises(Exception, match="No space left on device"):
        create_replica(disk / "r1", volume="vol1", uuid=UUID, replica="r1", size=64 * MIB)
    assert [path.name for path in disk.iterdir()] == ["ballast"]
