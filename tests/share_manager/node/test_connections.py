"""Connections of clients: read from the kernel, ended from afar, and the address that they lead to."""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from engine.records import Lease
from share_manager.errors import InvalidValueError
from share_manager.node.address import FloatingAddress, FloatingAddressError
from share_manager.node.agent import Watched, moved, parse_watched, stale
from share_manager.node.connections import Connection, established, parse_table, segment
from share_manager.node.sockets import end_one
from share_manager.share.drain import is_answered, is_idle

TABLE = (
    "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
    "   0: C800630A:0801 0B00630A:02C5 01 00000010:00000200 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0\n"
    "   1: C800630A:0801 0C00630A:02C6 06 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0\n"
    "   2: C800630A:0016 0B00630A:02C5 01 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0\n"
)
TABLE6 = (
    "  sl  local_address\n"
    "   0: 0000000000000000FFFF0000C800630A:0801 0000000000000000FFFF00000B00630A:02C5 01 00000000:00000000 00:0 0\n"
    "   1: B80D0120000000000000000001000000:0801 B80D0120000000000000000002000000:02C5 01 00000000:00000000 00:0 0\n"
)


def test_the_kernels_tables_are_read() -> None:
    assert parse_table(TABLE, 2049) == [Connection("10.99.0.200", "10.99.0.11", 709, 0x10, 0x200)]
    assert parse_table(TABLE6, 2049) == [
        Connection("10.99.0.200", "10.99.0.11", 709),
        Connection("2001:db8::1", "2001:db8::2", 709),
    ]
    one = parse_table(TABLE6, 2049)[1]
    assert Connection.parse(one.name) == one


def test_a_tickle_has_a_checksum_that_fits() -> None:
    for family, local, host in ((socket.AF_INET, "10.99.0.200", "10.99.0.11"), (socket.AF_INET6, "fd00::1", "fd00::2")):
        packed = socket.inet_pton(family, local), socket.inet_pton(family, host)
        made = segment(*packed, 2049, 709)
        assert struct.unpack_from("!HHII", made) == (2049, 709, 0, 0)
        assert made[13] == 0x10
        pseudo = b"".join(packed) + (
            struct.pack("!BBH", 0, 6, 20) if family == socket.AF_INET else struct.pack("!I3xB", 20, 6)
        )
        total = sum(struct.unpack(f"!{len(pseudo + made) // 2}H", pseudo + made))
        assert (total & 0xFFFF) + (total >> 16) == 0xFFFF


def test_connections_that_heard_nothing_since_the_switch_are_stale() -> None:
    listing = (
        "0      0      10.0.0.2:709     10.0.0.200:2049\n"
        "\t cubic rto:204 rtt:1/0.5 lastsnd:10 lastrcv:3000 lastack:10\n"
        "0      0      [fd00::2]:710    [fd00::200]:2049\n"
        "\t cubic rto:204 lastrcv:20 lastack:10\n"
    )
    assert stale(listing, 1.0) == [709]
    assert stale(listing, 0.0) == [709, 710]


def test_a_switch_is_another_epoch_that_serves() -> None:
    before = Lease(holder="a", epoch=3, phase="serving")
    assert not moved(None, before)
    assert not moved(before, Lease(holder="b", epoch=3, phase="taking"))
    assert moved(before, Lease(holder="b", epoch=4, phase="serving"))
    assert parse_watched("vol1=[fd00::1]:2049") == Watched("vol1", "fd00::1", 2049)
    with pytest.raises(InvalidValueError):
        parse_watched("vol1")


def test_an_address_is_an_address_with_its_prefix() -> None:
    found = FloatingAddress.parse("192.0.2.10/24", "eth0")
    assert (found.address, found.prefix) == ("192.0.2.10", 24)
    with pytest.raises(InvalidValueError):
        FloatingAddress.parse("192.0.2.300/24", "eth0")
    with pytest.raises(FloatingAddressError, match="cannot be set"):
        FloatingAddress("192.0.2.10", 24, "no-such-if").hold(1)


def test_idle_and_answered() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client, listener.accept()[0] as accepted:
            assert is_answered(port)
            client.sendall(b"a call")
            end = time.monotonic() + 5
            while is_answered(port) and time.monotonic() < end:
                time.sleep(0.01)
            assert [one.unread for one in established(port)] == [6]
            accepted.recv(6)
            assert is_answered(port)
    with subprocess.Popen(["sleep", "30"]) as process:
        end = time.monotonic() + 5
        while not is_idle(process.pid) and time.monotonic() < end:
            time.sleep(0.01)
        assert is_idle(process.pid)
        process.kill()
    assert not is_idle(process.pid)


@pytest.fixture
def space(root: None) -> Iterator[Path]:
    """A network namespace with an interface, entered for the time of the test by this thread's children only."""
    name = f"sm-test-{time.time_ns() % 10**9}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    subprocess.run(["ip", "-n", name, "link", "add", "d0", "type", "bridge"], check=True)
    subprocess.run(["ip", "-n", name, "link", "set", "d0", "up"], check=True)
    yield Path("/run/netns", name)
    subprocess.run(["ip", "netns", "delete", name], check=True)


@pytest.mark.system
def test_the_kernel_drops_an_address_that_nobody_prolongs(space: Path) -> None:
    script = (
        "import subprocess, time\n"
        "from share_manager.node.address import FloatingAddress\n"
        "def there(): return '192.0.2.10' in subprocess.run(['ip', 'address'], capture_output=True, text=True).stdout\n"
        "address = FloatingAddress.parse('192.0.2.10/24', 'd0')\n"
        "address.drop(); address.hold(2); address.announce()\n"
        "assert there()\n"
        "time.sleep(1.2); address.hold(2); time.sleep(1.2)\n"
        "assert there()\n"
        "end = time.monotonic() + 8\n"
        "while there() and time.monotonic() < end: time.sleep(0.1)\n"
        "assert not there()\n"
        "address.hold(60); address.drop()\n"
        "assert not there()\n"
    )
    argv = ["nsenter", f"--net={space}", "--", sys.executable, "-c", script]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.system
async def test_a_connection_is_ended_by_its_local_port(root: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with (
            socket.create_connection(("127.0.0.1", port)) as doomed,
            socket.create_connection(("127.0.0.1", port)) as other,
        ):
            assert await end_one("127.0.0.1", port, doomed.getsockname()[1])
            doomed.settimeout(5)
            with pytest.raises(OSError):
                await trio.to_thread.run_sync(doomed.recv, 1)
            other.settimeout(0.2)
            with contextlib.suppress(TimeoutError):
                assert other.recv(1) == b"no answer, and no error either"
