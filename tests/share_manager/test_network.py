"""The rules of a share's port, in a network namespace of the test's own."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
import trio

from ganesha import Reach
from share_manager.errors import NetworkError
from share_manager.share.network import GatedNetwork, NetworkOptions, ShareNetwork, ruleset, share_network
from share_manager.share.network.gate import seen
from share_manager.share.network.namespace import _make, own_namespace
from share_manager.share.network.nft import Nft, nftables

pytestmark = pytest.mark.system

PORT = 2049
HERE = "127.0.0.1"


@pytest.fixture
def namespace() -> Iterator[int]:
    fd = _make()
    subprocess.run(
        ["nsenter", f"--net=/proc/self/fd/{fd}", "--", "ip", "link", "set", "lo", "up"], check=True, pass_fds=(fd,)
    )
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.fixture
def nft(namespace: int) -> Iterator[Nft]:
    with nftables(namespace) as made:
        yield made


@pytest.fixture
def gated(nft: Nft, namespace: int) -> Iterator[GatedNetwork]:
    nft.run(ruleset.setup(PORT, 7, ()))
    with nftables(namespace) as pulse:
        pulse.run(ruleset.pulse(PORT))
        yield GatedNetwork(nft, PORT, namespace, 7)


class Peers:
    """A server and its clients, in the namespace."""

    def __init__(self, namespace: int) -> None:
        self._namespace = namespace
        self.sockets: list[socket.socket] = []
        self.server = self._made()
        self.server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.server.bind((HERE, PORT))
        self.server.listen()

    def _made(self, mark: int = 0) -> socket.socket:
        self.sockets.append(Reach(self._namespace, mark).socket(socket.AF_INET))
        self.sockets[-1].settimeout(0.3)
        return self.sockets[-1]

    def connect(self, mark: int = 0) -> tuple[socket.socket, socket.socket]:
        """Both ends. Raises TimeoutError when nothing gets through."""
        client = self._made(mark)
        client.connect((HERE, PORT))
        accepted, _ = self.server.accept()
        self.sockets.append(accepted)
        accepted.settimeout(0.3)
        return client, accepted

    def reaches(self, mark: int = 0) -> bool:
        try:
            self.connect(mark)
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()


@pytest.fixture
def peers(namespace: int) -> Iterator[Peers]:
    made = Peers(namespace)
    yield made
    made.close()


def test_the_gate_is_shut_opens_and_shuts_by_itself(gated: GatedNetwork, peers: Peers) -> None:
    assert not peers.reaches()
    # what the share manager itself asks gets through
    assert peers.reaches(ruleset.OWN_MARK)
    gated.open_for(1.0)
    client, server = peers.connect()
    client.sendall(b"asked")
    assert server.recv(10) == b"asked"
    time.sleep(1.1)
    server.sendall(b"answer")
    with pytest.raises(TimeoutError):
        client.recv(10)
    assert not peers.reaches()


def test_a_renewal_extends_and_silence_ends_it(gated: GatedNetwork, peers: Peers) -> None:
    gated.open_for(0.5)
    gated.open_for(30)
    time.sleep(0.6)
    client, server = peers.connect()
    gated.silence()
    server.sendall(b"answer")
    with pytest.raises(TimeoutError):
        client.recv(10)
    gated.open_until(time.monotonic() - 1)
    assert not peers.reaches()
    gated.open_until(float("inf"))
    assert peers.reaches()


def test_answers_get_out_when_nothing_gets_in_any_more(gated: GatedNetwork, peers: Peers) -> None:
    gated.open_for(30)
    client, server = peers.connect()
    gated.refuse_new()
    client.sendall(b"asked")
    server.sendall(b"answer")
    assert client.recv(10) == b"answer"
    with pytest.raises(TimeoutError):
        server.recv(10)


def test_the_gate_does_not_open_under_a_permit_that_has_ended(nft: Nft, gated: GatedNetwork, peers: Peers) -> None:
    nft.run(ruleset.permit(PORT))
    time.sleep(ruleset.PERMIT + 0.05)
    with pytest.raises(NetworkError):
        nft.run(ruleset.open_gate(PORT, 30))
    assert not peers.reaches()
    nft.run(ruleset.permit(PORT))
    nft.run(ruleset.open_gate(PORT, 30))
    # it is used up
    with pytest.raises(NetworkError):
        nft.run(ruleset.open_gate(PORT, 60))
    assert peers.reaches()


def test_a_server_that_dies_says_nothing_until_the_next_one_is_there(gated: GatedNetwork, peers: Peers) -> None:
    gated.open_for(60)
    client, server = peers.connect()
    server.close()
    with pytest.raises(TimeoutError):
        client.recv(1)
    gated.silence()
    gated.open_for(60)
    # the next life: the kernel's word about the old connection gets out
    client.settimeout(5)
    assert client.recv(1) == b""


def test_a_reset_that_would_not_be_sent_again_gets_out(gated: GatedNetwork, peers: Peers) -> None:
    gated.open_for(60)
    client, server = peers.connect()
    client.sendall(b"not read, so the close is a reset")
    time.sleep(0.05)
    server.close()
    with pytest.raises(ConnectionResetError):
        client.recv(1)


def test_nobody_is_refused_before_the_port_is_silenced(gated: GatedNetwork, peers: Peers) -> None:
    gated.open_for(60)
    peers.server.close()
    assert not peers.reaches()


def test_a_server_that_closes_an_idle_connection_is_a_little_late(gated: GatedNetwork, peers: Peers) -> None:
    gated.open_for(60)
    client, server = peers.connect()
    server.close()
    began = time.monotonic()
    client.settimeout(5)
    assert client.recv(1) == b""
    assert ruleset.HOLD <= time.monotonic() - began < 4


def test_a_client_that_closes_is_answered_at_once(gated: GatedNetwork, peers: Peers) -> None:
    gated.open_for(60)
    client, server = peers.connect()
    client.shutdown(socket.SHUT_WR)
    assert server.recv(1) == b""
    server.close()
    assert client.recv(1) == b""


async def test_the_list_of_clients_changes_while_they_are_connected(gated: GatedNetwork, peers: Peers) -> None:
    gated.open_for(60)
    client, server = peers.connect()
    await gated.set_allowed(["10.0.0.0/8", "fd00::/8", "10.1.0.0/16"])
    client.sendall(b"asked")
    with pytest.raises(TimeoutError):
        server.recv(10)
    assert not peers.reaches()
    await gated.set_allowed([f"{HERE}/32"])
    assert peers.reaches()
    await gated.set_allowed(())
    assert peers.reaches()


def test_clients_are_seen_at_their_own_addresses(gated: GatedNetwork, peers: Peers) -> None:
    assert gated.clients() == ()
    gated.open_for(60)
    ends = [peers.connect()[0].getsockname()[1] for _ in range(2)]
    (client,) = gated.clients()
    assert (client.address, client.ports) == (HERE, tuple(sorted(ends)))
    assert abs(client.last_seen - time.time()) < 3


def test_what_nft_lists_is_read() -> None:
    element = '{"elem": {"val": {"concat": ["10.0.0.9", 709]}, "expires": 58}}'
    listing = f'{{"nftables": [{{"metainfo": {{}}}}, {{"set": {{"elem": [{element}]}}}}]}}'
    assert list(seen(f"{listing}\n\n{{}}")) == [("10.0.0.9", 709, 58)]


def test_another_share_manager_begins_with_a_shut_gate(nft: Nft, gated: GatedNetwork, peers: Peers) -> None:
    gated.open_for(60)
    assert peers.reaches()
    nft.run(ruleset.setup(PORT, 8, ()))
    assert not peers.reaches()
    nft.run(ruleset.remove(PORT))
    nft.run(ruleset.remove(PORT))
    assert peers.reaches()


HELD = """
import time
from share_manager.share.network import ruleset
from share_manager.share.network.nft import nftables
with nftables(int({fd})) as nft, nftables(int({fd})) as pulse:
    nft.run(ruleset.setup(2049, 7, ()))
    pulse.run(ruleset.pulse(2049))
    nft.run(ruleset.permit(2049) + ruleset.open_gate(2049, 60))
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_process_that_is_killed_is_silent_at_once(peers: Peers, namespace: int) -> None:
    """The gate is open for a minute still, and the server has much to say."""
    script = HELD.format(fd=namespace)
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, pass_fds=(namespace,))
    out = holder.stdout
    assert out is not None
    try:
        assert out.readline() == b"ready\n"
        client, server = peers.connect()
        server.sendall(b"answer")
        assert client.recv(10) == b"answer"
    finally:
        holder.kill()
        holder.wait()
        out.close()
    server.sendall(b"more")
    with pytest.raises(TimeoutError):
        client.recv(10)
    server.close()
    with pytest.raises(TimeoutError):
        client.recv(10)
    # not even a refusal
    peers.server.close()
    assert not peers.reaches()


STOPPED = """
import os, time
from share_manager.share.network import GatedNetwork, gate, ruleset
from share_manager.share.network.nft import nftables
with nftables(int({fd})) as nft:
    network = GatedNetwork(nft, 2049, None, 7)
    real = gate.time.monotonic
    print("ready", flush=True)
    while True:
        network.open_until(real() + 1.0)
        time.sleep(0.05)
"""


def test_a_process_that_is_stopped_falls_silent_in_time(gated: GatedNetwork, peers: Peers, namespace: int) -> None:
    script = STOPPED.format(fd=namespace)
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, pass_fds=(namespace,))
    out = holder.stdout
    assert out is not None
    try:
        assert out.readline() == b"ready\n"
        while not peers.reaches():
            time.sleep(0.01)
        client, server = peers.connect()
        holder.send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        answered = stopped
        while time.monotonic() < stopped + 2.0:
            client.send(b".")
            try:
                server.recv(100)
            except TimeoutError:
                continue
            answered = time.monotonic()
            time.sleep(0.02)
        assert 0.5 < answered - stopped < 1.0 + ruleset.PERMIT + 0.1
    finally:
        holder.kill()
        holder.wait()
        out.close()


async def test_a_namespace_of_its_own_has_the_address_and_goes(namespace: int, restore: Callable[[], None]) -> None:
    """Made from inside of another one, which stands for the machine."""
    ctypes.CDLL(None).setns(namespace, 0x40000000)

    async def nobody(networks: object) -> None:
        raise AssertionError(networks)

    for words in ("link add br0 type bridge", "address add 10.6.0.1/24 dev br0", "link set br0 up"):
        subprocess.run(["ip", *words.split()], check=True)
    for bridge, address in (("", "10.7.0.9/24"), ("br0", "10.6.0.9/24")):
        options = NetworkOptions(mode="own", address=address, bridge=bridge)
        async with share_network(options, volume="vol1", port=PORT, allowed=(), apply_allowed=nobody) as network:
            await _is_reached(network, address.partition("/")[0])
        left = subprocess.run(["ip", "-br", "link"], capture_output=True, text=True, check=True).stdout
        assert "@" not in left
    with pytest.raises(NetworkError, match="cannot be set up"):
        async with own_namespace("vol1", "10.6.0.9/24", "no-such-bridge", ""):
            pass


async def _is_reached(network: ShareNetwork, address: str) -> None:
    with Reach(network.namespace).socket(socket.AF_INET) as server:
        server.bind((address, PORT))
        server.listen()
        server.settimeout(5)
        network.open_for(30)
        with socket.create_connection((address, PORT), 5):
            accepted, peer = await trio.to_thread.run_sync(server.accept)
            accepted.close()
        # to the server all clients have one address, and the network knows where they are
        assert peer[0] == ruleset.CONSTANT_V4
        clients = network.clients()
        assert clients is not None
        assert [client.address for client in clients] == ["10.6.0.1"]


@pytest.fixture
def restore() -> Iterator[Callable[[], None]]:
    """The test moves this thread to another namespace."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    def back() -> None:
        ctypes.CDLL(None).setns(before, 0x40000000)

    try:
        yield back
    finally:
        back()
        os.close(before)
