"""The engine's control socket: status and events for its supervisor, one JSON object a line."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import trio

from engine.client import MAX_LINE, EngineEvent, EngineStatus
from engine.controller.driver import Controller
from engine.controller.handlers import decode, handle
from engine.controller.progress import Progress
from engine.decoding import UNDECODABLE
from engine.errors import EngineError
from engine.frontend import FrontendSession
from engine.operations import OperationFailure, OperationLine, SnapshotOpen

_PROGRESS_EVERY = 0.5


class _Request(msgspec.Struct):
    op: str


class ControlServer:
    """Answers `status`, `events` and operations; whatever else comes, that connection ends and nothing is harmed."""

    def __init__(self, controller: Controller, frontend: str, block_file: str, session: FrontendSession) -> None:
        self._controller = controller
        self._frontend = frontend
        self._block_file = block_file
        self._session = session

    def _status(self) -> EngineStatus:
        status = self._controller.status(self._frontend, self._block_file)
        return msgspec.structs.replace(status, resumable=self._session.resumable)

    async def _handle(self, stream: trio.SocketStream) -> None:
        with _hang_ups():
            async with stream:
                line = b""
                while not line.endswith(b"\n"):
                    chunk = await stream.receive_some(4096)
                    line += chunk
                    if not chunk or len(line) > MAX_LINE:
                        return
                try:
                    request = msgspec.json.decode(line, type=_Request)
                except UNDECODABLE:
                    return
                if request.op == "status":
                    await stream.send_all(_line(self._status()))
                elif request.op == "events":
                    await self._stream_events(stream)
                elif request.op == "right":
                    await self._stream_right(stream)
                elif request.op == SnapshotOpen.__struct_config__.tag:
                    await self._serve_snapshot(stream, line)
                else:
                    await self._operate(stream, request.op, line)

    async def _serve_snapshot(self, stream: trio.SocketStream, line: bytes) -> None:
        browser = self._controller.browser
        try:
            request = msgspec.json.decode(line, type=SnapshotOpen)
            async with browser.opened(request) as found:
                await stream.send_all(_line(OperationLine(result=msgspec.Raw(msgspec.json.encode(found)))))
                await browser.serve(stream, request.name)
        except (EngineError, msgspec.ValidationError) as error:
            await stream.send_all(_line(_failure(error)))

    async def _operate(self, stream: trio.SocketStream, name: str, line: bytes) -> None:
        """Carry out an operation; whoever asked for it and hangs up has it cancelled."""
        progress = Progress()
        answer: OperationLine | None = None
        async with trio.open_nursery() as nursery:

            async def hung_up() -> None:
                while await stream.receive_some(4096):
                    pass
                nursery.cancel_scope.cancel()

            async def report() -> None:
                told = None
                while True:
                    await trio.sleep(_PROGRESS_EVERY)
                    if progress.latest is not told:
                        told = progress.latest
                        await stream.send_all(_line(OperationLine(progress=told)))

            try:
                operation = decode(name, line)
                nursery.start_soon(hung_up)
                nursery.start_soon(report)
                result = await handle(self._controller, operation, progress)
                answer = OperationLine(result=msgspec.Raw(msgspec.json.encode(result)))
            except (EngineError, *UNDECODABLE) as error:
                answer = _failure(error)
            nursery.cancel_scope.cancel()
        if answer is not None:
            await stream.send_all(_line(answer))

    async def _stream_events(self, stream: trio.SocketStream) -> None:
        with self._controller.events() as events:
            for replica in self._status().replicas:
                name = {"in_sync": "replica_in_sync", "resyncing": "replica_resyncing"}.get(
                    replica.state, "replica_left"
                )
                await stream.send_all(
                    _line(EngineEvent(event=name, replica=replica.name, message=replica.reason or replica.state))
                )
            async for event in events:
                await stream.send_all(_line(event))

    async def _stream_right(self, stream: trio.SocketStream) -> None:
        keeper = self._controller.right
        while True:
            changed = keeper.changed
            await stream.send_all(_line(keeper.news()))
            await changed.wait()


@contextlib.contextmanager
def _hang_ups() -> Iterator[None]:
    """A client that is gone is no error, whichever task of its connection noticed."""
    try:
        yield
    except* (trio.BrokenResourceError, trio.ClosedResourceError):
        pass


def _failure(error: Exception) -> OperationLine:
    return OperationLine(error=OperationFailure(kind=type(error).__name__, message=str(error)))


def _line(message: Any) -> bytes:
    return msgspec.json.encode(message) + b"\n"


@contextlib.asynccontextmanager
async def control_socket(path: Path, server: ControlServer) -> AsyncIterator[None]:
    """Listen on `path` (mode 0600) inside the block. Raises OSError."""
    path.unlink(missing_ok=True)
    sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    await sock.bind(os.fspath(path))
    path.chmod(0o600)
    sock.listen(16)
    async with trio.open_nursery() as nursery:

        async def accept() -> None:
            listener = trio.SocketListener(sock)
            while True:
                try:
                    stream = await listener.accept()
                except OSError as error:
                    if error.errno not in (errno.EMFILE, errno.ENFILE):
                        raise
                    await trio.sleep(0.1)
                    continue
                nursery.start_soon(server._handle, stream)

        nursery.start_soon(accept)
        try:
            yield
        finally:
            nursery.cancel_scope.cancel()
            sock.close()
            path.unlink(missing_ok=True)
