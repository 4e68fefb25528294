"""The client at a server that is none of Kubernetes': garbage, half answers, closed connections. Real TLS."""

from __future__ import annotations

import ssl
import subprocess
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
import trio

from share_manager.kube.access import Access
from share_manager.kube.client import Client
from share_manager.kube.core import Node
from share_manager.kube.errors import AccessError, ApiAwayError, KubeError, NonsenseError

NODE = b'{"metadata":{"name":"n","resourceVersion":"1"}}'


def answer(body: bytes, status: str = "200 OK", length: int | None = None) -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (
        status.encode(),
        len(body) if length is None else length,
        body,
    )


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Certificate and key of a server at 127.0.0.1."""
    place = tmp_path_factory.mktemp("tls")
    certificate, key = place / "cert.pem", place / "key.pem"
    subject = ["-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    subprocess.run([*made, *subject, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    return certificate, key


class Server:
    """Says `replies` in turn, one for each request; None ends the connection."""

    def __init__(self, access: Access) -> None:
        self.access = access
        self.replies: list[bytes | None] = []
        self.connections = 0
        self.requests: list[bytes] = []

    async def serve(self, stream: trio.abc.Stream) -> None:
        self.connections += 1
        try:
            while True:
                request = b""
                while b"\r\n\r\n" not in request:
                    some = await stream.receive_some()
                    if not some:
                        return
                    request += some
                self.requests.append(request)
                reply = self.replies.pop(0)
                if reply is None:
                    return
                await stream.send_all(reply)
                if b"half" in reply:
                    return
        except trio.BrokenResourceError:
            return
        finally:
            await trio.aclose_forcefully(stream)


@pytest.fixture
async def server(pair: tuple[Path, Path], nursery: trio.Nursery) -> AsyncIterator[Server]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*pair)
    made: list[Server] = []

    async def handle(stream: trio.SSLStream[trio.SocketStream]) -> None:
        await made[0].serve(stream)

    listen = partial(trio.serve_ssl_over_tcp, handle, 0, context, host="127.0.0.1", https_compatible=True)
    (listener,) = await nursery.start(listen)
    port = listener.transport_listener.socket.getsockname()[1]
    made.append(Server(Access(server=f"https://127.0.0.1:{port}", authority=pair[0], token="t")))
    yield made[0]
    nursery.cancel_scope.cancel()


async def test_a_connection_is_used_again(server: Server) -> None:
    server.replies = [answer(NODE), answer(b"{}", "404 Not Found"), answer(NODE)]
    async with Client(server.access) as client:
        await client.get(Node, "n")
        assert await client.find(Node, "n") is None
        await client.get(Node, "n")
    assert server.connections == 1
    assert b"GET /api/v1/nodes/n HTTP/1.1" in server.requests[0]
    assert b"Bearer t" in server.requests[0]


async def test_one_that_was_closed_meanwhile_is_not(server: Server) -> None:
    server.replies = [answer(NODE.replace(b'"n"', b'"half"')), answer(NODE), None, answer(NODE)]
    async with Client(server.access) as client:
        await client.get(Node, "n")
        with trio.fail_after(10):
            while not client._http._idle[0].gone():
                await trio.sleep(0.01)
        await client.get(Node, "n")
        # whether a request was carried out whose answer did not come is not known, so it is not sent again
        with pytest.raises(ApiAwayError, match="ended before the answer did"):
            await client.get(Node, "n")
        await client.get(Node, "n")
    assert server.connections == 3


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (b"half of nonsense\r\n\r\n", ApiAwayError),
        (answer(b"half", length=500), ApiAwayError),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nhalf\r\n", ApiAwayError),
        (answer(b"<html>"), NonsenseError),
        (answer(b'{"metadata": 7}'), NonsenseError),
        (answer(b"\xff\xfe"), NonsenseError),
        (answer(b"[" * 5000), NonsenseError),
        (answer(b"<html>", "502 Bad Gateway"), ApiAwayError),
    ],
)
async def test_nonsense_is_one_line(server: Server, reply: bytes, kind: type[KubeError]) -> None:
    server.replies = [reply]
    async with Client(server.access, timeout=5) as client:
        with pytest.raises(kind) as caught:
            await client.get(Node, "n")
    assert "\n" not in str(caught.value)


async def test_a_call_that_is_cancelled_leaves_no_connection_behind(server: Server) -> None:
    server.replies = [b"", answer(NODE)]
    async with Client(server.access, timeout=30) as client, trio.open_nursery() as nursery:
        nursery.start_soon(client.get, Node, "n")
        with trio.fail_after(20):
            while not server.requests:
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await client.get(Node, "n")
    assert server.connections == 2


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "127.0.0.1", "https://:99999", "https://127.0.0.1:port"])
def test_a_server_that_is_none(url: str, pair: tuple[Path, Path]) -> None:
    with pytest.raises(AccessError):
        Client(Access(server=url, authority=pair[0]))
