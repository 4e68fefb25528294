"""An informer at a real API server: it knows what there is, whatever happens to the connection."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio

from share_manager.kube.client import Client
from share_manager.kube.informer import Informer, Store
from share_manager.kube.meta import ObjectMeta
from share_manager.kube.resources import ShareManager
from tests.lab.control_plane import ControlPlane


def share(name: str, group: str = "", namespace: str = "") -> ShareManager:
    return ShareManager(metadata=ObjectMeta(name=name, namespace=namespace, labels={"group": group} if group else {}))


def test_a_store_finds_by_group() -> None:
    store: Store[ShareManager] = Store(lambda one: one.metadata.labels.get("group", ""))
    store.put(share("a", "x", "n"))
    store.put(share("b", "x", "n"))
    store.put(share("a", "y", "n"))
    assert [one.name for one in store.of("x")] == ["b"]
    assert [one.name for one in store.of("y")] == ["a"]
    assert store.remove("n/a") is not None
    assert store.remove("n/a") is None
    assert store.of("y") == ()
    assert len(store.all()) == 1


async def until(what: Callable[[], bool], seconds: float = 30.0) -> None:
    with trio.fail_after(seconds):
        while not what():
            await trio.sleep(0.02)


@pytest.mark.system
async def test_it_knows_what_there_is_whatever_happens(
    kube: Client, control_plane: ControlPlane, nursery: trio.Nursery
) -> None:
    told: list[str] = []
    informer = Informer(kube, ShareManager, changed=lambda one: told.append(one.name), seconds=2)
    await kube.create(share("first"))

    def names() -> list[str]:
        return sorted(one.name for one in informer.store.all())

    nursery.start_soon(informer.run)
    await informer.synced.wait()
    assert names() == ["first"]
    await kube.create(share("second"))
    await until(lambda: names() == ["first", "second"])
    # a watch that the server ends is resumed, without a new list
    await trio.sleep(3)
    await kube.patch(ShareManager, "second", {"spec": {"node": "x"}})
    key = f"{kube.namespace}/second"
    await until(lambda: (found := informer.store.get(key)) is not None and found.spec.node == "x")
    assert informer.lists == 1
    # killed, and what happened is forgotten: it lists anew, and tells of what has gone meanwhile
    told.clear()
    with control_plane.away():
        await until(lambda: not informer.answers)
    await kube.delete(ShareManager, "first")
    await kube.create(share("third"))
    await until(lambda: names() == ["second", "third"])
    assert "first" in told
    assert informer.answers
    nursery.cancel_scope.cancel()


@pytest.mark.system
async def test_versions_that_are_forgotten_are_listed_anew(
    kube: Client, control_plane: ControlPlane, nursery: trio.Nursery
) -> None:
    informer = Informer(kube, ShareManager)
    await kube.create(share("first"))
    nursery.start_soon(informer.run)
    await informer.synced.wait()
    with control_plane.away():
        await until(lambda: not informer.answers)
    # the informer may have come back already: what it has is older than all that etcd knows in any case
    for number in range(3):
        await kube.create(share(f"s{number}"))
    control_plane.compact()
    with control_plane.away():
        pass
    await kube.delete(ShareManager, "first")
    await until(lambda: sorted(one.name for one in informer.store.all()) == ["s0", "s1", "s2"])
    nursery.cancel_scope.cancel()
