"""The API server, for worker threads and for processes without trio. Each step of a call ends within its time-out."""

from __future__ import annotations

import contextlib
import http.client
import ssl
import threading
from typing import TypeVar
from urllib.parse import urlencode, urlsplit

from share_manager.kube import wire
from share_manager.kube.access import Access
from share_manager.kube.errors import ApiAwayError, NotFoundError
from share_manager.kube.meta import Object
from share_manager.kube.wire import Json, Request

T = TypeVar("T", bound=Object)

CALL_TIMEOUT = 3.0
_MAX_BODY = 64 << 20
_GONE = (OSError, http.client.HTTPException)


class BlockingClient:
    """One connection, made when it is needed and again after a failure; calls of several threads take turns. Raises
    KubeError as `Client` does."""

    def __init__(self, access: Access, *, namespace: str = "", timeout: float = CALL_TIMEOUT) -> None:
        """`timeout` in seconds, of every step of a call. Raises AccessError."""
        self.namespace = namespace or access.namespace
        self._access = access
        self._timeout = timeout
        self._tls: ssl.SSLContext = access.tls()
        self._url = urlsplit(access.server)
        self._lock = threading.Lock()
        self._connection: http.client.HTTPSConnection | None = None

    def close(self) -> None:
        with self._lock:
            self._hang_up()

    def get(self, kind: type[T], name: str) -> T:
        """Raises NotFoundError."""
        request = wire.get(kind, self._where(kind), name)
        return wire.decode(request.what, self._send(request), kind)

    def find(self, kind: type[T], name: str) -> T | None:
        with contextlib.suppress(NotFoundError):
            return self.get(kind, name)
        return None

    def list(self, kind: type[T], labels: str = "") -> tuple[T, ...]:
        items: list[T] = []
        page = ""
        while True:
            request = wire.list_all(kind, self._where(kind), labels, page)
            some, _, page = wire.decode_page(request.what, self._send(request), kind)
            items += some
            if not page:
                return tuple(items)

    def create(self, item: T) -> T:
        """Raises ExistsError, InvalidObjectError."""
        request = wire.create(item, self._where(type(item)))
        return wire.decode(request.what, self._send(request), type(item))

    def replace(self, item: T) -> T:
        """Where it is still as it was read. Raises ConflictError, NotFoundError."""
        request = wire.replace(item)
        return wire.decode(request.what, self._send(request), type(item))

    def patch(self, kind: type[T], name: str, body: Json, *, version: str = "") -> T:
        """Raises ConflictError, NotFoundError."""
        request = wire.patch(kind, self._where(kind), name, body, version=version)
        return wire.decode(request.what, self._send(request), kind)

    def _where(self, kind: type[Object]) -> str:
        return self.namespace if kind.NAMESPACED else ""

    def _send(self, request: Request) -> bytes:
        with self._lock:
            fresh = self._connection is None
            try:
                return self._ask(request)
            except _GONE as error:
                self._hang_up()
                # an idle connection may have ended since; what changes something is not repeated, it may be done
                if fresh or isinstance(error, TimeoutError) or request.method != "GET":
                    raise ApiAwayError(request.what, _words(error)) from error
            try:
                return self._ask(request)
            except _GONE as error:
                self._hang_up()
                raise ApiAwayError(request.what, _words(error)) from error

    def _ask(self, request: Request) -> bytes:
        if self._connection is None:
            host, port = self._url.hostname or "", self._url.port or 443
            self._connection = http.client.HTTPSConnection(host, port, timeout=self._timeout, context=self._tls)
        headers = {"Accept": wire.JSON, "User-Agent": "share-manager"} | self._access.headers()
        if request.body is not None:
            headers["Content-Type"] = request.content_type
        target = self._url.path.rstrip("/") + request.path
        if request.query:
            target += f"?{urlencode(request.query)}"
        self._connection.request(request.method, target, request.body, headers)
        answer = self._connection.getresponse()
        body = answer.read(_MAX_BODY)
        if not 200 <= answer.status < 300:
            if not answer.isclosed():
                self._hang_up()
            raise wire.failure(
                request.what, answer.status, body, {name.lower(): value for name, value in answer.getheaders()}
            )
        return body

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _words(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
