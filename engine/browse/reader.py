"""Reads a snapshot through the engine that has the volume attached, whichever process that is at the moment."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import trio

from engine.errors import EngineError
from engine.operations import OperationLine, SnapshotOpen, SnapshotOpened
from engine.wire.frame import REPLY, Frame, FrameReader, FrameType, Status, encode_frame

MAX_READ = 256 << 10
# an engine that was killed is replaced within seconds; a share that is repaired takes longer
PATIENCE = 120.0
_PAUSE = 0.1
_MAX_LINE = 1 << 16

_ERRNO = {Status.NOT_FOUND: errno.ESTALE, Status.IN_USE: errno.ESTALE, Status.OUT_OF_RANGE: errno.EINVAL}


class SnapshotGoneError(EngineError):
    """There is no such snapshot (any more)."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class _Connection:
    """One stream to one engine; dead once `closed`."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.closed = False
        self._sending = trio.Lock()
        self._reader = FrameReader()
        self._waiting: dict[int, trio.Event] = {}
        self._answers: dict[int, Frame] = {}
        self._seq = 0

    async def ask(self, offset: int, length: int) -> Frame | None:
        """None when the connection ended first."""
        self._seq += 1
        seq = self._seq
        done = self._waiting[seq] = trio.Event()
        try:
            async with self._sending:
                await self.stream.send_all(encode_frame(FrameType.READ_SNAPSHOT, seq, offset=offset, length=length))
            await done.wait()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return None
        finally:
            del self._waiting[seq]
        return self._answers.pop(seq, None)

    async def receive(self) -> None:
        """Deliver answers until the stream ends."""
        try:
            while chunk := await self.stream.receive_some(1 << 20):
                view = memoryview(chunk)
                while view:
                    space = self._reader.space()
                    count = min(len(space), len(view))
                    space[:count] = view[:count]
                    self._reader.received(count)
                    view = view[count:]
                    for frame in self._reader.frames():
                        if frame[0] == FrameType.READ_SNAPSHOT | REPLY and frame[2] in self._waiting:
                            self._answers[frame[2]] = frame
                            self._waiting[frame[2]].set()
        except (EngineError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            self.close()

    def close(self) -> None:
        self.closed = True
        self.stream.socket.close()
        for done in self._waiting.values():
            done.set()


class SnapshotReader:
    """One snapshot, kept from deletion as long as this is open. Made by `open_snapshot`."""

    def __init__(self, control: Path, name: str, nursery: trio.Nursery) -> None:
        self._control = control
        self._nursery = nursery
        self._connecting = trio.Lock()
        self._connection: _Connection | None = None
        self.info = SnapshotOpened(name=name, created="", size=0, allocated=0)

    async def connect(self) -> _Connection:
        """Raises SnapshotGoneError, OSError (EIO: no engine answers for long)."""
        async with self._connecting:
            if self._connection is not None and not self._connection.closed:
                return self._connection
            with trio.move_on_after(PATIENCE):
                while True:
                    with contextlib.suppress(OSError, trio.BrokenResourceError, msgspec.DecodeError):
                        connection = await self._open()
                        if connection is not None:
                            return connection
                    await trio.sleep(_PAUSE)
            raise OSError(errno.EIO, f"no engine answers at {self._control}")

    async def _open(self) -> _Connection | None:
        stream = await trio.open_unix_socket(self._control)
        try:
            await stream.send_all(msgspec.json.encode(SnapshotOpen(name=self.info.name)) + b"\n")
            line = b""
            # nothing comes behind the answer before we ask
            while not line.endswith(b"\n"):
                chunk = await stream.receive_some(4096)
                line += chunk
                if not chunk or len(line) > _MAX_LINE:
                    await stream.aclose()
                    return None
            answer = msgspec.json.decode(line, type=OperationLine)
            if answer.error is not None:
                raise SnapshotGoneError(self.info.name, answer.error.message)
            assert answer.result is not None
            found = msgspec.json.decode(answer.result, type=SnapshotOpened)
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        if self.info.created and found.created != self.info.created:
            await trio.aclose_forcefully(stream)
            raise SnapshotGoneError(self.info.name, f"snapshot {self.info.name!r} is another one now")
        self.info = found
        self._connection = connection = _Connection(stream)
        self._nursery.start_soon(connection.receive)
        return connection

    async def read(self, offset: int, length: int) -> bytes:
        """Within the snapshot's size. Raises OSError: ESTALE when it is gone, EIO."""
        parts = []
        end = min(offset + length, self.info.size)
        while offset < end:
            count = min(MAX_READ, end - offset)
            parts.append(await self._read(offset, count))
            offset += count
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _read(self, offset: int, length: int) -> bytes:
        while True:
            try:
                connection = await self.connect()
            except SnapshotGoneError as error:
                raise OSError(errno.ESTALE, str(error)) from error
            frame = await connection.ask(offset, length)
            if frame is None:
                connection.close()
            elif frame[1] == Status.OK and len(frame[5]) == length:
                data: bytes = frame[5]
                return data
            else:
                number = _ERRNO.get(Status(frame[1]), errno.EIO)
                raise OSError(number, frame[5].decode(errors="replace") or os.strerror(number))

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()


@contextlib.asynccontextmanager
async def open_snapshot(control: Path, name: str) -> AsyncIterator[SnapshotReader]:
    """Raises SnapshotGoneError, OSError."""
    async with trio.open_nursery() as nursery:
        reader = SnapshotReader(control, name, nursery)
        try:
            await reader.connect()
            yield reader
        finally:
            reader.close()
            nursery.cancel_scope.cancel()
