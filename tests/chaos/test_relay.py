"""The relays, between a client and an echo."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator

import pytest
import trio

from tests.chaos.relay import Link, Relays, Route, relays

PORT = 9500


def _address(host: str) -> tuple[str, int]:
    return f"127.{1 + (os.getpid() >> 8) % 254}.{os.getpid() % 256}.{host}", PORT


@contextlib.asynccontextmanager
async def relayed() -> AsyncIterator[tuple[Relays, trio.SocketStream]]:
    """A relay to an echo, and a connection through it that works."""
    async with trio.open_nursery() as nursery:

        async def echo(stream: trio.SocketStream) -> None:
            with contextlib.suppress(trio.BrokenResourceError):
                async with stream:
                    async for chunk in stream:
                        await stream.send_all(chunk)

        (listener,) = await trio.open_tcp_listeners(PORT, host=_address("201")[0])
        nursery.start_soon(trio.serve_listeners, echo, [listener])
        async with (
            relays({"r": Route(_address("202"), _address("201"))}) as made,
            await trio.open_tcp_stream(*_address("202")) as stream,
        ):
            assert await ask(stream, b"hello") == b"hello"
            yield made, stream
        nursery.cancel_scope.cancel()


async def ask(stream: trio.SocketStream, what: bytes) -> bytes:
    await stream.send_all(what)
    answer = b""
    with trio.fail_after(10):
        while len(answer) < len(what):
            chunk = await stream.receive_some()
            if not chunk:
                break
            answer += chunk
    return answer


@pytest.mark.parametrize("link", [Link(name="r", there=False), Link(name="r", back=False)])
async def test_what_is_sent_into_a_cut_link_arrives_when_it_is_back(link: Link) -> None:
    async with relayed() as (made, stream):
        await made.set(link)
        await stream.send_all(b"late")
        with trio.move_on_after(0.2) as waited:
            await stream.receive_some()
        assert waited.cancelled_caught
        await made.set(Link(name="r"))
        with trio.fail_after(10):
            assert await stream.receive_some() == b"late"


async def test_a_delay_holds_up_both_ways_and_loses_nothing() -> None:
    async with relayed() as (made, stream):
        await made.set(Link(name="r", delay=0.1))
        began = trio.current_time()
        data = os.urandom(3 << 20)
        answer = b""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, data)
            with trio.fail_after(20):
                while len(answer) < len(data):
                    answer += await stream.receive_some()
        assert answer == data
        assert trio.current_time() - began >= 0.2


async def test_a_reset_ends_what_is_connected_and_lets_others_in() -> None:
    async with relayed() as (made, stream):
        await made.set(Link(name="r", reset=True))
        with pytest.raises(trio.BrokenResourceError), trio.fail_after(10):
            await stream.receive_some()
        async with await trio.open_tcp_stream(*_address("202")) as again:
            assert await ask(again, b"again") == b"again"


async def test_a_cut_is_undone_even_when_whoever_made_it_is_cancelled() -> None:
    async with relayed() as (made, stream):
        with trio.move_on_after(0.1):
            try:
                await made.set(Link(name="r", there=False, back=False))
                await stream.send_all(b"late")
                await trio.sleep_forever()
            finally:
                await made.set(Link(name="r"))
        with trio.fail_after(10):
            assert await stream.receive_some() == b"late"
