"""The record server: one request of a connection at a time; each change is on disk before it is answered."""

from __future__ import annotations

import socket
from collections import defaultdict
from pathlib import Path

import structlog
import trio

from engine.address import Address
from engine.errors import EngineError, ProtocolError
from engine.records import channel
from engine.records.channel import Channel
from engine.records.ledger import Ledger
from engine.records.messages import MAX_WATCH, Answer, AnyRequest, ReadLease, decode_request, encode
from engine.replica.listener import listen

log = structlog.get_logger()

HELLO_TIMEOUT = 5.0
IDLE_TIMEOUT = 120.0
ANSWER_TIMEOUT = 10.0
MAX_CONNECTIONS = 1024


class RecordServer:
    def __init__(self, ledger: Ledger, secret: bytes) -> None:
        self._ledger = ledger
        self._secret = secret
        self._one = trio.Lock()
        self._room = trio.Semaphore(MAX_CONNECTIONS)
        self._news: defaultdict[str, trio.Event] = defaultdict(trio.Event)
        self._changed: set[str] = set()
        ledger.changed = self._changed.add

    async def serve_connection(self, stream: trio.SocketStream) -> None:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        async with stream, self._room:
            try:
                await self._converse(stream)
            except EngineError as error:
                log.warning("connection ended", reason=str(error))
            except (trio.BrokenResourceError, trio.TooSlowError):
                pass

    async def _converse(self, stream: trio.SocketStream) -> None:
        """Raises EngineError, trio.BrokenResourceError, trio.TooSlowError."""
        with trio.fail_after(HELLO_TIMEOUT):
            _, body = await read_message(stream)
            client = channel.read_hello(body)
            server = channel.answer_hello(client)
            await stream.send_all(channel.plain(encode(server)))
        peer = Channel(self._secret, "server", client, server)
        patience = HELLO_TIMEOUT
        while True:
            with trio.fail_after(patience):
                proof, body = await read_message(stream)
            peer.check(proof, body)
            patience = IDLE_TIMEOUT
            answer = await self._answer(decode_request(body))
            with trio.fail_after(ANSWER_TIMEOUT):
                await stream.send_all(peer.seal(encode(answer)))

    async def _answer(self, request: AnyRequest) -> Answer:
        if isinstance(request, ReadLease) and request.patience > 0:
            with trio.move_on_after(min(request.patience, MAX_WATCH)):
                while self._ledger.lease_version(request.volume) == request.unless:
                    await self._news[request.volume].wait()
        async with self._one:
            # one that hangs up leaves the disk no half a change: the thread goes on, and nobody else begins meanwhile
            answer = await trio.to_thread.run_sync(self._ledger.answer, request)
        while self._changed:
            self._news.pop(self._changed.pop(), trio.Event()).set()
        return answer


async def read_message(stream: trio.SocketStream) -> tuple[bytes, bytes]:
    """Proof and body of the next message. Raises ProtocolError, trio.BrokenResourceError at the end of the stream."""
    length, proof = channel.split_prefix(await _exactly(stream, channel.PREFIX_SIZE))
    return proof, await _exactly(stream, length)


async def _exactly(stream: trio.SocketStream, size: int) -> bytes:
    buffer = bytearray()
    while len(buffer) < size:
        chunk = await stream.receive_some(min(size - len(buffer), 65536))
        if not chunk:
            if buffer:
                raise ProtocolError("a message was cut off")
            raise trio.BrokenResourceError("the peer hung up")
        buffer += chunk
    return bytes(buffer)


async def serve_records(
    directory: Path,
    secret: bytes,
    address: Address,
    task_status: trio.TaskStatus[Address] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Until cancelled. Tells the address, with the port that the kernel chose for port 0.

    Raises RecordError for what cannot be read, ListenError, OSError.
    """
    server = RecordServer(Ledger(directory), secret)
    listener = listen(address)
    try:
        listening = trio.SocketListener(trio.socket.from_stdlib_socket(listener.sock))
        task_status.started(listener.address)
        await trio.serve_listeners(server.serve_connection, [listening])
    finally:
        listener.close()
