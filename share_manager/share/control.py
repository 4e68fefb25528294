"""The socket on which a share manager answers `status`, `volume` and `stop`: one JSON line each way."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import msgspec
import trio

from share_manager.errors import RuntimeProblem
from share_manager.share.status import ShareStatus

_TIMEOUT = 5.0
_MAX_LINE = 4 << 20


class _Request(msgspec.Struct, frozen=True):
    op: str


@contextlib.asynccontextmanager
async def control_socket(
    path: Path, status: Callable[[], Awaitable[ShareStatus]]
) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Bind the socket; the value answers on it until cancelled."""
    path.unlink(missing_ok=True)
    listening = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    await listening.bind(str(path))
    os.chmod(path, 0o600)
    listening.listen(16)

    async def answer(stream: trio.SocketStream) -> None:
        with trio.move_on_after(_TIMEOUT), contextlib.suppress(trio.BrokenResourceError, msgspec.DecodeError):
            line = await _read_line(stream)
            if line is not None and msgspec.json.decode(line, type=_Request).op == "status":
                await stream.send_all(msgspec.json.encode(await status()) + b"\n")
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.aclose()

    async def serve() -> None:
        await trio.serve_listeners(answer, [trio.SocketListener(listening)])

    try:
        yield serve
    finally:
        listening.close()
        path.unlink(missing_ok=True)


async def _read_line(stream: trio.SocketStream) -> bytes | None:
    buffer = bytearray()
    async for chunk in stream:
        buffer += chunk
        if b"\n" in buffer:
            return bytes(buffer).partition(b"\n")[0]
        if len(buffer) > _MAX_LINE:
            return None
    return None


async def ask_status(path: Path, timeout: float = _TIMEOUT) -> ShareStatus | None:
    """The status of the share manager behind the socket, None when there is none.

    Raises RuntimeProblem when there is one that does not answer.
    """
    with trio.move_on_after(timeout):
        try:
            stream = await trio.open_unix_socket(path)
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        try:
            async with stream:
                await stream.send_all(msgspec.json.encode(_Request("status")) + b"\n")
                line = await _read_line(stream)
        except trio.BrokenResourceError:
            return None
        if line is None:
            return None
        return msgspec.json.decode(line, type=ShareStatus)
    raise RuntimeProblem(f"the share manager behind {path} does not answer within {timeout:g} s")
