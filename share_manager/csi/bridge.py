"""gRPC's threads on one side, trio on the other: a call waits in a thread while a task of ours answers it.

A call's task is cancelled when its caller has gone or its deadline is near. Calls beyond MAX_CALLS at once are refused,
so that no flood of them makes threads without end.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import socket
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import grpc
import structlog
import trio
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from share_manager.csi.errors import CsiError, DeadlineError, InternalError, UnavailableError
from share_manager.csi.log import shown
from share_manager.csi.protocol import csi_pb2 as pb
from share_manager.errors import ConflictError, InvalidValueError, ShareManagerError

log = structlog.get_logger()

Handler: TypeAlias = Callable[[Any], Awaitable[Message]]

MAX_CALLS = 128
MAX_MESSAGE = 4 << 20
"""Bytes; gRPC's own default."""
LONGEST = 300.0
"""Seconds of a call that has no deadline, or a later one."""
MARGIN = 0.05
"""Part of the time that a call has left that is kept for its answer, between these bounds in seconds."""
_LEAST_MARGIN, _MOST_MARGIN = 0.05, 1.0
_STOP = 2.0
_MAX_SOCKET_PATH = 107
_QUIET = ("Probe", "GetPluginInfo", "NodeGetCapabilities", "ControllerGetCapabilities", "GetPluginCapabilities")


class EndpointBusyError(ConflictError):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.path = path

    def __str__(self) -> str:
        return f"another process serves {self.path}: stop it first"


def parse_endpoint(text: str) -> Path:
    """The socket of `unix:///csi/csi.sock`, `unix:/csi/csi.sock` or `/csi/csi.sock`. Raises InvalidValueError."""
    path = text.removeprefix("unix://") if text.startswith("unix://") else text.removeprefix("unix:")
    if not path.startswith("/") or path.endswith("/"):
        raise InvalidValueError("--endpoint", text, "write unix:// and an absolute path, such as unix:///csi/csi.sock")
    if len(path.encode()) > _MAX_SOCKET_PATH:
        raise InvalidValueError("--endpoint", text, f"a socket's path has at most {_MAX_SOCKET_PATH} bytes (unix(7))")
    return Path(path)


@contextlib.asynccontextmanager
async def serving(path: Path, services: Mapping[str, object]) -> AsyncIterator[None]:
    """Answer calls on a unix socket while the block runs. `services`, by their names in the protocol, have a coroutine
    method for every call. Raises InvalidValueError, EndpointBusyError."""
    await trio.to_thread.run_sync(_free, path)
    async with trio.open_nursery() as nursery:
        bridge = _Bridge(nursery)
        pool = concurrent.futures.ThreadPoolExecutor(MAX_CALLS, "csi")
        server = grpc.server(
            pool,
            handlers=[bridge.handlers(name, service) for name, service in services.items()],
            options=[("grpc.max_receive_message_length", MAX_MESSAGE), ("grpc.so_reuseport", 0)],
            maximum_concurrent_rpcs=MAX_CALLS,
        )
        try:
            server.add_insecure_port(f"unix:{path}")
            path.chmod(0o600)
        except (RuntimeError, OSError) as error:
            raise InvalidValueError("--endpoint", str(path), f"cannot listen there: {error}") from error
        server.start()
        try:
            yield
        finally:
            bridge.close()
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(server.stop(_STOP).wait)
                await trio.to_thread.run_sync(pool.shutdown)
            with contextlib.suppress(OSError):
                path.unlink()


def _free(path: Path) -> None:
    """Remove the socket of a process that is no more."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise InvalidValueError("--endpoint", str(path), "something else than a socket is there")
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise InvalidValueError("--endpoint", str(path), f"there is no directory {path.parent}") from None
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)
            return
    raise EndpointBusyError(path)


class _Bridge:
    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._token = trio.lowlevel.current_trio_token()
        self._closed = False

    def close(self) -> None:
        """Cancel what is under way, and refuse what comes."""
        self._closed = True
        self._nursery.cancel_scope.cancel()

    def handlers(self, name: str, service: object) -> grpc.GenericRpcHandler:
        methods = pb.DESCRIPTOR.services_by_name[name].methods
        return grpc.method_handlers_generic_handler(f"csi.v1.{name}", dict(self._handlers(methods, service)))

    def _handlers(
        self, methods: Iterable[MethodDescriptor], service: object
    ) -> Iterable[tuple[str, grpc.RpcMethodHandler[Any, Any]]]:
        for method in methods:
            answer = getattr(service, method.name)
            yield (
                method.name,
                grpc.unary_unary_rpc_method_handler(
                    lambda request, context, answer=answer, name=method.name: self._call(
                        name, answer, request, context
                    ),
                    request_deserializer=GetMessageClass(method.input_type).FromString,
                    response_serializer=lambda response: response.SerializeToString(),
                ),
            )

    def _call(self, name: str, answer: Handler, request: Any, context: grpc.ServicerContext) -> Message:
        """In one of gRPC's threads."""
        began = time.monotonic()
        call = _Call(name, answer, request, context.time_remaining())
        context.add_callback(partial(self._gone, call))
        if not self._soon(self._start, call):
            call.outcome.set_exception(UnavailableError("the driver is being stopped"))
        try:
            response = call.outcome.result()
        except CsiError as error:
            log.warning(
                "call",
                call=name,
                request=shown(request),
                code=error.code.name,
                message=str(error),
                seconds=round(time.monotonic() - began, 3),
            )
            _abort(context, error)
        if name not in _QUIET:
            log.info("call", call=name, request=shown(request), code="OK", seconds=round(time.monotonic() - began, 3))
        return response

    def _gone(self, call: _Call) -> None:
        self._soon(call.scope.cancel)

    def _soon(self, function: Callable[..., Any], *args: Any) -> bool:
        try:
            self._token.run_sync_soon(function, *args)
        except trio.RunFinishedError:
            return False
        return True

    def _start(self, call: _Call) -> None:
        if self._closed:
            call.outcome.set_exception(UnavailableError("the driver is being stopped"))
        else:
            self._nursery.start_soon(call.run)


class _Call:
    def __init__(self, name: str, answer: Handler, request: Any, remaining: float | None) -> None:
        self.outcome: concurrent.futures.Future[Message] = concurrent.futures.Future()
        self.scope = trio.CancelScope()
        self._name = name
        self._answer = answer
        self._request = request
        left = LONGEST if remaining is None else min(LONGEST, max(0.0, remaining))
        self._until = time.monotonic() + left - min(_MOST_MARGIN, max(_LEAST_MARGIN, left * MARGIN))

    async def run(self) -> None:
        response: Message | None = None
        error: CsiError = DeadlineError(f"{self._name} was not done in time; it can be repeated")
        try:
            self.scope.deadline = trio.current_time() + self._until - time.monotonic()
            with self.scope:
                response = await self._answer(self._request)
        except CsiError as caught:
            error = caught
        except ShareManagerError as caught:
            error = InternalError(str(caught))
        except trio.Cancelled:
            error = UnavailableError("the driver is being stopped")
            raise
        except Exception as caught:
            # a call must not end the driver, under which other calls are served
            log.exception("defect", call=self._name)
            error = InternalError(f"a defect of share-manager: {type(caught).__name__}")
        finally:
            if response is None:
                self.outcome.set_exception(error)
            else:
                self.outcome.set_result(response)


def _abort(context: grpc.ServicerContext, error: CsiError) -> NoReturn:
    context.abort(error.code, str(error))
    raise AssertionError("abort does not return")
