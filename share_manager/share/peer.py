"""Processes for one volume ask each other, without the record server, whether the one that has the lease still serves.

A holder that only the record server has lost must not lose the volume. The messages travel as those of the record
server do (engine/records/channel.py), under the volume's secret.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec
import trio

from engine.address import Address
from engine.errors import EngineError
from engine.records import channel
from engine.records.channel import Channel
from engine.records.messages import decode, encode
from engine.records.server import read_message
from engine.replica.listener import listen

EVERY = 0.5
TIMEOUT = 1.0
IDLE = 30.0
HEADER_TIMEOUT = 10.0
_NO_ANSWER = (OSError, EngineError, trio.BrokenResourceError, trio.TooSlowError)


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """`header`: whether the LUKS header is wanted as well."""

    volume: str
    header: bool = False


class Alive(msgspec.Struct, frozen=True, kw_only=True):
    """`instance` as in the lease; `serving`: it has the volume, as far as it knows, and clients get answers. `header`:
    the begin of an encrypted volume's device, with all that its passphrases open the volume key by."""

    instance: str
    serving: bool
    header: bytes = b""


async def answer_peers(
    host: str,
    secret: bytes,
    alive: Callable[[], Alive],
    header: Callable[[], Awaitable[bytes]],
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Until cancelled. Tells the address. Raises EngineError when it cannot listen."""
    listener = listen(Address.parse(f"tcp:{f'[{host}]' if ':' in host else host}:0"))

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            with contextlib.suppress(EngineError, trio.BrokenResourceError, trio.TooSlowError):
                await _answer(stream, secret, alive, header)

    try:
        task_status.started(str(listener.address))
        await trio.serve_listeners(serve, [trio.SocketListener(trio.socket.from_stdlib_socket(listener.sock))])
    finally:
        listener.close()


async def _answer(
    stream: trio.SocketStream, secret: bytes, alive: Callable[[], Alive], header: Callable[[], Awaitable[bytes]]
) -> None:
    with trio.fail_after(TIMEOUT):
        _, body = await read_message(stream)
        client = channel.read_hello(body)
        server = channel.answer_hello(client)
        await stream.send_all(channel.plain(encode(server)))
    peer = Channel(secret, "server", client, server)
    while True:
        with trio.fail_after(IDLE):
            proof, body = await read_message(stream)
            peer.check(proof, body)
            answer = alive()
            if decode(body, Ask).header:
                answer = msgspec.structs.replace(answer, header=await header())
            await stream.send_all(peer.seal(encode(answer)))


@contextlib.asynccontextmanager
async def _connected(address: str, secret: bytes) -> AsyncIterator[Callable[[Ask], Awaitable[Alive]]]:
    """Raises OSError, EngineError, trio.BrokenResourceError, trio.TooSlowError."""
    target = Address.parse(address).target
    assert not isinstance(target, str)
    with trio.fail_after(TIMEOUT):
        stream = await trio.open_tcp_stream(*target)
    async with stream:
        with trio.fail_after(TIMEOUT):
            hello = channel.new_hello()
            await stream.send_all(channel.plain(encode(hello)))
            server = channel.read_hello((await read_message(stream))[1])
        peer = Channel(secret, "client", hello, server)

        async def ask(question: Ask) -> Alive:
            with trio.fail_after(HEADER_TIMEOUT if question.header else TIMEOUT):
                await stream.send_all(peer.seal(encode(question)))
                proof, body = await read_message(stream)
            peer.check(proof, body)
            return decode(body, Alive)

        yield ask


async def ask_peer(address: str, secret: bytes, volume: str, heard: Callable[[Alive], bool]) -> None:
    """Ask again and again, and pass on what is answered, until that returns False or nothing is answered."""
    with contextlib.suppress(*_NO_ANSWER):
        async with _connected(address, secret) as ask:
            while True:
                if not heard(await ask(Ask(volume=volume))):
                    return
                await trio.sleep(EVERY)


async def ask_header(address: str, secret: bytes, volume: str) -> bytes:
    """Empty when the peer does not say, or serves no encrypted volume."""
    with contextlib.suppress(*_NO_ANSWER):
        async with _connected(address, secret) as ask:
            return (await ask(Ask(volume=volume, header=True))).header
    return b""
