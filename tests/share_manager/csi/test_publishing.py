"""Decisions about publications, pages and room, without I/O."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from share_manager.controllers.placement import DISK
from share_manager.csi.errors import AbortedError, AlreadyExistsError, FailedPreconditionError, InvalidArgumentError
from share_manager.csi.publishing import attach, changed_context, page, room
from share_manager.kube.meta import Condition, ObjectMeta
from share_manager.kube.resources import (
    Attachment,
    Disk,
    DiskStatus,
    ShareManager,
    ShareManagerSpec,
    StorageNode,
    StorageNodeSpec,
    StorageNodeStatus,
)

WRITES, READS = Attachment(nfs_options="hard"), Attachment(nfs_options="hard,ro", read_only=True)


def share(**attachments: Attachment) -> ShareManager:
    return ShareManager(metadata=ObjectMeta(name="v"), spec=ShareManagerSpec(attachments=attachments))


def attached(
    to: ShareManager, wanted: Attachment, *asked: str, single_node: bool = False, node: str = "a"
) -> Attachment | None:
    return attach(to, node, wanted, asked, single_node=single_node)


def test_a_node_is_added_once() -> None:
    assert attached(share(), WRITES) is None
    assert attached(share(b=WRITES), WRITES) is None
    assert attached(share(a=WRITES), WRITES, "hard") == WRITES
    assert attached(share(a=WRITES), WRITES, single_node=True) == WRITES


def test_a_volume_for_one_node_is_not_given_to_a_second() -> None:
    with pytest.raises(FailedPreconditionError, match="published on b, c"):
        attached(share(b=WRITES, c=READS), WRITES, single_node=True)
    assert attached(share(), WRITES, single_node=True) is None


def test_a_publication_that_is_different_is_told() -> None:
    with pytest.raises(AlreadyExistsError, match="only to read"):
        attached(share(a=WRITES), READS)
    with pytest.raises(AlreadyExistsError):
        attached(share(a=WRITES), Attachment(nfs_options="soft"), "soft")


def test_what_nobody_asked_for_may_have_changed_since() -> None:
    before = Attachment(nfs_options="vers=4.2,hard,timeo=600")
    assert attached(share(a=before), Attachment(nfs_options="vers=4.0,hard,timeo=900"), "hard") == before


LABELS = st.from_regex(r"[a-z][a-z0-9]{0,5}", fullmatch=True)


@given(st.sets(LABELS, max_size=30), st.integers(1, 8), st.sets(LABELS, max_size=5))
def test_pages_have_every_name_once_also_when_some_go(names: set[str], most: int, gone: set[str]) -> None:
    left = sorted(names)
    seen: list[str] = []
    token = ""
    while True:
        some, token = page(left, token, most)
        assert len(some) <= most
        seen += some
        if not token:
            break
        left = [name for name in left if name not in gone]
    assert len(seen) == len(set(seen))
    assert names - gone <= set(seen) <= names


def test_a_page_without_limit_has_all() -> None:
    assert page(["a", "b"], "", 0) == (["a", "b"], "")
    assert page([], "", 5) == ([], "")


@pytest.mark.parametrize("token", ["a", "invalid-token", "a.0", "a.000000000000", ".", "ü", "a.b.c"])
def test_tokens_that_were_never_given(token: str) -> None:
    with pytest.raises(AbortedError):
        page(["a", "b"], token, 1)


def test_a_negative_number_of_entries() -> None:
    with pytest.raises(InvalidArgumentError):
        page([], "", -1)


def node(name: str, available: int, *, ready: bool = True, schedulable: bool = True, reserved: int = 0) -> StorageNode:
    condition = Condition(type="Ready", status="True" if ready else "False")
    return StorageNode(
        metadata=ObjectMeta(name=name),
        spec=StorageNodeSpec(schedulable=schedulable, disks={DISK: Disk(path="/d", reserved=reserved)}),
        status=StorageNodeStatus(
            replica_address="192.0.2.1",
            disks={
                DISK: DiskStatus(total=1000, available=available),
                "bad": DiskStatus(available=999, problem="read-only"),
            },
            conditions=(condition,),
        ),
    )


def test_there_is_room_for_a_volume_whose_replicas_are_all_somewhere() -> None:
    nodes = [node("a", 100), node("b", 300), node("c", 200)]
    assert [room(nodes, replicas) for replicas in (0, 1, 2, 3, 4)] == [0, 300, 200, 100, 0]
    assert room([node("a", 100), node("b", 300, ready=False)], 1) == 100
    assert room([node("a", 100), node("b", 300, schedulable=False)], 1) == 100
    assert room([node("a", 100, reserved=40)], 1) == 60


def test_a_context_is_the_volumes_own_but_for_what_sidecars_add() -> None:
    assert changed_context({"nfsOptions": "soft"}, {"nfsOptions": "soft"}) == ""
    assert changed_context({"nfsOptions": "soft"}, {}) == ""
    assert changed_context({}, {"storage.kubernetes.io/csiProvisionerIdentity": "x"}) == ""
    assert changed_context({}, {"nfsOptions": "soft"}) == "nfsOptions"
