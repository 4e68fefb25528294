"""What there is of one kind, kept up to date: list, watch, resume, list anew when the API server has forgotten."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import structlog
import trio

from share_manager.kube.client import WATCH_SECONDS, Client
from share_manager.kube.errors import ExpiredError, KubeError
from share_manager.kube.meta import Object

T = TypeVar("T", bound=Object)
log = structlog.get_logger()

_PAUSE = 0.2
_MOST = 5.0


class Store(Generic[T]):
    """Objects by key, and by what `group` says of each."""

    def __init__(self, group: Callable[[T], str] = lambda _: "") -> None:
        self._group = group
        self._items: dict[str, T] = {}
        self._groups: dict[str, dict[str, T]] = {}

    def get(self, key: str) -> T | None:
        return self._items.get(key)

    def all(self) -> tuple[T, ...]:
        return tuple(self._items.values())

    def of(self, group: str) -> tuple[T, ...]:
        return tuple(self._groups.get(group, {}).values())

    def put(self, item: T) -> T | None:
        """The one before."""
        before = self.remove(item.key)
        self._items[item.key] = item
        self._groups.setdefault(self._group(item), {})[item.key] = item
        return before

    def remove(self, key: str) -> T | None:
        before = self._items.pop(key, None)
        if before is not None:
            group = self._group(before)
            del self._groups[group][key]
            if not self._groups[group]:
                del self._groups[group]
        return before


class Informer(Generic[T]):
    """`run` is its life. `store` has what was last heard; `synced` is set once it has all. `changed` is called with
    every object that is new, changed or gone."""

    def __init__(
        self,
        client: Client,
        kind: type[T],
        *,
        namespace: str | None = None,
        labels: str = "",
        group: Callable[[T], str] = lambda _: "",
        changed: Callable[[T], None] = lambda _: None,
        seconds: int = WATCH_SECONDS,
    ) -> None:
        self.store: Store[T] = Store(group)
        self.synced = trio.Event()
        self.answers = True
        """Whether the API server answered last."""
        self.lists = 0
        self._client = client
        self._kind = kind
        self._namespace = namespace
        self._labels = labels
        self._changed = changed
        self._seconds = seconds

    async def run(self) -> None:
        version = ""
        pause = _PAUSE
        while True:
            try:
                if not version:
                    version = await self._list()
                version = await self._watch(version)
                pause = _PAUSE
            except ExpiredError:
                version = ""
            except KubeError as error:
                if self.answers:
                    log.warning("watch lost", kind=self._kind.PLURAL, reason=str(error))
                self.answers = False
                # whatever is the matter, a new list puts right; but one that only lost its connection goes on from
                # where it was, so that a restarted API server does not get all lists at once
                version = self._version
                await trio.sleep(pause)
                pause = min(pause * 2, _MOST)

    _version = ""

    async def _list(self) -> str:
        listing = await self._client.list(self._kind, namespace=self._namespace, labels=self._labels)
        self.answers = True
        self.lists += 1
        there = {item.key for item in listing.items}
        gone = [item for item in self.store.all() if item.key not in there]
        for item in gone:
            self.store.remove(item.key)
        changed = [item for item in listing.items if self.store.put(item) != item]
        self._version = listing.version
        self.synced.set()
        self._tell([*gone, *changed])
        return listing.version

    async def _watch(self, version: str) -> str:
        self._version = version
        try:
            async with self._client.watch(
                self._kind, version, namespace=self._namespace, labels=self._labels, seconds=self._seconds
            ) as changes:
                self.answers = True
                async for change in changes:
                    self._version = change.version or self._version
                    if change.object is None:
                        continue
                    if change.type == "DELETED":
                        self.store.remove(change.object.key)
                    else:
                        self.store.put(change.object)
                    self._tell([change.object])
        except ExpiredError:
            self._version = ""
            raise
        return self._version

    def _tell(self, items: Iterable[T]) -> None:
        for item in items:
            self._changed(item)
