"""Events of Kubernetes about our objects. They are for people: one that cannot be written is dropped."""

from __future__ import annotations

import datetime
import hashlib
from typing import Literal

import structlog
import trio

from share_manager.kube.client import Client
from share_manager.kube.core import Event, EventSource, ObjectReference
from share_manager.kube.errors import ExistsError, KubeError
from share_manager.kube.meta import Object, ObjectMeta

log = structlog.get_logger()

_MOST_WAITING = 200
_MOST_KNOWN = 5000
_MESSAGE = 1024


def seconds_timestamp() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class EventRecorder:
    """`tell` never waits; `run` writes. The same once more is counted, not written anew."""

    def __init__(self, client: Client, component: str) -> None:
        self._client = client
        self._component = component
        self._send, self._receive = trio.open_memory_channel[Event](_MOST_WAITING)
        self._counts: dict[str, int] = {}

    def tell(self, about: Object, kind: Literal["Normal", "Warning"], reason: str, message: str) -> None:
        """`reason` is one word in CamelCase."""
        message = message[:_MESSAGE]
        meta = about.metadata
        same = hashlib.sha256(f"{meta.uid}\0{kind}\0{reason}\0{message}".encode()).hexdigest()[:16]
        name = f"{meta.name[:230]}.{same}"
        now = seconds_timestamp()
        event = Event(
            metadata=ObjectMeta(name=name, namespace=meta.namespace or "default"),
            involved_object=ObjectReference(
                api_version=about.GROUP_VERSION,
                kind=type(about).__name__,
                namespace=meta.namespace,
                name=meta.name,
                uid=meta.uid,
            ),
            reason=reason,
            message=message,
            type=kind,
            first_timestamp=now,
            last_timestamp=now,
            source=EventSource(component=self._component),
            reporting_component=self._component,
        )
        try:
            self._send.send_nowait(event)
        except trio.WouldBlock:
            log.info("event dropped", reason=reason, message=message)

    async def run(self) -> None:
        async for event in self._receive:
            try:
                await self._write(event)
            except KubeError as error:
                log.info("event not written", reason=event.reason, error=str(error))

    async def _write(self, event: Event) -> None:
        meta = event.metadata
        if len(self._counts) > _MOST_KNOWN:
            self._counts.clear()
        if meta.name not in self._counts:
            try:
                await self._client.create(event)
                self._counts[meta.name] = 1
                return
            except ExistsError:
                found = await self._client.get(Event, meta.name, namespace=meta.namespace)
                self._counts[meta.name] = found.count
        count = self._counts[meta.name] + 1
        body = {"count": count, "lastTimestamp": event.last_timestamp}
        try:
            await self._client.patch(Event, meta.name, body, namespace=meta.namespace)
            self._counts[meta.name] = count
        except KubeError:
            # the API server forgets events after an hour
            self._counts.pop(meta.name)
            raise
