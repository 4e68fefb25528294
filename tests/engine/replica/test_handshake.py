from __future__ import annotations

from pathlib import Path

import pytest
import trio

from engine.errors import ProtocolError
from engine.replica import connection, server
from engine.wire import messages
from engine.wire.frame import REPLY, FrameType, Status, encode_frame
from engine.wire.handshake import NONCE_SIZE, new_nonce, proof
from tests.engine.replica.client import KEY, UUID, Client, Closed, connect
from tests.engine.replica.inside import inside, until


def hello(low: int = 1, high: int = 1) -> bytes:
    return messages.encode(messages.Hello(version_min=low, version_max=high, nonce=new_nonce()))


async def closes(client: Client) -> None:
    with trio.fail_after(5), pytest.raises(Closed):
        await client.receive()


async def test_a_peer_without_the_key_learns_nothing(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address, key=None) as client:
        reply = await client.call(FrameType.HELLO, hello())
        assert reply[1] == Status.OK
        assert len(reply[5]) < 64
        reply = await client.call(FrameType.AUTH, messages.encode(messages.Auth(proof=bytes(32))))
        assert (reply[1], reply[3:]) == (Status.UNAUTHENTICATED, (0, 0, b""))
        await closes(client)
        for secret in (b"vol1", b"r1", UUID.encode(), replica.server.instance.encode()):
            assert secret not in b"".join((hello(), reply[5]))


async def test_a_proof_for_another_challenge_is_worth_nothing(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address, key=None) as client:
        nonce = new_nonce()
        await client.call(FrameType.HELLO, messages.encode(messages.Hello(version_min=1, version_max=1, nonce=nonce)))
        replayed = proof(KEY, "client", 1, nonce, bytes(NONCE_SIZE))
        reply = await client.call(FrameType.AUTH, messages.encode(messages.Auth(proof=replayed)))
        assert reply[1] == Status.UNAUTHENTICATED
        await closes(client)


@pytest.mark.parametrize("kind", [k for k in FrameType if k not in (FrameType.HELLO, FrameType.AUTH)])
async def test_nothing_is_answered_before_the_proof(tmp_path: Path, kind: FrameType) -> None:
    async with inside(tmp_path) as replica:
        async with connect(replica.address, key=None) as client:
            await client.send(kind)
            await closes(client)
        async with connect(replica.address, key=None) as client:
            await client.call(FrameType.HELLO, hello())
            await client.send(kind)
            await closes(client)


async def test_the_highest_common_version_is_chosen(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica:
        async with connect(replica.address, key=None) as client:
            reply = await client.call(FrameType.HELLO, hello(0, 9))
            assert messages.decode(reply[5], messages.HelloReply).version == messages.VERSION_MAX
        async with connect(replica.address, key=None) as client:
            reply = await client.call(FrameType.HELLO, hello(3, 9))
            assert (reply[1], reply[5]) == (Status.UNSUPPORTED_VERSION, b"this replica speaks versions 1..2")
            await closes(client)


async def test_a_nonce_of_another_length_is_refused(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address, key=None) as client:
        await client.send(FrameType.HELLO, messages.encode(messages.Hello(version_min=1, version_max=1, nonce=b"")))
        await closes(client)


async def test_who_does_not_prove_itself_in_time_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HANDSHAKE_SECONDS", 0.1)
    async with inside(tmp_path) as replica, connect(replica.address, key=None) as client:
        await client.call(FrameType.HELLO, hello())
        await closes(client)
        async with connect(replica.address) as good:
            await trio.sleep(0.2)
            assert (await good.status()).replica == "r1"


async def test_many_strangers_do_not_keep_an_engine_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_UNAUTHENTICATED", 4)
    async with inside(tmp_path) as replica, trio.open_nursery() as nursery:
        gone = 0

        async def stranger() -> None:
            nonlocal gone
            async with connect(replica.address, key=None) as client:
                await closes(client)
                gone += 1

        for _ in range(10):
            nursery.start_soon(stranger)
        await until(lambda: gone >= 6)
        assert gone == 6
        async with connect(replica.address) as client:
            assert (await client.open(1))[1] == Status.OK
        nursery.cancel_scope.cancel()


async def test_requests_right_behind_the_proof_are_served(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica, connect(replica.address, key=None) as client:
        nonce = new_nonce()
        message = messages.Hello(version_min=1, version_max=1, nonce=nonce)
        theirs = messages.decode((await client.call(FrameType.HELLO, messages.encode(message)))[5], messages.HelloReply)
        auth = messages.Auth(proof=proof(KEY, "client", 1, nonce, theirs.nonce))
        await client.stream.send_all(
            encode_frame(FrameType.AUTH, 1, messages.encode(auth))
            + encode_frame(FrameType.OPEN, 2, messages.encode(messages.Open(volume_uuid=UUID, epoch=1, incarnation=1)))
            + encode_frame(FrameType.READ, 3, offset=0, length=4096)
        )
        kinds = [(await client.receive())[:3] for _ in range(3)]
        assert kinds == [(FrameType.AUTH | REPLY, 0, 1), (FrameType.OPEN | REPLY, 0, 2), (FrameType.READ | REPLY, 0, 3)]


async def test_a_wrong_key_is_an_error_for_the_client(tmp_path: Path) -> None:
    async with inside(tmp_path) as replica:
        with pytest.raises(ProtocolError):
            async with connect(replica.address, key=b"z" * 32):
                pass
