"""The API server, for trio. Every call ends within its time-out, and cancelling it ends it at once.

That is why this is not the official client, which is synchronous: a thread that waits for a watch cannot be told that
this process is the leader no more. (It also takes 126 MB of disk and 34 MB of memory, in every pod of a share.)
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Generic, TypeVar
from urllib.parse import urlencode

import trio

from share_manager.kube import wire
from share_manager.kube.access import Access
from share_manager.kube.errors import ApiAwayError, ExistsError, ExpiredError, NonsenseError, NotFoundError
from share_manager.kube.http import Http, HttpError, Response
from share_manager.kube.meta import Object
from share_manager.kube.patch import part_changes
from share_manager.kube.wire import Change, Json, Listing, Request

T = TypeVar("T", bound=Object)

CALL_TIMEOUT = 5.0
"""Seconds; below the time in which a leader has to renew its lease."""
WATCH_SECONDS = 300
"""After so long the server ends a watch, and it goes on with another one."""
_MAX_BODY = 64 << 20
_MAX_LINE = 8 << 20


class Client:
    """An async context manager. `namespace` is where objects are unless another one is named. All calls raise
    KubeError, which is `ApiAwayError` when it is not known whether it was done, and AccessError."""

    def __init__(self, access: Access, *, namespace: str = "", timeout: float = CALL_TIMEOUT) -> None:
        """`timeout` in seconds, of every call but a watch. Raises AccessError."""
        self.namespace = namespace or access.namespace
        self._access = access
        self._timeout = timeout
        self._http = Http(access.server, access.tls(), "share-manager")

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.close()

    async def get(self, kind: type[T], name: str, *, namespace: str | None = None) -> T:
        """Raises NotFoundError."""
        request = wire.get(kind, self._where(kind, namespace), name)
        return wire.decode(request.what, await self._send(request), kind)

    async def find(self, kind: type[T], name: str, *, namespace: str | None = None) -> T | None:
        """None where there is none."""
        try:
            return await self.get(kind, name, namespace=namespace)
        except NotFoundError:
            return None

    async def list(self, kind: type[T], *, namespace: str | None = None, labels: str = "") -> Listing[T]:
        """All of them, those with `labels` only; all of all namespaces with "" for `namespace`."""
        for _ in range(3):
            items: list[T] = []
            version = page = ""
            try:
                while True:
                    request = wire.list_all(kind, self._where(kind, namespace), labels, page)
                    some, at, page = wire.decode_page(request.what, await self._send(request), kind)
                    items += some
                    # all pages are of the version of the first
                    version = version or at
                    if not page:
                        return Listing(tuple(items), version)
            except ExpiredError:
                # it took longer than the server keeps that version: from the beginning
                if not page:
                    raise
        raise ApiAwayError(f"list {kind.PLURAL}", "it expires before all pages are read")

    @contextlib.asynccontextmanager
    async def watch(
        self,
        kind: type[T],
        version: str,
        *,
        namespace: str | None = None,
        labels: str = "",
        seconds: int = WATCH_SECONDS,
    ) -> AsyncIterator[Watch[T]]:
        """What changes after `version`. The iterator ends when the server, after `seconds`, ends it; go on from the
        version of the last change. Raises ExpiredError when only a new list helps."""
        request = wire.watch(kind, self._where(kind, namespace), version, labels, seconds)
        async with contextlib.AsyncExitStack() as stack:
            response = await self._open(request, stack)
            yield Watch(request, response, kind)

    async def _open(self, request: Request, stack: contextlib.AsyncExitStack) -> Response:
        target = f"{request.path}?{urlencode(request.query)}"
        with trio.move_on_after(self._timeout):
            try:
                asked = self._http.request(request.method, target, self._access.headers())
                response = await stack.enter_async_context(asked)
                if response.status == 200:
                    return response
                body = await response.body(_MAX_BODY)
            except HttpError as error:
                raise ApiAwayError(request.what, str(error)) from error
            raise wire.failure(request.what, response.status, body, response.headers)
        raise ApiAwayError(request.what, f"no answer within {self._timeout:g} s")

    async def create(self, item: T, *, namespace: str | None = None) -> T:
        """Raises ExistsError, InvalidObjectError."""
        request = wire.create(item, item.metadata.namespace or self._where(type(item), namespace))
        return wire.decode(request.what, await self._send(request), type(item))

    async def create_json(self, kind: type[T], body: Json, *, namespace: str | None = None) -> T:
        """One of which we write more than `kind` has. Raises ExistsError, InvalidObjectError."""
        request = wire.create_json(kind, body, self._where(kind, namespace))
        return wire.decode(request.what, await self._send(request), kind)

    async def ensure(self, item: T) -> T:
        """As it is there, made when there is none."""
        try:
            return await self.create(item)
        except ExistsError:
            return await self.get(type(item), item.metadata.name)

    async def replace(self, item: T) -> T:
        """Where it is still as it was read. Of our own kinds only. Raises ConflictError, NotFoundError."""
        request = wire.replace(item)
        return wire.decode(request.what, await self._send(request), type(item))

    async def patch(
        self,
        kind: type[T],
        name: str,
        body: Json,
        *,
        version: str = "",
        subresource: str = "",
        namespace: str | None = None,
    ) -> T:
        """A JSON merge patch; with `version`, only where the object still is of that.

        Raises ConflictError, NotFoundError.
        """
        request = wire.patch(kind, self._where(kind, namespace), name, body, version=version, subresource=subresource)
        return wire.decode(request.what, await self._send(request), kind)

    async def update_status(self, before: T, after: T) -> T:
        """Make the status of `before`, as it was read, that of `after`; sends nothing when they are equal.

        Raises ConflictError when the object is another one by now.
        """
        difference = part_changes(before.status, after.status)  # type: ignore[attr-defined]
        if not difference:
            return before
        meta = before.metadata
        return await self.patch(
            type(before),
            meta.name,
            {"status": difference},
            version=meta.resource_version,
            subresource="status",
            namespace=meta.namespace or None,
        )

    async def delete(
        self,
        kind: type[Object],
        name: str,
        *,
        uid: str = "",
        version: str = "",
        grace: int | None = None,
        namespace: str | None = None,
    ) -> None:
        """With `uid` or `version` only that very object (else ConflictError). It is no error when there is none."""
        with contextlib.suppress(NotFoundError):
            where = self._where(kind, namespace)
            await self._send(wire.delete(kind, where, name, uid=uid, version=version, grace=grace))

    async def ask(self, path: str) -> bytes:
        """GET of something that is no object, such as /version. Raises KubeError."""
        return await self._send(Request(method="GET", path=path, what=f"get {path}"))

    def _where(self, kind: type[Object], namespace: str | None) -> str:
        return (self.namespace if namespace is None else namespace) if kind.NAMESPACED else ""

    async def _send(self, request: Request) -> bytes:
        target = f"{request.path}?{urlencode(request.query)}" if request.query else request.path
        headers = self._access.headers()
        if request.body is not None:
            headers["Content-Type"] = request.content_type
        with trio.move_on_after(self._timeout):
            try:
                async with self._http.request(request.method, target, headers, request.body) as response:
                    body = await response.body(_MAX_BODY)
            except HttpError as error:
                raise ApiAwayError(request.what, str(error)) from error
            if not 200 <= response.status < 300:
                raise wire.failure(request.what, response.status, body, response.headers)
            return body
        raise ApiAwayError(request.what, f"no answer within {self._timeout:g} s")


class Watch(Generic[T]):
    """Asynchronous iterator of changes."""

    def __init__(self, request: Request, response: Response, kind: type[T]) -> None:
        self._request = request
        self._response = response
        self._kind = kind
        self._lines: list[bytes] = []
        self._rest = b""

    def __aiter__(self) -> Watch[T]:
        return self

    async def __anext__(self) -> Change[T]:
        what = self._request.what
        while not self._lines:
            try:
                chunk = await self._response.chunk()
            except HttpError as error:
                raise ApiAwayError(what, str(error)) from error
            if not chunk:
                raise StopAsyncIteration
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            if len(self._rest) > _MAX_LINE:
                raise NonsenseError(what, f"one event of more than {_MAX_LINE} bytes")
            self._lines = [line for line in reversed(lines) if line.strip()]
        return wire.decode_change(what, self._lines.pop(), self._kind)
