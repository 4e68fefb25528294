"""The engine's control socket: status and events for its supervisor, one JSON object a line."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import trio

from engine.client import MAX_LINE, EngineEvent, EngineStatus
from engine.controller.driver import Controller
from engine.frontend import FrontendSession


class _Request(msgspec.Struct):
    op: str


class ControlServer:
    """Answers `status` and `events`; whatever else comes, that connection ends and nothing is harmed."""

    def __init__(self, controller: Controller, frontend: str, block_file: str, session: FrontendSession) -> None:
        self._controller = controller
        self._frontend = frontend
        self._block_file = block_file
        self._session = session

    def _status(self) -> EngineStatus:
        status = self._controller.status(self._frontend, self._block_file)
        return msgspec.structs.replace(status, resumable=self._session.resumable)

    async def _handle(self, stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async with stream:
                line = b""
                while not line.endswith(b"\n"):
                    chunk = await stream.receive_some(4096)
                    line += chunk
                    if not chunk or len(line) > MAX_LINE:
                        return
                try:
                    request = msgspec.json.decode(line, type=_Request)
                except msgspec.MsgspecError:
                    return
                if request.op == "status":
                    await stream.send_all(_line(self._status()))
                elif request.op == "events":
                    await self._stream_events(stream)

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
