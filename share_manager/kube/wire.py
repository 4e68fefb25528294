"""Requests to the API server and what its answers mean, without I/O."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import msgspec

from share_manager.kube.errors import (
    ApiAwayError,
    ConflictError,
    ExistsError,
    ExpiredError,
    ForbiddenError,
    InvalidObjectError,
    KubeError,
    NonsenseError,
    NotFoundError,
    RefusedError,
)
from share_manager.kube.meta import Model, Object, ObjectMeta

Json = dict[str, Any]
T = TypeVar("T", bound=Object)

MERGE_PATCH = "application/merge-patch+json"
JSON = "application/json"
UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """`what` is for people."""

    method: str
    path: str
    what: str
    query: dict[str, str] = {}
    body: bytes | None = None
    content_type: str = JSON


class Listing(msgspec.Struct, Generic[T], frozen=True):
    """All objects there were at `version`, from which a watch goes on."""

    items: tuple[T, ...]
    version: str


class Change(msgspec.Struct, Generic[T], frozen=True):
    """One event of a watch. `type`: ADDED, MODIFIED, DELETED, or BOOKMARK with no object."""

    type: str
    object: T | None
    version: str


def _path(kind: type[Object], namespace: str, name: str = "", subresource: str = "") -> str:
    group = kind.GROUP_VERSION
    parts = ["/apis" if "/" in group else "/api", group]
    if kind.NAMESPACED and namespace:
        parts += ["namespaces", namespace]
    parts += [kind.PLURAL, name, subresource]
    return "/".join(part for part in parts if part)


def _what(verb: str, kind: type[Object], namespace: str, name: str = "") -> str:
    where = f"{namespace}/{name}" if kind.NAMESPACED and namespace and name else name or namespace
    return f"{verb} {kind.PLURAL}/{where}" if where else f"{verb} {kind.PLURAL}"


def encode(item: Object) -> bytes:
    """With what says which kind it is."""
    head = {"apiVersion": item.GROUP_VERSION, "kind": type(item).__name__}
    return msgspec.json.encode(head | msgspec.to_builtins(item))


def get(kind: type[Object], namespace: str, name: str) -> Request:
    return Request(method="GET", path=_path(kind, namespace, name), what=_what("get", kind, namespace, name))


def list_all(kind: type[Object], namespace: str, labels: str = "", page: str = "", limit: int = 500) -> Request:
    query = {"limit": str(limit)} | ({"labelSelector": labels} if labels else {}) | ({"continue": page} if page else {})
    return Request(method="GET", path=_path(kind, namespace), what=_what("list", kind, namespace), query=query)


def watch(kind: type[Object], namespace: str, version: str, labels: str, seconds: int) -> Request:
    query = {
        "watch": "1",
        "resourceVersion": version,
        "allowWatchBookmarks": "true",
        "timeoutSeconds": str(seconds),
    } | ({"labelSelector": labels} if labels else {})
    return Request(method="GET", path=_path(kind, namespace), what=_what("watch", kind, namespace), query=query)


def create(item: Object, namespace: str) -> Request:
    kind = type(item)
    name = item.metadata.name or item.metadata.generate_name
    return Request(
        method="POST", path=_path(kind, namespace), what=_what("create", kind, namespace, name), body=encode(item)
    )


def create_json(kind: type[Object], body: Json, namespace: str) -> Request:
    meta = body["metadata"]
    name = meta.get("name") or meta["generateName"]
    whole = {"apiVersion": kind.GROUP_VERSION, "kind": kind.__name__} | body
    return Request(
        method="POST",
        path=_path(kind, namespace),
        what=_what("create", kind, namespace, name),
        body=msgspec.json.encode(whole),
    )


def replace(item: Object, subresource: str = "") -> Request:
    """Only where it is still of the version that `item` was read at."""
    kind, meta = type(item), item.metadata
    if not meta.resource_version:
        raise ValueError("an object is replaced at the version at which it was read")
    return Request(
        method="PUT",
        path=_path(kind, meta.namespace, meta.name, subresource),
        what=_what("replace", kind, meta.namespace, meta.name),
        body=encode(item),
    )


def patch(
    kind: type[Object], namespace: str, name: str, body: Json, *, version: str = "", subresource: str = ""
) -> Request:
    """A merge patch; with `version`, only where the object still is of that."""
    if version:
        body = body | {"metadata": body.get("metadata", {}) | {"resourceVersion": version}}
    return Request(
        method="PATCH",
        path=_path(kind, namespace, name, subresource),
        what=_what("patch", kind, namespace, name),
        body=msgspec.json.encode(body),
        content_type=MERGE_PATCH,
    )


def delete(
    kind: type[Object], namespace: str, name: str, *, uid: str = "", version: str = "", grace: int | None = None
) -> Request:
    """With `uid` or `version`, only that very object. `grace` in seconds; 0: at once."""
    conditions = ({"uid": uid} if uid else {}) | ({"resourceVersion": version} if version else {})
    options: Json = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"}
    if conditions:
        options["preconditions"] = conditions
    if grace is not None:
        options["gracePeriodSeconds"] = grace
    return Request(
        method="DELETE",
        path=_path(kind, namespace, name),
        what=_what("delete", kind, namespace, name),
        body=msgspec.json.encode(options),
    )


class _Status(Model, frozen=True, kw_only=True):
    reason: str = ""
    message: str = ""
    code: int = 0


def failure(what: str, status: int, body: bytes, headers: Mapping[str, str]) -> KubeError:
    """What an answer that is no success means."""
    try:
        said = msgspec.json.decode(body, type=_Status)
    except UNDECODABLE:
        said = _Status(message=body[:200].decode(errors="replace"))
    reason = said.message or said.reason or f"status {status}"
    if status == 429 or status >= 500:
        after = headers.get("retry-after", "")
        return ApiAwayError(what, reason, float(after) if after.isdecimal() else 0.0)
    if status in (401, 403):
        return ForbiddenError(what, reason, status)
    if status == 404:
        return NotFoundError(what, reason, status)
    if status == 409:
        return (ExistsError if said.reason == "AlreadyExists" else ConflictError)(what, reason, status)
    if status == 410:
        return ExpiredError(what, reason, status)
    if status in (400, 422):
        return InvalidObjectError(what, reason, status)
    return RefusedError(what, reason, status)


def decode(what: str, body: bytes, kind: type[T]) -> T:
    """Raises NonsenseError."""
    try:
        return msgspec.json.decode(body, type=kind)
    except UNDECODABLE as error:
        raise NonsenseError(what, f"the answer makes no sense: {error}") from error


class _ListMeta(Model, frozen=True, kw_only=True):
    resource_version: str = ""
    continue_: str = msgspec.field(default="", name="continue")


class _List(Model, frozen=True, kw_only=True):
    metadata: _ListMeta = _ListMeta()
    items: list[msgspec.Raw] | None = None


def decode_page(what: str, body: bytes, kind: type[T]) -> tuple[list[T], str, str]:
    """Some of the objects, the version of the whole, and where the next ones are; empty: there are none.

    Raises NonsenseError.
    """
    found = decode_any(what, body, _List)
    items = [decode(what, bytes(item), kind) for item in found.items or ()]
    return items, found.metadata.resource_version, found.metadata.continue_


class _Event(Model, frozen=True, kw_only=True):
    type: str
    object: msgspec.Raw


class _Bare(Model, frozen=True, kw_only=True):
    metadata: ObjectMeta = ObjectMeta()


def decode_change(what: str, line: bytes, kind: type[T]) -> Change[T]:
    """One line of a watch. Raises ExpiredError and what else its end may mean, NonsenseError."""
    event = decode_any(what, line, _Event)
    if event.type == "ERROR":
        status = decode_any(what, bytes(event.object), _Status)
        raise failure(what, status.code or 500, bytes(event.object), {})
    if event.type == "BOOKMARK":
        bare = decode_any(what, bytes(event.object), _Bare)
        return Change("BOOKMARK", None, bare.metadata.resource_version)
    found = decode(what, bytes(event.object), kind)
    return Change(event.type, found, found.metadata.resource_version)


M = TypeVar("M", bound=Model)


def decode_any(what: str, body: bytes, kind: type[M]) -> M:
    """Raises NonsenseError."""
    try:
        return msgspec.json.decode(body, type=kind)
    except UNDECODABLE as error:
        raise NonsenseError(what, f"the answer makes no sense: {error}") from error
