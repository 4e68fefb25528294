"""Talk to a running engine over its control socket: one JSON object a line, in both directions.

Requests: `{"op": "status"}` answers one `EngineStatus`. `{"op": "events"}` streams `EngineEvent`s until closed.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import trio

from engine.errors import EngineError


class EngineUnreachableError(EngineError):
    def __init__(self, control: Path, reason: str) -> None:
        super().__init__(control, reason)
        self.control = control
        self.reason = reason

    def __str__(self) -> str:
        return f"the engine at {self.control} does not answer: {self.reason}"


class ReplicaStatus(msgspec.Struct, frozen=True, kw_only=True):
    """`state`: in_sync, resyncing, leaving (its removal is not recorded yet), or out. `resync_*` in bytes.

    `instance` is the start of its process that the engine is connected to; empty when it is not connected."""

    name: str
    address: str
    directory: str
    state: str
    reason: str = ""
    instance: str = ""
    resync_done: int = 0
    resync_total: int = 0


class OperationStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counts since the engine started. `buckets[i]` requests took at most `LATENCY_BOUNDS[i]` seconds (not cumulative);
    the last bucket, one more than the bounds, has the rest."""

    count: int = 0
    bytes: int = 0
    errors: int = 0
    seconds: float = 0.0
    buckets: tuple[int, ...] = ()


LATENCY_BOUNDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class EngineStatus(msgspec.Struct, frozen=True, kw_only=True):
    """`state`: opening, equalising, ready, waiting (a membership change is not recorded yet), stopped.

    `operations` is keyed read, write, flush, unmap. `resumable`: another engine can take over on the same file.
    """

    volume: str
    state: str
    pid: int
    epoch: int
    incarnation: int
    size: int
    frontend: str
    block_file: str
    replicas: tuple[ReplicaStatus, ...]
    operations: dict[str, OperationStats]
    dirty_regions: int = 0
    requests_in_flight: int = 0
    resumable: bool = False


class EngineEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`event`: ready, replica_left, replica_resyncing, replica_in_sync, resync_progress, equalised, fenced, faulted."""

    event: str
    replica: str = ""
    message: str = ""
    done: int = 0
    total: int = 0


class _Request(msgspec.Struct, frozen=True):
    op: str


MAX_LINE = 1 << 20


class _Lines:
    """Whole lines of a stream. An iterator, not a generator: leaving it early leaves nothing to be finalised."""

    def __init__(self, stream: trio.abc.ReceiveStream) -> None:
        self._stream = stream
        self._whole: list[bytes] = []
        self._rest = b""

    def __aiter__(self) -> _Lines:
        return self

    async def __anext__(self) -> bytes:
        while not self._whole:
            chunk = await self._stream.receive_some()
            if not chunk or len(self._rest) > MAX_LINE:
                raise StopAsyncIteration
            *whole, self._rest = (self._rest + chunk).split(b"\n")
            self._whole = whole[::-1]
        return self._whole.pop()


class EventStream:
    """The events of one engine, as they happen."""

    def __init__(self, lines: _Lines) -> None:
        self._lines = lines

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> EngineEvent:
        return msgspec.json.decode(await self._lines.__anext__(), type=EngineEvent)


@contextlib.asynccontextmanager
async def _ask(control: Path, op: str) -> AsyncIterator[_Lines]:
    try:
        stream = await trio.open_unix_socket(control)
    except OSError as error:
        raise EngineUnreachableError(control, error.strerror or str(error)) from error
    async with stream:
        try:
            await stream.send_all(msgspec.json.encode(_Request(op)) + b"\n")
            yield _Lines(stream)
        except trio.BrokenResourceError as error:
            raise EngineUnreachableError(control, "connection lost") from error


class EngineClient:
    """One engine, by the path of its control socket."""

    def __init__(self, control: Path) -> None:
        self.control = control

    async def status(self, timeout: float = 2.0) -> EngineStatus:
        """Raises EngineUnreachableError."""
        with trio.move_on_after(timeout):
            async with _ask(self.control, "status") as lines:
                async for line in lines:
                    return msgspec.json.decode(line, type=EngineStatus)
            raise EngineUnreachableError(self.control, "it closed the connection")
        raise EngineUnreachableError(self.control, f"no answer within {timeout} s")

    @contextlib.asynccontextmanager
    async def events(self) -> AsyncIterator[EventStream]:
        """Events from now on, beginning with the present state of each replica. Raises EngineUnreachableError."""
        async with _ask(self.control, "events") as lines:
            yield EventStream(lines)
