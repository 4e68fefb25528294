"""A replica's server, and a peer that says anything at all, before and after it has proven that it knows the secret."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog
import trio

from engine.store import create_replica
from engine.wire import messages
from engine.wire.frame import REPLY, FrameType, Status, encode_frame
from tests.engine.inprocess import served
from tests.engine.replica.client import KEY, UUID, Client, Closed, connect
from tests.fuzz.source import HOME, Source

SIZE = 2 << 20
MOST_FRAMES = 24
PATIENCE = 20.0
KINDS = tuple(FrameType)
_OFFSETS = (0, 4096, 1 << 20, SIZE - 4096, SIZE, (1 << 64) - 1, (1 << 63) - 1)
_LENGTHS = (0, 512, 4096, 8192, 1 << 20, (1 << 32) - 1)
_HIGHEST = (1 << 63) - 1
_CREATED = "2026-01-01T00:00:00Z"

SAYS: dict[int, messages.Message] = {
    FrameType.HELLO: messages.Hello(version_min=1, version_max=1, nonce=bytes(32)),
    FrameType.AUTH: messages.Auth(proof=bytes(32)),
    FrameType.OPEN: messages.Open(volume_uuid=UUID, epoch=2, incarnation=1),
    FrameType.TRACK: messages.Track(names=("r2", "r3")),
    FrameType.BITMAP: messages.Bitmap(name="r2"),
    FrameType.STATE: messages.State(rebuilding=False),
    FrameType.SNAPSHOT: messages.Snapshot(name="s1", created=_CREATED),
    FrameType.REVERT: messages.Revert(name="s1", created=_CREATED),
    FrameType.REMOVE_SNAPSHOT: messages.RemoveSnapshot(name="s1"),
    FrameType.COALESCE: messages.Coalesce(name="s1", budget=1 << 20),
    FrameType.READ_SNAPSHOT: messages.ReadSnapshot(name="s1"),
}


class DefectError(AssertionError):
    """The server did something that no peer may bring about."""


def conversation(source: Source) -> Iterator[bytes]:
    for _ in range(MOST_FRAMES):
        if not source.left:
            return
        if source.chance(8):
            yield source.noise()
            continue
        kind: int = source.choice(KINDS) if not source.chance(16) else source.number(2)
        offset, length = source.choice(_OFFSETS), source.choice(_LENGTHS)
        if kind == FrameType.WRITE:
            # as much as it says, most of the time
            payload = source.take(1).ljust(1, b"w") * (min(length, 1 << 20) if not source.chance(8) else 100)
        else:
            says = SAYS.get(kind)
            payload = b"" if says is None or source.chance(8) else source.mutated(messages.encode(says))
        if source.chance(16):
            payload = b"\x81\xa1x" + b"\x91" * 3000 + b"\xc0"  # nested
        frame = encode_frame(kind, source.number(), payload, offset=offset, length=length)
        yield source.mutated(frame) if source.chance(8) else frame


async def say(client: Client, pieces: list[bytes]) -> None:
    """Say it all, hear the answers, until the server closes or has nothing more to say."""
    async with trio.open_nursery() as nursery:

        async def listen() -> None:
            with contextlib.suppress(Closed):
                while True:
                    kind = (await client.receive())[0]
                    if not kind & REPLY:
                        raise DefectError(f"the server sent {kind:#x}, which is no answer")
            nursery.cancel_scope.cancel()

        nursery.start_soon(listen)
        with contextlib.suppress(trio.BrokenResourceError):
            for piece in pieces:
                await client.stream.send_all(piece)
            await client.stream.send_eof()


@contextlib.asynccontextmanager
async def volume(directory: Path, address: str) -> AsyncIterator[None]:
    with structlog.testing.capture_logs() as logs:
        async with served(directory, address, KEY) as server:
            yield
            if server.failed:
                raise DefectError(f"the server failed: {server.failed}")
    if broken := [entry for entry in logs if entry.get("exc_info")]:
        raise DefectError(f"an exception was logged: {broken}")


def state_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


async def strangers(directory: Path, address: str, pieces: list[bytes], wrong_key: bool) -> None:
    """Somebody without the secret: nothing changes, and whoever has it is served all the while."""
    async with volume(directory, address), connect(address) as engine:
        assert (await engine.open(1))[1] == Status.OK
        assert (await engine.write(0, b"before" + bytes(4090)))[1] == Status.OK
        assert (await engine.flush())[1] == Status.OK
        before = state_of(directory)
        async with connect(address, None) as stranger:
            if wrong_key:
                nonce = bytes(32)
                hello = messages.Hello(version_min=1, version_max=1, nonce=nonce)
                pieces = [
                    encode_frame(FrameType.HELLO, 0, messages.encode(hello)),
                    encode_frame(FrameType.AUTH, 1, messages.encode(messages.Auth(proof=bytes(32)))),
                    *pieces,
                ]
            await say(stranger, pieces)
        if (await engine.read(0, 6))[5] != b"before":
            raise DefectError("the engine is not served any more")
        if state_of(directory) != before:
            raise DefectError("somebody without the secret changed the replica")


async def friends(directory: Path, address: str, pieces: list[bytes], opened: bool) -> None:
    """Somebody with the secret, who may do what a peer may; the next engine finds a replica that works."""
    async with volume(directory, address):
        async with connect(address) as peer:
            if opened:
                assert (await peer.open(1))[1] == Status.OK
            await say(peer, pieces)
        async with connect(address) as engine:
            token = (await engine.status()).epoch
            answer = await engine.open(min(token + 1, _HIGHEST), _HIGHEST)
            assert answer[1] == Status.OK, answer
            assert (await engine.write(8192, b"after" + bytes(4091)))[1] == Status.OK
            assert (await engine.flush())[1] == Status.OK
            if (await engine.read(8192, 5))[5] != b"after":
                raise DefectError("the replica does not work any more")


def unwrapped(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


@contextmanager
def server() -> Iterator[Callable[[bytes], None]]:
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=HOME) as base:
        number = 0

        def target(data: bytes) -> None:
            nonlocal number
            number += 1
            source = Source(data)
            mode = source.number() % 4
            pieces = list(conversation(source))
            directory = Path(base, f"r{number}")
            create_replica(directory, volume="vol1", uuid=UUID, replica="r1", size=SIZE)
            address = f"unix:{base}/sock{number}"

            async def run() -> None:
                with trio.fail_after(PATIENCE):
                    await (strangers if mode < 2 else friends)(directory, address, pieces, mode % 2 == 1)

            try:
                trio.run(run)
            except BaseExceptionGroup as group:
                raise DefectError(f"{unwrapped(group)!r}") from group
            finally:
                for path in directory.iterdir():
                    path.unlink()
                directory.rmdir()

        yield target
