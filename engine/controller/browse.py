"""Reads of snapshots for others: the engine owns the replicas' connections, so whoever wants to read asks it.

On a connection of the control socket, after the answer to `SnapshotOpen`, the client sends READ_SNAPSHOT frames
without a payload and gets READ_SNAPSHOT replies, in any order. At most `IN_FLIGHT` of one engine are with a replica at
a time, each of at most `MAX_READ` bytes: what clients of the volume wait for is never behind more than that.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import structlog
import trio

from engine.controller.connection import ReplicaConnection, ReplicaRefusedError
from engine.errors import EngineError, NoSuchSnapshotError, ProtocolError
from engine.operations import SnapshotOpen, SnapshotOpened
from engine.wire import messages
from engine.wire.frame import REPLY, Frame, FrameReader, FrameType, Status, encode_frame
from engine.wire.messages import SnapshotEntry

if TYPE_CHECKING:
    from engine.controller.driver import Controller

log = structlog.get_logger()

MAX_READ = 256 << 10
IN_FLIGHT = 4
# of one client: those beyond wait here, and then the client waits to send
MAX_WAITING = 16
# for one replica; and for all together, while membership changes
REPLICA_TIMEOUT = 8.0
PATIENCE = 60.0
_AGAIN = 0.2


class Browser:
    """Who reads which snapshots."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._open: Counter[str] = Counter()
        self._slots = trio.CapacityLimiter(IN_FLIGHT)

    def reads(self, name: str) -> bool:
        """Somebody has it open."""
        return self._open[name] > 0

    @contextlib.asynccontextmanager
    async def opened(self, request: SnapshotOpen) -> AsyncIterator[SnapshotOpened]:
        """Keep the snapshot from being deleted. Raises NoSuchSnapshotError, EngineError."""
        # before anything is looked at: a deletion that comes now sees it, one that came earlier is seen
        self._open[request.name] += 1
        try:
            listing = await self._listing()
            entry = next((one for one in listing if one.name == request.name and not one.removed), None)
            if entry is None:
                raise NoSuchSnapshotError(self._controller.record.volume, request.name)
            yield SnapshotOpened(
                name=entry.name, created=entry.created, size=entry.size, allocated=_allocated(entry, listing)
            )
        finally:
            self._open[request.name] -= 1

    async def _listing(self) -> tuple[SnapshotEntry, ...]:
        found = await self._controller.chains.listings()
        name = self._controller.core.members(self._controller.core.in_sync)[0]
        return found[name].snapshots if name in found else ()

    async def serve(self, stream: trio.abc.HalfCloseableStream, name: str) -> None:
        """Answer the client's frames until it hangs up, or sends nonsense. Raises BrokenResourceError."""
        reader = FrameReader()
        sending, waiting = trio.Lock(), trio.Semaphore(MAX_WAITING)

        async def answer(frame: Frame) -> None:
            try:
                status, payload = await self._read(name, frame[3], frame[4])
                reply = encode_frame(
                    FrameType.READ_SNAPSHOT | REPLY, frame[2], payload, status=status, offset=frame[3], length=frame[4]
                )
                async with sending:
                    await stream.send_all(reply)
            finally:
                waiting.release()

        async with trio.open_nursery() as nursery:
            while frames := await _receive(stream, reader):
                for frame in frames:
                    await waiting.acquire()
                    nursery.start_soon(answer, frame)
            nursery.cancel_scope.cancel()

    async def _read(self, name: str, offset: int, length: int) -> tuple[int, bytes]:
        """From one replica or another that is in sync. A status, and the bytes or what is wrong."""
        reason = b"no replica answers"
        async with self._slots:
            with trio.move_on_after(PATIENCE):
                while True:
                    for connection in self._controller.connected(self._controller.core.in_sync):
                        try:
                            return Status.OK, await self._ask(connection, name, offset, length)
                        except ReplicaRefusedError as error:
                            if error.status not in (Status.IO_ERROR, Status.NOT_OPEN):
                                return error.status, error.detail
                            reason = error.detail
                        except (EngineError, trio.TooSlowError) as error:
                            reason = str(error).encode()
                    await trio.sleep(_AGAIN)
        log.warning("a snapshot cannot be read", snapshot=name, offset=offset, reason=reason.decode(errors="replace"))
        return Status.IO_ERROR, reason

    async def _ask(self, connection: ReplicaConnection, name: str, offset: int, length: int) -> bytes:
        with trio.fail_after(REPLICA_TIMEOUT):
            message = messages.ReadSnapshot(name=name)
            answer = await connection.call(FrameType.READ_SNAPSHOT, message, offset=offset, length=length)
        data: bytes = answer[5]
        if len(data) != length:
            raise ProtocolError(f"replica {connection.name} sent {len(data)} bytes of {length}")
        return data


def _allocated(entry: SnapshotEntry, listing: tuple[SnapshotEntry, ...]) -> int:
    known = {one.name: one for one in listing}
    total, at = 0, entry
    while True:
        total += at.allocated
        if at.parent not in known:
            return min(total, entry.size)
        at = known[at.parent]


async def _receive(stream: trio.abc.ReceiveStream, reader: FrameReader) -> list[Frame]:
    """At least one frame; none when the client has hung up, or is to be hung up on."""
    while chunk := await stream.receive_some(4096):
        reader.space()[: len(chunk)] = chunk
        reader.received(len(chunk))
        try:
            frames = reader.frames()
        except ProtocolError:
            return []
        if any(frame[0] != FrameType.READ_SNAPSHOT or not 0 < frame[4] <= MAX_READ or frame[5] for frame in frames):
            return []
        if frames:
            return frames
    return []
