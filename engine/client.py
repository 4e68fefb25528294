"""Talk to a running engine over its control socket: one JSON object a line, in both directions.

Requests: `{"op": "status"}` answers one `EngineStatus`. `{"op": "events"}` streams `EngineEvent`s until closed,
`{"op": "right"}` so `RightNews`. All others are operations (engine/operations.py): they answer `OperationLine`s, the
last of which has the result or the error.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeVar

import msgspec
import trio

from engine.decoding import UNDECODABLE
from engine.errors import EngineError
from engine.operations import Operation, OperationLine, OperationProgress

_R = TypeVar("_R", bound=msgspec.Struct)


class EngineUnreachableError(EngineError):
    def __init__(self, control: Path, reason: str) -> None:
        super().__init__(control, reason)
        self.control = control
        self.reason = reason

    def __str__(self) -> str:
        return f"the engine at {self.control} does not answer: {self.reason}"


class EngineOperationError(EngineError):
    """The engine could not do what it was asked; `kind` is the class of its error."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(kind, reason)
        self.kind = kind
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class ReplicaStatus(msgspec.Struct, frozen=True, kw_only=True):
    """`state`: in_sync, resyncing, leaving (its removal is not recorded yet), or out.

    While it is brought up to date: `resync_done` of `resync_total` bytes, `resync_rate` bytes a second, `resync_left`
    seconds (None: not known), and what is copied in `phase`: snapshots or head (a rebuild), or changes.
    `instance` is the start of its process that the engine is connected to; empty when it is not connected. Since the
    engine started: `damaged` ranges were found on its disk, of which `repaired` were put right, and `scrubbed_at`
    (seconds since 1970, 0: never) is when the last scrub of it ended.
    """

    name: str
    address: str
    directory: str
    state: str
    reason: str = ""
    instance: str = ""
    resync_done: int = 0
    resync_total: int = 0
    resync_rate: float = 0.0
    resync_left: float | None = None
    phase: str = ""
    damaged: int = 0
    repaired: int = 0
    scrubbed_at: float = 0.0


class OperationStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counts since the engine started. `buckets[i]` requests took at most `LATENCY_BOUNDS[i]` seconds (not cumulative);
    the last bucket, one more than the bounds, has the rest."""

    count: int = 0
    bytes: int = 0
    errors: int = 0
    seconds: float = 0.0
    buckets: tuple[int, ...] = ()


class CloneStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A clone that still shares data with `origin`, a "VOLUME@SNAPSHOT": `done` of `total` bytes are its own by now.

    `rate` in bytes a second, `left` in seconds, None when not known. `failure`: why it does not get on.
    """

    origin: str
    done: int = 0
    total: int = 0
    rate: float = 0.0
    left: float | None = None
    failure: str = ""


LATENCY_BOUNDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class EngineStatus(msgspec.Struct, frozen=True, kw_only=True):
    """`state`: opening, equalising, ready, waiting (a membership change is not recorded yet), stopped.

    `operations` is keyed read, write, flush, unmap. `resumable`: another engine can take over on the same file.
    `busy`: the operation that changes the chain or the set of replicas at present.
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
    busy: str = ""
    clone: CloneStatus | None = None


class EngineEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`event`: ready, replica_left, replica_resyncing, replica_in_sync, resync_progress, equalised, clone_independent,
    fenced, faulted, replica_damaged, replica_repaired, unreadable.

    `done` and `total` in bytes, `rate` in bytes a second, `left` in seconds; `phase` as in ReplicaStatus.
    """

    event: str
    replica: str = ""
    message: str = ""
    done: int = 0
    total: int = 0
    rate: float = 0.0
    left: float | None = None
    phase: str = ""


class RightNews(msgspec.Struct, frozen=True, kw_only=True):
    """Times of CLOCK_MONOTONIC on the engine's machine. Until `until` nobody else has the right to serve the volume.
    An older epoch was confirmed to somebody at `older_at` at the latest; None: none that still counts."""

    until: float
    older_at: float | None = None


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


def _decode(control: Path, line: bytes | msgspec.Raw, kind: type[_R]) -> _R:
    """Raises EngineUnreachableError."""
    try:
        return msgspec.json.decode(line, type=kind)
    except UNDECODABLE as error:
        raise EngineUnreachableError(control, f"it says what this release does not understand: {error}") from error


class EventStream:
    """The events of one engine, as they happen. Raises EngineUnreachableError."""

    def __init__(self, control: Path, lines: _Lines) -> None:
        self._control = control
        self._lines = lines

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> EngineEvent:
        return _decode(self._control, await self._lines.__anext__(), EngineEvent)


class RightStream:
    """Raises EngineUnreachableError."""

    def __init__(self, control: Path, lines: _Lines) -> None:
        self._control = control
        self._lines = lines

    def __aiter__(self) -> RightStream:
        return self

    async def __anext__(self) -> RightNews:
        return _decode(self._control, await self._lines.__anext__(), RightNews)


@contextlib.asynccontextmanager
async def _ask(control: Path, request: msgspec.Struct) -> AsyncIterator[_Lines]:
    try:
        stream = await trio.open_unix_socket(control)
    except OSError as error:
        raise EngineUnreachableError(control, error.strerror or str(error)) from error
    async with stream:
        try:
            await stream.send_all(msgspec.json.encode(request) + b"\n")
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
            async with _ask(self.control, _Request("status")) as lines:
                async for line in lines:
                    return _decode(self.control, line, EngineStatus)
            raise EngineUnreachableError(self.control, "it closed the connection")
        raise EngineUnreachableError(self.control, f"no answer within {timeout} s")

    @contextlib.asynccontextmanager
    async def events(self) -> AsyncIterator[EventStream]:
        """Events from now on, beginning with the present state of each replica. Raises EngineUnreachableError."""
        async with _ask(self.control, _Request("events")) as lines:
            yield EventStream(self.control, lines)

    @contextlib.asynccontextmanager
    async def right(self) -> AsyncIterator[RightStream]:
        """What is known of the right to serve now, then each change. Raises EngineUnreachableError."""
        async with _ask(self.control, _Request("right")) as lines:
            yield RightStream(self.control, lines)

    async def run(
        self, operation: Operation, result: type[_R], on_progress: Callable[[OperationProgress], None] | None = None
    ) -> _R:
        """Have `operation` done and return its result. Has no deadline; a cancellation cancels the operation too.

        Raises EngineOperationError, EngineUnreachableError.
        """
        async with _ask(self.control, operation) as lines:
            async for line in lines:
                told = _decode(self.control, line, OperationLine)
                if told.error is not None:
                    raise EngineOperationError(told.error.kind, told.error.message)
                if bytes(told.result):
                    return _decode(self.control, told.result, result)
                if told.progress is not None and on_progress is not None:
                    on_progress(told.progress)
        raise EngineUnreachableError(self.control, "it ended before the operation did")
