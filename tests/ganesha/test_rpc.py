import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from ganesha import HealthError, RpcError, handle_carries_uuid, null_call
from ganesha.rpc import Unpacker, pack_opaque, pack_uint

Handler = Callable[[trio.SocketStream], Awaitable[None]]


@asynccontextmanager
async def answering(handler: Handler) -> AsyncIterator[int]:
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, handler, [listener])
        yield listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


def answer(body: bytes) -> Handler:
    """Answers a call with a record that begins with its xid."""

    async def handler(stream: trio.SocketStream) -> None:
        request = await stream.receive_some()
        record = request[4:8] + body
        await stream.send_all(pack_uint(len(record) | 0x80000000) + record)
        await stream.receive_some()

    return handler


ACCEPTED = pack_uint(1) + pack_uint(0) + bytes(8) + pack_uint(0)


async def test_a_reply_is_taken() -> None:
    async with answering(answer(ACCEPTED)) as port:
        await null_call("127.0.0.1", port, 5)


async def test_a_reply_in_pieces_after_an_older_one_is_taken() -> None:
    async def handler(stream: trio.SocketStream) -> None:
        request = await stream.receive_some()
        older = b"\0\0\0\0" + ACCEPTED
        pieces = pack_uint(len(older) | 0x80000000) + older
        record = request[4:8] + ACCEPTED
        pieces += b"".join(pack_uint(4 | (0x80000000 * (at == 20))) + record[at : at + 4] for at in range(0, 24, 4))
        for at in range(0, len(pieces), 7):
            await stream.send_all(pieces[at : at + 7])
        await stream.receive_some()

    async with answering(handler) as port:
        await null_call("127.0.0.1", port, 5)


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b"", "truncated"),
        (pack_uint(0), "not a reply"),
        (pack_uint(1) + pack_uint(1), "denied"),
        (pack_uint(1) + pack_uint(0) + bytes(8) + pack_uint(1), "program unavailable"),
        (pack_uint(1) + pack_uint(0) + bytes(8) + pack_uint(99), "status 99"),
        (pack_uint(1) + pack_uint(0) + bytes(4) + pack_uint(400), "truncated"),
    ],
)
async def test_another_answer_is_an_error(body: bytes, complaint: str) -> None:
    async with answering(answer(body)) as port:
        with pytest.raises(RpcError, match=complaint):
            await null_call("127.0.0.1", port, 5)


async def test_garbage_is_an_error() -> None:
    async def http(stream: trio.SocketStream) -> None:
        await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with answering(http) as port:
        with pytest.raises(RpcError):
            await null_call("127.0.0.1", port, 5)


async def test_a_closed_connection_is_an_error() -> None:
    async def hang_up(stream: trio.SocketStream) -> None:
        await stream.receive_some(1)

    async with answering(hang_up) as port:
        with pytest.raises(RpcError):
            await null_call("127.0.0.1", port, 5)


async def test_silence_is_an_error_in_time() -> None:
    async def silent(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async with answering(silent) as port:
        with trio.fail_after(3), pytest.raises(HealthError, match=r"within 0\.1 s"):
            await null_call("127.0.0.1", port, 0.1)


async def test_nobody_listening_is_an_error() -> None:
    with trio.socket.socket() as sock:
        await sock.bind(("127.0.0.1", 0))
        with pytest.raises(RpcError, match="cannot connect"):
            await null_call("127.0.0.1", sock.getsockname()[1], 5)


@given(st.lists(st.binary(max_size=9)))
def test_opaques_are_read_back(values: list[bytes]) -> None:
    reader = Unpacker(b"".join(pack_opaque(value) for value in values))
    assert [reader.opaque() for _ in values] == values
    assert reader.rest == b""


def test_a_handle_is_searched_for_the_uuid() -> None:
    fs_uuid = uuid.UUID("5fc4e6f6-52e2-419e-b91a-fa76033d33a8")
    measured = bytes.fromhex("430000011a435fc4e6f652e2419eb91afa76033d33a8010100010025d71d42")
    by_device = bytes.fromhex("430000011244d4299361a711c7730146c020008c851702")
    assert handle_carries_uuid(measured, fs_uuid)
    assert not handle_carries_uuid(by_device, fs_uuid)
