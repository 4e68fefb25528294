"""What processes for one volume ask each other, over a real connection."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import trio

from share_manager.share.peer import Alive, answer_peers, ask_header, ask_peer

KEY = b"k" * 32
HEADER = b"LUKS" + bytes(1 << 20)


def alive() -> Alive:
    return Alive(instance="1", serving=True)


async def header() -> bytes:
    return HEADER


@contextlib.asynccontextmanager
async def answering() -> AsyncIterator[str]:
    async with trio.open_nursery() as nursery:
        address: str = await nursery.start(answer_peers, "127.0.0.1", KEY, alive, header)
        yield address
        nursery.cancel_scope.cancel()


async def test_a_holder_says_that_it_serves_and_what_its_header_is() -> None:
    heard: list[Alive] = []

    def once(answer: Alive) -> bool:
        heard.append(answer)
        return False

    async with answering() as address:
        await ask_peer(address, KEY, "vol1", once)
        # the header is for those who ask for it
        assert heard == [alive()]
        assert await ask_header(address, KEY, "vol1") == HEADER
        assert await ask_header(address, b"w" * 32, "vol1") == b""
    assert await ask_header(address, KEY, "vol1") == b""
