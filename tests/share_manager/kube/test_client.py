"""The client against a real API server, also when that is away, slow, or has forgotten."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import msgspec
import pytest
import trio

from share_manager.kube.access import Access
from share_manager.kube.client import Client
from share_manager.kube.core import Node, Pod, Secret
from share_manager.kube.errors import (
    ApiAwayError,
    ConflictError,
    ExistsError,
    ExpiredError,
    ForbiddenError,
    NotFoundError,
)
from share_manager.kube.meta import ObjectMeta
from share_manager.kube.resources import Attachment, ShareManager, ShareManagerSpec, Volume, VolumeSpec
from tests.lab.control_plane import ControlPlane

pytestmark = pytest.mark.system


def share(name: str, **labels: str) -> ShareManager:
    return ShareManager(metadata=ObjectMeta(name=name, labels=labels))


async def test_an_object_from_its_creation_to_its_end(kube: Client) -> None:
    made = await kube.create(share("one"))
    assert made.metadata.uid
    with pytest.raises(ExistsError):
        await kube.create(share("one"))
    assert await kube.ensure(share("one")) == made
    assert await kube.get(ShareManager, "one") == made
    changed = msgspec.structs.replace(made, spec=ShareManagerSpec(node="a"))
    second = await kube.replace(changed)
    assert second.spec.node == "a"
    with pytest.raises(ConflictError):
        await kube.replace(changed)
    with pytest.raises(ConflictError):
        await kube.patch(ShareManager, "one", {"spec": {"node": "b"}}, version=made.metadata.resource_version)
    third = await kube.patch(ShareManager, "one", {"spec": {"node": "b"}}, version=second.metadata.resource_version)
    with pytest.raises(ConflictError):
        await kube.delete(ShareManager, "one", version=second.metadata.resource_version)
    with pytest.raises(ConflictError):
        await kube.delete(ShareManager, "one", uid="another")
    await kube.delete(ShareManager, "one", uid=third.metadata.uid)
    await kube.delete(ShareManager, "one")
    assert await kube.find(ShareManager, "one") is None
    with pytest.raises(NotFoundError):
        await kube.get(ShareManager, "one")


async def test_two_nodes_attach_without_a_conflict(kube: Client) -> None:
    """Attachments are a map, so that a patch names its own only."""
    await kube.create(share("one"))
    async with trio.open_nursery() as nursery:
        for node in ("a", "b", "c"):
            nursery.start_soon(_attach, kube, node)
    found = await kube.get(ShareManager, "one")
    assert found.spec.attachments == {node: Attachment() for node in ("a", "b", "c")}
    left = await kube.patch(ShareManager, "one", {"spec": {"attachments": {"b": None, "never": None}}})
    assert set(left.spec.attachments) == {"a", "c"}


async def _attach(kube: Client, node: str) -> None:
    await kube.patch(ShareManager, "one", {"spec": {"attachments": {node: {}}}})


async def test_lists_have_all_pages(kube: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(7):
        await kube.create(share(f"s{number}", parity=str(number % 2)))
    plain = await kube.list(ShareManager)

    from share_manager.kube import wire

    def paged(kind: type[ShareManager], namespace: str, labels: str = "", page: str = "") -> wire.Request:
        return original(kind, namespace, labels, page, 2)

    original = wire.list_all
    monkeypatch.setattr(wire, "list_all", paged)
    assert (await kube.list(ShareManager)).items == plain.items
    assert [one.name for one in (await kube.list(ShareManager, labels="parity=1")).items] == ["s1", "s3", "s5"]


async def test_a_watch_goes_on_where_the_list_ended(kube: Client) -> None:
    await kube.create(share("before"))
    listing = await kube.list(ShareManager)
    made = await kube.create(share("later"))
    await kube.delete(ShareManager, "before")
    async with kube.watch(ShareManager, listing.version) as changes:
        seen = [await anext(changes), await anext(changes)]
    assert [(one.type, one.object.name if one.object else "") for one in seen] == [
        ("ADDED", "later"),
        ("DELETED", "before"),
    ]
    # resumed from the first of them, it does not tell that again
    async with kube.watch(ShareManager, made.metadata.resource_version) as changes:
        assert (await anext(changes)).type == "DELETED"


async def test_a_watch_ends_when_the_server_ends_it(kube: Client) -> None:
    listing = await kube.list(ShareManager)
    with trio.fail_after(20):
        async with kube.watch(ShareManager, listing.version, seconds=1) as changes:
            assert [change async for change in changes if change.object is not None] == []


async def test_a_watch_is_cancelled_at_once(kube: Client) -> None:
    listing = await kube.list(ShareManager)
    began = trio.current_time()
    with trio.move_on_after(0.3):
        async with kube.watch(ShareManager, listing.version) as changes:
            await anext(changes)
    assert trio.current_time() - began < 2.0


async def test_what_the_server_has_forgotten_is_told(kube: Client, control_plane: ControlPlane) -> None:
    listing = await kube.list(ShareManager)
    for number in range(3):
        await kube.create(share(f"s{number}"))
    control_plane.compact()
    with control_plane.away():
        pass
    with pytest.raises(ExpiredError):
        async with kube.watch(ShareManager, listing.version) as changes:
            await anext(changes)
    assert len((await kube.list(ShareManager)).items) == 3


async def test_a_server_that_is_killed_ends_watches_and_calls(kube: Client, control_plane: ControlPlane) -> None:
    listing = await kube.list(ShareManager)
    async with kube.watch(ShareManager, listing.version) as changes:
        with control_plane.away():
            with trio.fail_after(5), pytest.raises(ApiAwayError):
                await anext(changes)
            with pytest.raises(ApiAwayError):
                await kube.get(ShareManager, "one")
    await kube.create(share("one"))


async def test_a_server_that_hangs_is_given_up(control_plane: ControlPlane, kube_namespace: str) -> None:
    async with Client(control_plane.admin, namespace=kube_namespace, timeout=0.5) as kube:
        listing = await kube.list(ShareManager)
        with control_plane.paused():
            began = time.monotonic()
            with pytest.raises(ApiAwayError, match=r"no answer|Timeout"):
                await kube.get(ShareManager, "one")
            with pytest.raises(ApiAwayError):
                async with kube.watch(ShareManager, listing.version):
                    raise AssertionError("it answers")
            assert time.monotonic() - began < 5.0
        with pytest.raises(NotFoundError):
            await _soon(kube)


async def _soon(kube: Client) -> None:
    end = trio.current_time() + 20
    while True:
        try:
            await kube.get(ShareManager, "one")
        except ApiAwayError:
            assert trio.current_time() < end
            await trio.sleep(0.1)


@pytest.fixture
async def nobody(control_plane: ControlPlane, kube_namespace: str) -> AsyncIterator[Client]:
    """The namespace's default service account, which has no rights."""
    end = trio.current_time() + 30
    while True:
        try:
            token = control_plane.token_of(kube_namespace, "default")
            break
        except OSError:
            assert trio.current_time() < end
            await trio.sleep(0.1)
    async with Client(control_plane.access(token, kube_namespace)) as client:
        yield client


async def test_whoever_has_no_rights_is_told(nobody: Client, control_plane: ControlPlane) -> None:
    with pytest.raises(ForbiddenError, match="cannot list resource"):
        await nobody.list(Volume)
    async with Client(control_plane.access("not a token")) as stranger:
        with pytest.raises(ForbiddenError):
            await stranger.list(Node)


async def test_nobody_else_is_taken_for_the_api_server(control_plane: ControlPlane) -> None:
    # system certificates do not vouch for it
    async with Client(Access(server=control_plane.server, token="t")) as client:
        with pytest.raises(ApiAwayError, match="certificate"):
            await client.list(Node)


async def test_objects_of_kubernetes_itself(kube: Client, control_plane: ControlPlane) -> None:
    body = {"metadata": {"name": "s"}, "immutable": True, "stringData": {"k": "v"}}
    secret = await kube.create_json(Secret, body)
    assert secret.data == {"k": "dg=="}
    assert secret.immutable
    assert (await kube.list(Pod, namespace="")).items == ()
    assert b"gitVersion" in await kube.ask("/version")


async def test_a_finalizer_keeps_an_object_until_it_is_gone(kube: Client) -> None:
    meta = ObjectMeta(name="v", finalizers=("share-manager.io/ordered",))
    await kube.create(Volume(metadata=meta, spec=VolumeSpec(size=1 << 30)))
    await kube.delete(Volume, "v")
    assert (await kube.get(Volume, "v")).deleting
    await kube.patch(Volume, "v", {"metadata": {"finalizers": None}})
    assert await kube.find(Volume, "v") is None
