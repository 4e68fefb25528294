"""HTTP/1.1 over TLS for trio: what the client needs of it, with h11. Cancelling anything here closes its connection."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
from collections.abc import AsyncIterator, Mapping
from urllib.parse import urlsplit

import h11
import trio

from share_manager.kube.errors import AccessError

CONNECT_TIMEOUT = 3.0
MAX_IDLE = 8
_CHUNK = 65536
# a server that is gone without a word ends a watch after idle + interval * count seconds; writes after the user timeout
_SOCKET_OPTIONS = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 10_000),
)


class HttpError(Exception):
    """No answer, or not the whole of one. Never leaves the client."""


class Response:
    """`body()` or, piece by piece, `chunk()`."""

    def __init__(self, connection: _Connection, status: int, headers: dict[str, str]) -> None:
        self.status = status
        self.headers = headers
        self._connection = connection

    async def chunk(self) -> bytes:
        """What has come since; nothing at the end. Raises HttpError."""
        return await self._connection.chunk()

    async def body(self, limit: int) -> bytes:
        """Raises HttpError, also for one of more than `limit` bytes."""
        parts = bytearray()
        while chunk := await self._connection.chunk():
            parts += chunk
            if len(parts) > limit:
                raise HttpError(f"an answer of more than {limit} bytes")
        return bytes(parts)


class Http:
    """Connections to one server, kept for the next request when all of an answer was read."""

    def __init__(self, server: str, tls: ssl.SSLContext, user_agent: str) -> None:
        """`server` as https://host:port. Raises AccessError."""
        try:
            url = urlsplit(server)
            self._host, self._port = url.hostname or "", url.port or 443
        except ValueError as error:
            raise AccessError(server, str(error)) from error
        if url.scheme != "https" or not self._host:
            raise AccessError(server, "write it as https://host:port")
        self._prefix = url.path.rstrip("/")
        self._tls = tls
        self._headers = {"Host": url.netloc, "User-Agent": user_agent, "Accept": "application/json"}
        self._idle: list[_Connection] = []

    @contextlib.asynccontextmanager
    async def request(
        self, method: str, target: str, headers: Mapping[str, str], body: bytes | None = None
    ) -> AsyncIterator[Response]:
        """The answer, as far as its headers. Raises HttpError."""
        connection = self._take() or await self._connect()
        try:
            length = {"Content-Length": str(len(body))} if body is not None else {}
            whole = [*self._headers.items(), *headers.items(), *length.items()]
            yield await connection.ask(method, self._prefix + target, whole, body or b"")
            if connection.reusable() and len(self._idle) < MAX_IDLE:
                self._idle.append(connection)
                return
        except BaseException:
            await connection.close()
            raise
        await connection.close()

    async def close(self) -> None:
        while self._idle:
            await self._idle.pop().close()

    def _take(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if not connection.gone():
                return connection
            connection.drop()
        return None

    async def _connect(self) -> _Connection:
        with trio.move_on_after(CONNECT_TIMEOUT):
            try:
                plain = await trio.open_tcp_stream(self._host, self._port)
            except OSError as error:
                raise HttpError(_words(error)) from error
            for option in _SOCKET_OPTIONS:
                plain.setsockopt(*option)
            stream = trio.SSLStream(plain, self._tls, server_hostname=self._host, https_compatible=True)
            try:
                await stream.do_handshake()
            except (trio.BrokenResourceError, OSError) as error:
                await trio.aclose_forcefully(stream)
                raise HttpError(_words(error)) from error
            except BaseException:
                await trio.aclose_forcefully(stream)
                raise
            return _Connection(stream, plain)
        raise HttpError(f"no connection to {self._host}:{self._port} within {CONNECT_TIMEOUT:g} s")


class _Connection:
    def __init__(self, stream: trio.SSLStream[trio.SocketStream], plain: trio.SocketStream) -> None:
        self._stream = stream
        self._socket = plain.socket
        self._http = h11.Connection(our_role=h11.CLIENT)

    async def ask(self, method: str, target: str, headers: list[tuple[str, str]], body: bytes) -> Response:
        request = h11.Request(method=method, target=target, headers=headers)
        raw = self._http.send(request) or b""
        if body:
            raw += self._http.send(h11.Data(data=body)) or b""
        raw += self._http.send(h11.EndOfMessage()) or b""
        try:
            await self._stream.send_all(raw)
        except (trio.BrokenResourceError, OSError) as error:
            raise HttpError(_words(error)) from error
        event = await self._next()
        while isinstance(event, h11.InformationalResponse):
            event = await self._next()
        if not isinstance(event, h11.Response):
            raise HttpError("the connection ended before the answer did")
        found = {name.decode("ascii"): value.decode("latin-1") for name, value in event.headers}
        return Response(self, event.status_code, found)

    async def chunk(self) -> bytes:
        while True:
            if self._http.their_state is h11.DONE:
                return b""
            event = await self._next()
            if isinstance(event, h11.Data):
                return bytes(event.data)
            if isinstance(event, h11.EndOfMessage):
                return b""
            raise HttpError("the connection ended before the answer did")

    async def _next(self) -> object:
        ended = False
        try:
            while (event := self._http.next_event()) is h11.NEED_DATA:
                some = bytes(await self._stream.receive_some(_CHUNK))
                ended = not some
                self._http.receive_data(some)
        except h11.RemoteProtocolError as error:
            raise HttpError("the connection ended before the answer did" if ended else str(error)) from error
        except (trio.BrokenResourceError, OSError) as error:
            raise HttpError(_words(error)) from error
        return event

    def reusable(self) -> bool:
        """Makes it ready for the next request."""
        if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            return False
        self._http.start_next_cycle()
        return True

    def gone(self) -> bool:
        """A server says nothing unasked but that it closes."""
        return bool(select.select([self._socket], [], [], 0)[0])

    def drop(self) -> None:
        self._socket.close()

    async def close(self) -> None:
        with trio.CancelScope(shield=True):
            await trio.aclose_forcefully(self._stream)


def _words(error: BaseException) -> str:
    """What a person can use of it: the reason below trio's, if there is one."""
    found: BaseException = error
    while found.__cause__ is not None:
        found = found.__cause__
    if isinstance(found, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {found.verify_message}"
    if isinstance(found, OSError) and found.strerror:
        return found.strerror
    if isinstance(found, ExceptionGroup):
        return ", ".join(dict.fromkeys(_words(one) for one in found.exceptions))
    return str(found) or type(found).__name__
