"""What answers of the API server mean; without one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from share_manager.kube import wire
from share_manager.kube.core import Node, Secret
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
)
from share_manager.kube.meta import ObjectMeta
from share_manager.kube.resources import ShareManager, Volume, VolumeSpec


@pytest.mark.parametrize(
    ("status", "reason", "kind"),
    [
        (401, "Unauthorized", ForbiddenError),
        (403, "Forbidden", ForbiddenError),
        (404, "NotFound", NotFoundError),
        (409, "AlreadyExists", ExistsError),
        (409, "Conflict", ConflictError),
        (410, "Expired", ExpiredError),
        (422, "Invalid", InvalidObjectError),
        (429, "TooManyRequests", ApiAwayError),
        (500, "InternalError", ApiAwayError),
        (503, "ServiceUnavailable", ApiAwayError),
        (504, "Timeout", ApiAwayError),
    ],
)
def test_failures(status: int, reason: str, kind: type[KubeError]) -> None:
    body = json.dumps({"kind": "Status", "reason": reason, "message": "why", "code": status}).encode()
    error = wire.failure("get volumes/v", status, body, {"retry-after": "7"})
    assert type(error) is kind
    assert str(error).startswith("get volumes/v: why")
    if isinstance(error, ApiAwayError):
        assert error.retry_after == 7.0


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"message": 5}', b"\xff"])
def test_a_failure_that_is_no_status(body: bytes) -> None:
    assert isinstance(wire.failure("get volumes/v", 502, body, {}), ApiAwayError)


def test_paths() -> None:
    assert wire.get(Volume, "s", "v").path == "/apis/share-manager.io/v1beta1/namespaces/s/volumes/v"
    assert wire.get(Node, "", "n").path == "/api/v1/nodes/n"
    patch = wire.patch(ShareManager, "s", "v", {"status": {}}, version="5", subresource="status")
    assert patch.path.endswith("/sharemanagers/v/status")
    assert json.loads(patch.body or b"") == {"status": {}, "metadata": {"resourceVersion": "5"}}


def test_what_is_sent_says_what_it_is() -> None:
    body = json.loads(wire.encode(Volume(metadata=ObjectMeta(name="v"), spec=VolumeSpec(size=1 << 30))))
    assert body == {
        "apiVersion": "share-manager.io/v1beta1",
        "kind": "Volume",
        "metadata": {"name": "v"},
        "spec": {"size": 1 << 30},
    }


def test_nothing_is_replaced_blindly() -> None:
    with pytest.raises(ValueError, match="version"):
        wire.replace(Volume(metadata=ObjectMeta(name="v"), spec=VolumeSpec(size=1 << 30)))


def event(kind: str, item: Any) -> bytes:
    return json.dumps({"type": kind, "object": item}).encode()


def test_events_of_a_watch() -> None:
    item = {"metadata": {"name": "v", "resourceVersion": "7"}, "spec": {"size": 4096 * 256}}
    change = wire.decode_change("watch", event("ADDED", item), Volume)
    assert (change.type, change.version) == ("ADDED", "7")
    mark = wire.decode_change("watch", event("BOOKMARK", {"metadata": {"resourceVersion": "9"}}), Volume)
    assert (mark.object, mark.version) == (None, "9")
    with pytest.raises(ExpiredError):
        wire.decode_change("watch", event("ERROR", {"code": 410, "reason": "Expired", "message": "too old"}), Volume)
    for bad in (b"{", event("ADDED", {"metadata": 5}), b"5", event("ADDED", {"metadata": {}})):
        with pytest.raises(NonsenseError):
            wire.decode_change("watch", bad, Volume)


def test_an_empty_list_may_be_null() -> None:
    assert wire.decode_page("list", b'{"metadata":{"resourceVersion":"3"},"items":null}', Node) == ([], "3", "")


def test_a_secret_does_not_show() -> None:
    assert "aGVsbG8" not in repr(Secret(metadata=ObjectMeta(name="s"), data={"k": "aGVsbG8="}))
