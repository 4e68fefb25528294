"""An engine with three replicas, one of which answers whatever it likes: the others go on without it.

Its checksums are right more often than not, so that what it says is looked at. What it may not do is to answer a read
with other data, or to name a higher epoch: a replica that knows the secret is believed in that.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from engine.controller.driver import Controller, attach
from engine.errors import EngineError
from engine.record import FileRecordStore, ReplicaRecord, VolumeRecord, bump_epoch
from engine.store import create_replica
from engine.wire import messages
from engine.wire.frame import REPLY, Frame, FrameReader, FrameType, Status, encode_frame
from tests.engine.inprocess import served
from tests.engine.replica.client import KEY, UUID
from tests.fuzz.conversation import DefectError, unwrapped
from tests.fuzz.source import HOME, Source

SIZE = 2 << 20
BLOCK = 4096
PATIENCE = 20.0
NAMES = ("r1", "r2", "r3")
_NUMBERS = (0, 1, 7, 4096, (1 << 20) - 1, 1 << 20, 1 << 31, (1 << 32) - 1)


class Liar:
    """Passes requests on to the real replica, and lies about its answers while there is something to decide with."""

    def __init__(self, path: Path, behind: Path, source: Source) -> None:
        self.path = path
        self.behind = behind
        self.lies = 0
        self._source = source

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        sock = trio.socket.socket(trio.socket.AF_UNIX)
        with sock:
            await sock.bind(str(self.path))
            sock.listen()
            async with trio.open_nursery() as nursery:
                task_status.started()
                while True:
                    accepted, _ = await sock.accept()
                    nursery.start_soon(self._connection, trio.SocketStream(accepted))

    async def _connection(self, engine: trio.SocketStream) -> None:
        async with engine, await trio.open_unix_socket(self.behind) as replica, trio.open_nursery() as nursery:
            nursery.start_soon(self._pass, self._requests(engine), replica, nursery.cancel_scope)
            nursery.start_soon(self._pass, self._lies(replica), engine, nursery.cancel_scope)

    async def _pass(self, said: AsyncGenerator[bytes, None], to: trio.SocketStream, scope: trio.CancelScope) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async with contextlib.aclosing(said) as pieces:
                async for piece in pieces:
                    await to.send_all(piece)
        scope.cancel()

    async def _requests(self, engine: trio.SocketStream) -> AsyncGenerator[bytes, None]:
        async for chunk in engine:
            yield bytes(chunk)

    async def _lies(self, replica: trio.SocketStream) -> AsyncGenerator[bytes, None]:
        reader = FrameReader()
        async for chunk in replica:
            reader.space()[: len(chunk)] = chunk
            reader.received(len(chunk))
            for frame in reader.frames():
                yield b"".join(self.answers(frame))

    def answers(self, frame: Frame) -> Iterator[bytes]:
        source = self._source
        kind, status, seq, offset, length, payload = frame
        if not source.left or source.chance(3):
            yield encode_frame(kind, seq, payload, status=status, offset=offset, length=length)
            return
        self.lies += 1
        data = kind == FrameType.READ | REPLY
        match source.number() % 10:
            case 0:
                kind = source.number(2)
            case 1:
                status = source.number() % 16
            case 2:
                seq = source.choice((0, seq + 1, seq - 1 if seq else 0, seq ^ 1 << 63, source.number(8)))
            case 3:
                offset, length = source.number(8), source.choice(_NUMBERS)
            case 4:
                payload = payload[: source.number(2)] if not data else payload[:-1]
            case 5 if not data:
                payload = source.mutated(payload)
            case 6 if not data:
                payload = self._message(kind) or payload
            case 7:
                yield source.noise()
            case 8:
                return
            case _:
                payload = b"\x81\xa1x" + b"\x91" * 3000 + b"\xc0" if not data else payload * 2
        if status == Status.STALE_EPOCH:
            payload = messages.encode(messages.Token(epoch=source.number() % 2, incarnation=source.number() % 2))
        whole = encode_frame(kind, seq, payload[: 1 << 20], status=status, offset=offset, length=length)
        yield source.mutated(whole) if source.chance(6) else whole
        if source.chance(6):
            yield whole

    def _message(self, kind: int) -> bytes:
        """One that is well-formed and wrong."""
        source = self._source
        if kind == FrameType.OPEN | REPLY:
            return messages.encode(
                messages.OpenReply(
                    size=source.choice((*_NUMBERS, SIZE, 1 << 62)),
                    region_size=source.choice((*_NUMBERS, 1 << 20, 3 << 18)),
                    dirty_regions=source.choice(_NUMBERS),
                    tracked=("r1", "", "r9"),
                    rebuilding=source.chance(2),
                )
            )
        if kind == FrameType.BITMAP | REPLY:
            return b"\xff" * source.choice((0, 1, 2, 100, 4096))
        if kind == FrameType.AUTH | REPLY:
            return messages.encode(messages.AuthReply(proof=bytes(32), replica="r2", instance="x"))
        return b""


async def life(base: Path, make: Callable[[Path, Path], Liar]) -> Liar:
    """Attach, work, detach, while the second replica is what `make` makes of its address and the real one's."""
    secret = KEY
    for name in NAMES:
        create_replica(base / name, volume="vol1", uuid=UUID, replica=name, size=SIZE)
    store = FileRecordStore(base / "record.json")
    replicas = tuple(
        ReplicaRecord(name=name, address=f"unix:{base}/{name}.sock", directory=str(base / name)) for name in NAMES
    )
    store.create(VolumeRecord(volume="vol1", uuid=UUID, size=SIZE, replicas=replicas, in_sync=NAMES))
    liar = make(base / "r2.sock", base / "r2.real")
    async with trio.open_nursery() as nursery, contextlib.AsyncExitStack() as stack:
        for name in NAMES:
            at = "real" if name == "r2" else "sock"
            await stack.enter_async_context(served(base / name, f"unix:{base}/{name}.{at}", secret))
        await nursery.start(liar.serve)
        volume = attach(
            store,
            secret,
            epoch=bump_epoch(store).epoch,
            open_timeout=0.8,
            request_timeout=0.8,
            reconnect_interval=0.01,
        )
        try:
            async with volume.running(), trio.open_nursery() as working:

                async def give_up() -> None:
                    await volume.failed.wait()
                    working.cancel_scope.cancel()

                working.start_soon(give_up)
                await work(volume)
                working.cancel_scope.cancel()
            if volume.failure is not None:
                raise volume.failure
        except* EngineError as group:
            if not _late(str(error := unwrapped(group))):
                raise DefectError(f"the engine gave up: {error}") from group
        nursery.cancel_scope.cancel()
    return liar


async def work(volume: Controller) -> None:
    for turn in range(10):
        data = bytes([turn + 1]) * BLOCK
        where = turn * 3 % 8 * BLOCK * 60
        await volume.write(where, data)
        if await volume.read(where, BLOCK) != data:
            raise DefectError("a read did not return what was written")
        if turn % 3 == 2:
            await volume.flush()
    for name in ("r1", "r3"):
        if name not in volume.record.in_sync and not _late(volume.core.reason(name)):
            raise DefectError(f"{name}, which is honest, left: {volume.core.reason(name)}")


def _late(reason: str) -> bool:
    """On a busy machine an honest replica may be late, which is no defect."""
    return "did not answer" in reason or "no answer within" in reason


@contextmanager
def replica() -> Iterator[Callable[[bytes], None]]:
    """A target that lets one of three replicas lie."""
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=HOME) as home:

        def target(data: bytes) -> None:
            async def run(base: Path) -> None:
                with trio.fail_after(PATIENCE):
                    await life(base, lambda at, real: Liar(at, real, Source(data)))

            with tempfile.TemporaryDirectory(dir=home) as base:
                try:
                    trio.run(run, Path(base))
                except BaseExceptionGroup as group:
                    raise DefectError(f"{unwrapped(group)!r}") from group

        yield target
