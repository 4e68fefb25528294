"""The socket on which a share manager answers `status` and what share/requests.py has: one JSON line each way."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import trio

from share_manager.errors import (
    RemoteProblem,
    RuntimeProblem,
    VolumeNotServedError,
    exit_status_of,
    is_ours,
    leaves,
)
from share_manager.paths import VolumePaths
from share_manager.share.requests import ShareRequest
from share_manager.share.status import ShareStatus

_T = TypeVar("_T", bound=msgspec.Struct)
_TIMEOUT = 5.0
_MAX_LINE = 4 << 20


class _Request(msgspec.Struct, frozen=True):
    op: str


class _Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    result: msgspec.Raw = msgspec.Raw()
    error: str = ""
    exit_status: int = 1


Handlers = Mapping[type[ShareRequest], Callable[[Any], Awaitable[msgspec.Struct]]]


@contextlib.asynccontextmanager
async def control_socket(
    path: Path, status: Callable[[], Awaitable[ShareStatus]], handlers: Handlers
) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Bind the socket; the value answers on it until cancelled.

    What was begun for a request goes on when whoever asked hangs up.
    """
    kinds = {str(kind.__struct_config__.tag): kind for kind in handlers}
    path.unlink(missing_ok=True)
    listening = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    await listening.bind(str(path))
    os.chmod(path, 0o600)
    listening.listen(16)

    async def answer(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError, msgspec.DecodeError):
            with trio.move_on_after(_TIMEOUT):
                line = await _read_line(stream)
                if line is None:
                    raise trio.BrokenResourceError
                op = msgspec.json.decode(line, type=_Request).op
                if op == "status":
                    await stream.send_all(msgspec.json.encode(await status()) + b"\n")
                    line = None
            if line is not None:
                answered = await _carry_out(handlers, kinds.get(op), op, line)
                await stream.send_all(msgspec.json.encode(answered) + b"\n")
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.aclose()

    async def serve() -> None:
        await trio.serve_listeners(answer, [trio.SocketListener(listening)])

    try:
        yield serve
    finally:
        listening.close()
        path.unlink(missing_ok=True)


async def _carry_out(handlers: Handlers, kind: type[ShareRequest] | None, op: str, line: bytes) -> _Answer:
    if kind is None:
        return _Answer(error=f"the running share does not know {op!r}: it may be of an older release, restart it")
    request = msgspec.json.decode(line, type=kind)
    try:
        result = await handlers[kind](request)
    except Exception as error:
        ours = [leaf for leaf in leaves(error) if is_ours(leaf)]
        if not ours:
            raise
        return _Answer(error=str(ours[0]) or type(ours[0]).__name__, exit_status=exit_status_of(ours[0]))
    return _Answer(result=msgspec.Raw(msgspec.json.encode(result)))


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


async def ask(paths: VolumePaths, request: ShareRequest, result: type[_T]) -> _T:
    """Have the running share or attachment of a volume do something. Has no deadline.

    Raises VolumeNotServedError, RemoteProblem (with its message and exit status), RuntimeProblem.
    """
    try:
        stream = await trio.open_unix_socket(paths.control)
    except OSError:
        raise VolumeNotServedError(paths.volume) from None
    try:
        async with stream:
            await stream.send_all(msgspec.json.encode(request) + b"\n")
            line = await _read_line(stream)
    except trio.BrokenResourceError:
        line = None
    if line is None:
        raise RuntimeProblem(f"the share manager of volume {paths.volume} ended before it had answered")
    answer = msgspec.json.decode(line, type=_Answer)
    if not bytes(answer.result):
        raise RemoteProblem(answer.error, answer.exit_status)
    return msgspec.json.decode(answer.result, type=result)
