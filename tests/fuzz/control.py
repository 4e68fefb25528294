"""The control socket, from both sides: an engine that is asked anything, a client that is answered anything."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import trio

from engine.client import EngineClient, EngineEvent, EngineStatus
from engine.control import ControlServer, control_socket
from engine.controller.driver import attach
from engine.errors import EngineError
from engine.record import FileRecordStore, ReplicaRecord, VolumeRecord, bump_epoch
from engine.store import create_replica
from tests.engine.inprocess import served
from tests.engine.replica.client import KEY, UUID
from tests.fuzz.conversation import DefectError, unwrapped
from tests.fuzz.source import HOME, Source

PATIENCE = 20.0
NESTED = b'{"op":"status","x":' + b"[" * 3000 + b"]" * 3000 + b"}\n"
ASKED = (
    b'{"op":"status"}\n',
    b'{"op":"events"}\n',
    b'{"op":"snapshot_create","name":"s1"}\n',
    b'{"op":"\xff"}\n',
    b'{"op":7}\n',
    NESTED,
)
ANSWERED = (
    msgspec.json.encode(EngineEvent(event="ready")) + b"\n",
    b'{"result":{}}\n',
    b'{"error":{"kind":"EngineError","message":"no"}}\n',
    NESTED,
)


class _Session:
    """What the control server asks of a frontend."""

    resumable = False

    def __init__(self) -> None:
        self.ended = trio.Event()


async def ask(path: Path, pieces: list[bytes]) -> None:
    """An engine hears this, and answers the next one."""
    async with await trio.open_unix_socket(path) as stream:
        with contextlib.suppress(trio.BrokenResourceError):
            for piece in pieces:
                await stream.send_all(piece)
            await stream.send_eof()
            with trio.move_on_after(0.05):
                while await stream.receive_some():
                    pass
    if (await EngineClient(path).status()).volume != "vol1":
        raise DefectError("the status is another one")


async def hear(path: Path, pieces: list[bytes]) -> None:
    """A client hears this, and raises nothing but errors of the engine's tree."""

    async def speak(stream: trio.SocketStream) -> None:
        async with stream:
            with contextlib.suppress(trio.BrokenResourceError):
                await stream.receive_some()
                for piece in pieces:
                    await stream.send_all(piece)

    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    sock = trio.socket.socket(trio.socket.AF_UNIX)
    await sock.bind(str(path))
    sock.listen()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, speak, [trio.SocketListener(sock)])
        client = EngineClient(path)
        with contextlib.suppress(EngineError):
            if (await client.status()).volume != "vol1":
                raise EngineError("well-formed")
        with contextlib.suppress(EngineError):
            async with client.events() as events:
                async for _ in events:
                    pass
        nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def engine(base: Path) -> AsyncIterator[Path]:
    """A real engine's control socket, with one replica behind it."""
    create_replica(base / "r1", volume="vol1", uuid=UUID, replica="r1", size=1 << 20)
    address = f"unix:{base}/r1.sock"
    store = FileRecordStore(base / "record.json")
    replicas = (ReplicaRecord(name="r1", address=address, directory=str(base / "r1")),)
    store.create(VolumeRecord(volume="vol1", uuid=UUID, size=1 << 20, replicas=replicas, in_sync=("r1",)))
    async with served(base / "r1", address, KEY):
        volume = attach(store, KEY, epoch=bump_epoch(store).epoch)
        async with volume.running():
            path = base / "control.sock"
            async with control_socket(path, ControlServer(volume, "none", "", _Session())):
                yield path


@contextmanager
def socket() -> Iterator[Callable[[bytes], None]]:
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=HOME) as home:

        def target(data: bytes) -> None:
            source = Source(data)
            known = ASKED if (asking := source.chance(2)) else (*ANSWERED, STATUS)
            pieces: list[bytes] = []
            while source.left and len(pieces) < 8:
                line = source.choice(known)
                pieces.append(source.mutated(line) if source.chance(2) else line)

            async def run(base: Path) -> None:
                with trio.fail_after(PATIENCE):
                    if asking:
                        async with engine(base) as path:
                            await ask(path, pieces)
                    else:
                        await hear(base / "hear.sock", pieces)

            with tempfile.TemporaryDirectory(dir=home) as base:
                try:
                    trio.run(run, Path(base))
                except BaseExceptionGroup as group:
                    raise DefectError(f"{unwrapped(group)!r}") from group

        yield target


STATUS = (
    msgspec.json.encode(
        EngineStatus(
            volume="vol1",
            state="ready",
            pid=1,
            epoch=1,
            incarnation=1,
            size=1,
            frontend="device",
            block_file="/x",
            replicas=(),
            operations={},
        )
    )
    + b"\n"
)
