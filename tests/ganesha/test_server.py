"""A real nfs-ganesha on loopback."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from ganesha import (
    ConfigError,
    DbusError,
    EventKind,
    Export,
    Ganesha,
    HealthError,
    MissingProgramError,
    Nfs4Error,
    ServerConfig,
    StartError,
    StopError,
    UpdateError,
    export_handle,
    find_leftovers,
    handle_carries_uuid,
    kill_leftovers,
    list_records,
    null_call,
    prune_records,
    run_ganesha,
)
from tests.ganesha import nfs40
from tests.ganesha.nfs40 import nfs_client

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="FSAL VFS opens files by handle, which needs root")

MakeConfig = Callable[..., ServerConfig]
Run = Callable[..., Any]


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def test_it_serves_and_stops(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    async with run_ganesha(config, run_dir=tmp_path / "run", epoch=1) as server:
        await server.wait_ready(10)
        await null_call("127.0.0.1", config.port, 2)
        assert await export_handle("127.0.0.1", config.port, "/vol1", 2)
        with pytest.raises(Nfs4Error):
            await export_handle("127.0.0.1", config.port, "/vol2", 2)
        assert not (await server.grace()).active
        (client,) = await server.clients()
        assert client.versions == ("4.0",)
        assert (await server.stats()).operations["NFSv40"] > 0
        pids = (server.pid, server.dbus_pid)
    assert server.returncode == 0
    assert not any(alive(pid) for pid in pids)
    with pytest.raises(HealthError):
        await null_call("127.0.0.1", config.port, 2)


def waits_in_kernel(pid: int) -> bool:
    """Whether a thread is in uninterruptible sleep, proc(5)."""
    stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return any(stat.rpartition(")")[2].split()[0] == "D" for stat in stats)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """run_ganesha in `tmp_path/run`, ready when entered."""

    @asynccontextmanager
    async def start(config: ServerConfig, epoch: int = 1, **options: Any) -> AsyncIterator[Ganesha]:
        async with run_ganesha(config, run_dir=tmp_path / "run", epoch=epoch, **options) as server:
            await server.wait_ready(10)
            yield server

    return start


async def test_a_port_in_use_is_named_as_the_reason(make_config: MakeConfig, run: Run) -> None:
    config = make_config()
    with trio.socket.socket() as other:
        await other.bind(("127.0.0.1", config.port))
        other.listen()
        with pytest.raises(StartError, match="in use"):
            async with run(config):
                pytest.fail("it came up")


async def test_another_server_on_the_port_is_not_taken_for_this_one(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    async with run_ganesha(config, run_dir=tmp_path / "one", epoch=1) as server:
        await server.wait_ready(10)
        with pytest.raises(StartError, match="in use"):
            async with run_ganesha(config, run_dir=tmp_path / "two", epoch=2) as second:
                await second.wait_ready(10)
        await server.null_call()


async def test_an_export_that_cannot_be_made_is_a_failed_start(make_config: MakeConfig, run: Run) -> None:
    config = make_config()
    shutil.rmtree(config.exports[0].path)
    with pytest.raises(StartError, match="No such file"):
        async with run(config):
            pytest.fail("it came up")


async def test_a_missing_program_is_named(make_config: MakeConfig, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *args, **kwargs: None)
    with pytest.raises(MissingProgramError, match="install the package nfs-ganesha"):
        async with run(make_config()):
            pytest.fail("it came up")


@pytest.mark.parametrize("epoch", [0, -1, 2**32])
async def test_an_epoch_has_32_bits(make_config: MakeConfig, run: Run, epoch: int) -> None:
    with pytest.raises(ConfigError, match="epoch"):
        async with run(make_config(), epoch):
            pytest.fail("it came up")


async def test_a_run_directory_too_deep_for_a_socket_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too long"):
        async with run_ganesha(make_config(), run_dir=tmp_path / ("x" * 100), epoch=1):
            pytest.fail("it came up")


async def test_a_server_that_dies_while_starting_is_noticed(make_config: MakeConfig, tmp_path: Path) -> None:
    async with run_ganesha(make_config(), run_dir=tmp_path / "run", epoch=1) as server:
        server.kill()
        with trio.fail_after(5), pytest.raises(StartError, match="-9"):
            await server.wait_ready(60)
        assert await server.wait() == -signal.SIGKILL


async def test_the_bodys_own_error_comes_out_as_it_is(make_config: MakeConfig, run: Run) -> None:
    with pytest.raises(KeyError, match="mine"):
        async with run(make_config()):
            raise KeyError("mine")


async def test_cancellation_stops_it(make_config: MakeConfig, run: Run) -> None:
    with trio.CancelScope() as scope:
        async with run(make_config()) as server:
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert server.returncode == 0


async def test_a_hung_server_is_killed(make_config: MakeConfig, run: Run) -> None:
    async with run(make_config(), stop_timeout=0.2) as server:
        os.kill(server.pid, signal.SIGSTOP)
        with trio.fail_after(5), pytest.raises(HealthError, match="within"):
            while True:  # the signal takes a moment to reach every thread
                await server.null_call(0.2)
    assert server.returncode == -signal.SIGKILL


async def test_it_has_a_session_of_its_own(make_config: MakeConfig, run: Run) -> None:
    async with run(make_config()) as server:
        assert os.getsid(server.pid) == server.pid
        assert os.getsid(server.dbus_pid) == server.dbus_pid


async def test_descriptors_are_inherited_and_stay_open(make_config: MakeConfig, run: Run) -> None:
    reader, writer = os.pipe()
    try:
        async with run(make_config(), keep_fds=[writer]) as server:
            mine, its = (os.readlink(f"/proc/{pid}/fd/{writer}") for pid in (os.getpid(), server.pid))
            assert mine == its
            os.close(writer)
            writer = -1
            os.set_blocking(reader, False)
            with pytest.raises(BlockingIOError):  # not the end: ganesha still has the other side
                os.read(reader, 1)
        assert os.read(reader, 1) == b""
    finally:
        os.close(reader)
        if writer >= 0:
            os.close(writer)


async def test_the_server_ends_with_its_bus(make_config: MakeConfig, run: Run) -> None:
    # libdbus exits the process when its bus goes away; whoever supervises must expect it.
    async with run(make_config()) as server:
        os.kill(server.dbus_pid, signal.SIGKILL)
        with trio.fail_after(5):
            assert await server.wait() == 1
        with pytest.raises(DbusError, match="unreachable"):
            await server.clients()


async def test_the_epoch_decides_verifiers_and_client_ids(make_config: MakeConfig, run: Run) -> None:
    config = make_config()

    async def numbers(epoch: int) -> tuple[int, bytes, bytes]:
        async with run(config, epoch) as server:
            prune_records(config.recovery_root)
            async with nfs_client(config.port) as client:
                client_id = await client.set_client_id(b"client")
                stateid, handle = await client.open(await client.lookup("/vol1"), "file")
                verifier = await client.write(handle, stateid, b"data")
                assert await client.commit(handle) == verifier
            server.kill()
            await server.wait()
        prune_records(config.recovery_root)
        return client_id, verifier, stateid[4:]

    first, again, other = await numbers(2**32 - 2), await numbers(2**32 - 2), await numbers(77)
    assert first == again
    assert all(one != another for one, another in zip(first, other, strict=True))
    assert (first[0] >> 32, other[0] >> 32) == (2**32 - 2, 77)


async def test_clients_reclaim_after_any_number_of_restarts(make_config: MakeConfig, run: Run) -> None:
    config = make_config()
    async with run(config, 1) as server:
        async with nfs_client(config.port) as client:
            await client.set_client_id(b"one")
            _, handle = await client.open(await client.lookup("/vol1"), "file")
            (seen,) = await server.clients()
            assert (seen.address, seen.versions, seen.client_ids) == ("127.0.0.1", ("4.0",), ("one",))
        server.kill()
        await server.wait()
    (record,) = list_records(config.recovery_root)
    renamed = record.path.with_name(record.path.name.removeprefix("::ffff:"))
    record.path.rename(renamed)  # as a node without IPv6 would have written it
    for epoch in (2, 3, 4):  # stock ganesha 4.3 forgets the client at the second restart within its grace
        async with run(config, epoch) as server:
            grace = await server.grace()
            assert grace.active
            assert grace.ends_at is not None
            assert (grace.reclaimed, grace.expected) == (0, 1)
            server.kill()
            await server.wait()
    async with run(config, 5) as server, nfs_client(config.port) as client, nfs_client(config.port) as other:
        await client.set_client_id(b"one")
        stateid, _ = await client.open(handle, "", reclaim=True)
        await client.write(handle, stateid, b"goes on in grace")
        await other.set_client_id(b"two")
        with pytest.raises(Nfs4Error) as refusal:
            await other.open(await other.lookup("/vol1"), "file")
        assert refusal.value.status == nfs40.GRACE
        kinds = set()
        with trio.fail_after(10):
            async for event in server.events:
                kinds.add(event.kind)
                if event.kind is EventKind.GRACE_ENDED:
                    break
        assert EventKind.GRACE_STARTED in kinds
        assert not (await server.grace()).active
        await other.set_client_id(b"two", b"restart!")
        await other.open(await other.lookup("/vol1"), "file", owner=b"later")


async def test_in_grace_it_looks_often_for_clients_that_are_back(
    make_config: MakeConfig, run: Run, tmp_path: Path
) -> None:
    config = make_config(lease_lifetime=20, grace_period=30)  # by itself it looks every 10 s
    async with run(config, 1), nfs_client(config.port) as client:
        await client.set_client_id(b"one")
    async with run(config, 2) as server:
        with trio.fail_after(8):
            while looks(tmp_path) < 8:
                await trio.sleep(0.05)
        # what is the same is told once
        progress = 0
        with trio.move_on_after(1):
            async for event in server.events:
                progress += event.kind is EventKind.RECLAIM_PROGRESS
        assert progress == 1
        assert (await server.grace()).active
    async with run(config, 3) as server:
        await server.stop()
        assert server.returncode == 0


def looks(tmp_path: Path) -> int:
    return (tmp_path / "run" / "ganesha.log").read_text().count("check grace:reclaim complete")


@pytest.mark.parametrize("name", [b"plain", b"(1:x)", b"with/slash", b"\x01\xff", b"x" * 600])
async def test_records_are_read_and_pruned_as_ganesha_writes_them(
    make_config: MakeConfig, run: Run, name: bytes
) -> None:
    config = make_config()
    async with run(config) as server, nfs_client(config.port) as client:
        await client.set_client_id(name)
        (record,) = list_records(config.recovery_root)
        printable = name.isascii() and b"/" not in name and name.decode().isprintable()
        assert record.client_id == (name.decode() if printable else "0x" + name.hex())
        await server.stop()  # an orderly stop leaves them, too
        assert server.returncode == 0
    assert prune_records(config.recovery_root) == [record]
    async with run(config, 2) as server:
        assert not (await server.grace()).active


async def test_odd_names_are_served(make_config: MakeConfig, run: Run, tmp_path: Path) -> None:
    names = [
        "a b",
        "it's",
        'say "x"',
        "back\\slash",
        "tail\\",
        "#h;{}$HOME@x,=%y",
        "new\nline",
        "tab\t",
        "ünï",
        "*?[x]",
    ]
    exports = []
    for number, name in enumerate(names, 1):
        path = tmp_path / name / "data"
        path.mkdir(parents=True)
        (path / str(number)).touch()
        exports.append(Export(export_id=number, path=path, pseudo=f"/{name}"))
    config = make_config(identity="#'; }", exports=tuple(exports), recovery_root=tmp_path / 're"cov; }\\')
    async with run(config), nfs_client(config.port) as client:
        assert await client.names() == set(names)
        for number, name in enumerate(names, 1):
            assert await client.names(await client.lookup(name)) == {str(number)}
        await client.set_client_id(b"x")
        assert len(list_records(config.recovery_root)) == 1


@pytest.mark.parametrize(
    ("bind", "allow", "inside", "outside"),
    [
        ("127.0.0.1", "127.0.0.2/31", "127.0.0.3", "127.0.0.4"),
        ("0.0.0.0", "127.0.0.2", "127.0.0.2", "127.0.0.1"),
        ("127.0.0.1", "0.0.0.0/0", "127.0.0.9", None),
        ("::", "127.0.0.2", "127.0.0.2", "::1"),
        ("::", "::1/128", "::1", "127.0.0.1"),
        ("::1", "::/0", "::1", None),
    ],
)
async def test_the_access_list_hides_the_export(
    make_config: MakeConfig, run: Run, bind: str, allow: str, inside: str, outside: str | None
) -> None:
    if ":" in bind:
        try:
            socket.getaddrinfo("::1", None, flags=socket.AI_ADDRCONFIG)
        except OSError:
            pytest.skip("no IPv6 here")
    config = make_config(bind=bind, allow=(allow,))
    async with run(config):
        for source in filter(None, (inside, outside)):
            host = "::1" if ":" in source else "127.0.0.1"
            async with nfs_client(config.port, host=host, source=source) as client:
                if source == inside:
                    assert await client.names() == {"vol1"}
                    assert await client.lookup("/vol1")
                else:
                    assert await client.names() == set()
                    with pytest.raises(Nfs4Error) as refusal:
                        await client.lookup("/vol1")
                    assert refusal.value.status == nfs40.NOENT


async def test_exports_change_while_clients_hold_files(make_config: MakeConfig, run: Run, tmp_path: Path) -> None:
    config = make_config(attr_expiration=0)
    (base,) = config.exports
    base.path.chmod(0o777)
    path = base.path

    def changed(**changes: object) -> list[Export]:
        return [msgspec.structs.replace(base, **changes)]

    async with (
        run(config) as server,
        nfs_client(config.port) as one,
        nfs_client(config.port, source="127.0.0.2") as two,
    ):
        await one.set_client_id(b"one")
        await two.set_client_id(b"two")
        root = await one.lookup("/vol1")
        stateid, handle = await one.open(root, "file")
        await one.write(handle, stateid, b"data")

        await server.update_exports(changed(allow=("127.0.0.2",)))
        assert await one.names() == set()
        assert await two.names() == {"vol1"}
        with pytest.raises(Nfs4Error):
            await one.write(handle, stateid, b"more")

        await server.update_exports(changed(read_only=True))
        with pytest.raises(Nfs4Error) as refusal:
            await two.open(root, "new")
        assert refusal.value.status == nfs40.ROFS

        (path / "file").chmod(0o666)
        await server.update_exports(changed(squash="all", anonymous_uid=4711))
        await one.write(handle, stateid, b"back")
        await two.open(root, "squashed", owner=b"second")
        assert (path / "squashed").stat().st_uid == 4711

        extra = Export(export_id=2, path=tmp_path, pseudo="/vol2")
        await server.update_exports([base, extra])
        assert await one.names() == {"vol1", "vol2"}
        await one.write(handle, stateid, b"data")
        await server.update_exports([base])
        assert await one.names() == {"vol1"}
        assert server.config.exports == (base,)

        with pytest.raises(ConfigError, match="another export id"):
            await server.update_exports(changed(path=tmp_path))
        with pytest.raises(UpdateError):
            await server.update_exports([base, msgspec.structs.replace(extra, path=tmp_path / "missing")])
        await one.write(handle, stateid, b"data")
        assert (path / "file").read_bytes() == b"data"


async def test_counters(make_config: MakeConfig, run: Run) -> None:
    config = make_config()
    async with run(config) as server, nfs_client(config.port) as client:
        await client.set_client_id(b"x")
        stateid, handle = await client.open(await client.lookup("/vol1"), "file")
        await client.write(handle, stateid, b"x" * 1000)
        stats = await server.stats()
        (mine,) = (row for row in stats.exports if row.export_id == 1)
        assert (mine.version, mine.write.operations, mine.write.bytes_transferred) == ("4.0", 1, 1000)
        assert 0 < mine.write.latency < 1
        assert stats.operations["NFSv40"] > 3


async def test_events_never_block_and_end_with_the_server(
    make_config: MakeConfig, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ganesha.process._EVENTS", 3)
    async with run(make_config()) as server:
        pass
    assert [event.message async for event in server.events][-1] == "NFS EXIT: regular exit"


@contextmanager
def mounted(image: Path, mountpoint: Path, fs_uuid: uuid.UUID) -> Iterator[str]:
    with image.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-U", str(fs_uuid), image], check=True)
    command = ["losetup", "--find", "--show", str(image)]
    device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        mountpoint.mkdir(exist_ok=True)
        subprocess.run(["mount", device, mountpoint], check=True)
        try:
            yield device
        finally:
            subprocess.run(["umount", mountpoint], check=True)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


async def test_handles_carry_the_uuid_of_a_device_with_a_past(
    make_config: MakeConfig, run: Run, tmp_path: Path
) -> None:
    for number in range(2):  # the second filesystem most often gets the first one's loop device
        fs_uuid = uuid.uuid4()
        with mounted(tmp_path / "image", tmp_path / "mount", fs_uuid):
            config = make_config(path=tmp_path / "mount" / "data", recovery_root=tmp_path / "mount" / "recovery")
            async with run(config, number + 1) as server:
                assert server.carries_uuid(1, fs_uuid)
                assert not server.carries_uuid(1, uuid.uuid4())
                assert not server.carries_uuid(2, fs_uuid)
                handle = await export_handle("127.0.0.1", config.port, "/vol1", 5)
            assert handle_carries_uuid(handle, fs_uuid)
            assert not handle_carries_uuid(handle, uuid.uuid4())


async def test_a_server_that_hangs_on_storage_is_told_from_a_dead_one(
    make_config: MakeConfig, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ganesha.children.KILL_TIMEOUT", 0.2)
    mountpoint = tmp_path / "mount"
    with mounted(tmp_path / "image", mountpoint, uuid.uuid4()):
        config = make_config(path=mountpoint / "data")
        async with run(config) as server, nfs_client(config.port) as client, trio.open_nursery() as nursery:
            await client.set_client_id(b"client")
            directory = await client.lookup("/vol1")
            await trio.run_process(["fsfreeze", "--freeze", str(mountpoint)])
            try:

                async def blocked() -> None:
                    with pytest.raises(HealthError):
                        await client.open(directory, "file")

                nursery.start_soon(blocked)
                await server.null_call()
                assert not (await server.grace()).active
                # Which operation it hangs in is seen from outside: the request is in, and the kernel waits.
                with trio.fail_after(5):
                    while not waits_in_kernel(server.pid):
                        await server.null_call()
                with pytest.raises(StopError, match=str(server.pid)):
                    await server.stop(0.2)
            finally:
                with trio.CancelScope(shield=True):
                    await trio.run_process(["fsfreeze", "--unfreeze", str(mountpoint)])
            assert await server.wait() == -signal.SIGKILL


async def test_a_server_outlives_its_starter_and_is_found(make_config: MakeConfig, run: Run, tmp_path: Path) -> None:
    config = make_config()
    script = f"""
import msgspec, trio, ganesha
from pathlib import Path
async def main():
    config = msgspec.json.decode({msgspec.json.encode(config, enc_hook=str)!r}, type=ganesha.ServerConfig,
                                 dec_hook=lambda kind, value: kind(value))
    async with ganesha.run_ganesha(config, run_dir=Path({str(tmp_path / "run")!r}), epoch=1) as server:
        await server.wait_ready(10)
        print("ready", flush=True)
        await trio.sleep_forever()
trio.run(main)
"""
    starter = await trio.lowlevel.open_process([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert starter.stdout is not None
    async with starter.stdout:
        try:
            assert (await starter.stdout.receive_some()).startswith(b"ready")
        finally:
            starter.kill()
            await starter.wait()
    await null_call("127.0.0.1", config.port, 5)
    leftovers = find_leftovers(tmp_path / "run")
    assert [leftover.program for leftover in leftovers] == ["ganesha.nfsd", "dbus-daemon"]
    assert find_leftovers(tmp_path / "ru") == []
    # The bus may already have gone with its only client.
    assert (await kill_leftovers(tmp_path / "run"))[0] == leftovers[0]
    assert find_leftovers(tmp_path / "run") == []
    async with run(config, 2):
        pass


async def test_one_that_is_tied_does_not_outlive_the_process_that_started_it(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """Nor does it end before, though threads of that process come and go."""
    config = make_config()
    script = f"""
import msgspec, os, trio, ganesha
from pathlib import Path
async def main():
    config = msgspec.json.decode({msgspec.json.encode(config, enc_hook=str)!r}, type=ganesha.ServerConfig,
                                 dec_hook=lambda kind, value: kind(value))
    read, write = os.pipe2(os.O_CLOEXEC)
    async with ganesha.run_ganesha(config, run_dir=Path({str(tmp_path / "run")!r}), epoch=1, keep_fds=(write,),
                                   tied=True) as server:
        await server.wait_ready(10)
        assert os.readlink(f"/proc/{{server.pid}}/fd/{{write}}") == os.readlink(f"/proc/self/fd/{{write}}")
        print(server.pid, flush=True)
        await trio.sleep_forever()
trio.run(main)
"""
    starter = await trio.lowlevel.open_process([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert starter.stdout is not None
    async with starter.stdout:
        try:
            pid = int((await starter.stdout.receive_some()).split()[0])
            # trio lets go of a thread that has had nothing to do for 10 s
            await trio.sleep(11)
            await null_call("127.0.0.1", config.port, 5)
            pidfd = os.pidfd_open(pid)
        finally:
            starter.kill()
            await starter.wait()
    try:
        with trio.fail_after(5):
            await trio.lowlevel.wait_readable(pidfd)
    finally:
        os.close(pidfd)
    await kill_leftovers(tmp_path / "run")


async def test_a_tied_one_stops_as_any_other(make_config: MakeConfig, run: Run) -> None:
    config = make_config()
    async with run(config, tied=True) as server:
        await null_call("127.0.0.1", config.port, 2)
        server.kill()
        assert await server.wait() == -signal.SIGKILL
    async with run(config, 2, tied=True) as server:
        pass
    assert server.returncode == 0


async def test_a_client_with_two_records_counts_once(make_config: MakeConfig, run: Run) -> None:
    config = make_config()
    for epoch in (1, 2):
        async with run(config, epoch) as server, nfs_client(config.port) as client:
            await client.set_client_id(b"client")
            server.kill()
            await server.wait()
    assert (config.recovery_root / "v4old" / "node0").is_dir()
    async with run(config, 3) as server:
        with trio.fail_after(5):
            async for event in server.events:
                if event.kind is EventKind.RECLAIM_PROGRESS:
                    assert event.reclaimed == (0, 1)
                    break


async def test_an_address_of_another_host_is_named_as_the_reason(make_config: MakeConfig, run: Run) -> None:
    with pytest.raises(StartError, match="Cannot assign requested address"):
        async with run(make_config(bind="192.0.2.1")):
            pytest.fail("it came up")


async def test_the_log_stays_bounded(
    make_config: MakeConfig, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ganesha.logs.LogTail.__init__.__kwdefaults__", {"max_bytes": 20_000})
    config = make_config(log_level="FULL_DEBUG")
    log = tmp_path / "run" / "ganesha.log"
    async with run(config) as server:
        with trio.fail_after(10):
            while not log.with_name("ganesha.log.1").exists():
                await server.null_call()
        await server.null_call()
    assert server.returncode == 0
