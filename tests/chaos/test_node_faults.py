"""Which faults a campaign on nodes inflicts, and on whom."""

from __future__ import annotations

from itertools import islice
from typing import Any, cast

import pytest

from tests.chaos.node_faults import KINDS, Kind, schedule, target
from tests.lab.nodes import GuestNode, Node, SpaceNode


def node(kind: type[Node], name: str) -> Node:
    made = cast(Any, object.__new__(kind))
    made.name = name
    return cast(Node, made)


NODES = {name: node(GuestNode if name == "c" else SpaceNode, name) for name in "abc"}


def test_the_same_seed_gives_the_same_faults_and_each_kind_comes_once_before_any_twice() -> None:
    first = [fault for _, fault in islice(schedule("1", KINDS), 100)]
    assert first == [fault for _, fault in islice(schedule("1", KINDS), 100)]
    assert first != [fault for _, fault in islice(schedule("2", KINDS), 100)]
    assert {fault.kind for fault in first[: len(KINDS)]} == {kind.name for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_fault_hits_whom_it_is_for_and_what_it_can_be_done_to(kind: Kind) -> None:
    for holder in ("a", "b", "c", ""):
        for variant in (0.0, 0.4, 0.99):
            found = target(kind, NODES, holder, variant)
            if found is None:
                # there are three nodes: only a fault for the one that serves may find nobody
                assert kind.on == "holder"
                continue
            assert kind.on != "holder" or found.name == holder
            assert kind.on != "other" or found.name != holder
            assert ("power" in kind.name) <= (found.name == "c")
            if "kill the" in kind.name or "stop" in kind.name:
                assert found.name != "c"
