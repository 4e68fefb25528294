"""What a decision may ask for, and how it is carried out: one after the other, none after one that failed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, Protocol

import msgspec

from share_manager.kube.client import Client
from share_manager.kube.errors import ExistsError
from share_manager.kube.meta import Object

Json = dict[str, Any]


class Create(msgspec.Struct, frozen=True, kw_only=True):
    kind: type[Object]
    body: Json


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """A merge patch of an object, only where it still is of the version that was observed."""

    of: Object
    patch: Json


class SetStatus(msgspec.Struct, frozen=True, kw_only=True):
    before: Object
    after: Object


class Remove(msgspec.Struct, frozen=True, kw_only=True):
    """`grace` in seconds; 0: without waiting for whoever runs it, None: what it asks for itself."""

    of: Object
    grace: int | None = None


class Tell(msgspec.Struct, frozen=True, kw_only=True):
    """An event."""

    about: Object
    type: Literal["Normal", "Warning"]
    reason: str
    message: str


class Again(msgspec.Struct, frozen=True, kw_only=True):
    """Look once more after so many seconds, whatever changes."""

    after: float


Action = Create | Change | SetStatus | Remove | Tell | Again


class Teller(Protocol):
    def tell(self, about: Object, kind: Literal["Normal", "Warning"], reason: str, message: str) -> None: ...


async def apply(actions: Iterable[Action], client: Client, events: Teller) -> float | None:
    """The seconds of the first `Again`. Raises KubeError; those before are done then, and those after are not."""
    again = None
    for action in actions:
        match action:
            case Create(kind=kind, body=body):
                try:
                    await client.create_json(kind, body)
                except ExistsError:
                    # we have not heard of it yet; when it is not what it should be, we will see
                    again = min(again or 1.0, 1.0)
            case Change(of=of, patch=patch):
                meta = of.metadata
                await client.patch(type(of), meta.name, patch, version=meta.resource_version)
            case SetStatus(before=before, after=after):
                await client.update_status(before, after)
            case Remove(of=of, grace=grace):
                await client.delete(type(of), of.metadata.name, uid=of.metadata.uid, grace=grace)
            case Tell(about=about, type=kind_, reason=reason, message=message):
                events.tell(about, kind_, reason, message)
            case Again(after=after):
                again = min(again, after) if again is not None else after
    return again
