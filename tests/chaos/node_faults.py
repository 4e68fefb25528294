"""Faults on nodes that share a volume: which there are, in which order they come (pure, from a seed), how each is done
and undone. What a fault has killed is started again by `tests.chaos.nodes`, as an init system does."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

from tests.lab import leftovers
from tests.lab.nodes import GuestNode, Node, SpaceNode
from tests.lab.program import ProgramFailedError

SHARE, ENGINE, GANESHA, REPLICA = "share-manager share ", " -m engine ", "ganesha.nfsd ", " -m engine.replica "


class Stage(Protocol):
    """`nodes` by name."""

    @property
    def nodes(self) -> dict[str, Node]: ...

    def holder(self) -> str:
        """The node that the lease names; empty for none, or while the record server is away."""

    def cut_off(self, node: Node) -> None: ...

    def join(self, node: Node) -> None: ...

    def kill_records(self) -> None: ...

    def start_records(self) -> None: ...

    def move(self, to: str) -> None:
        """Raises ProgramFailedError."""


@dataclass(frozen=True)
class Fault:
    """One fault, for `seconds` where it has a length. `variant`, from 0 to 1, is its own."""

    kind: str
    seconds: float
    variant: float


Inject = Callable[[Stage, Node, Fault], bool]
"""Does it to a node and undoes it. False when what it was meant for was not there."""


@dataclass(frozen=True)
class Kind:
    """`weight`: how often, beside others. `on`: which node it is for. `seconds`: shortest and longest."""

    name: str
    inject: Inject
    weight: int
    on: str = "holder"
    seconds: tuple[float, float] = (0.0, 0.0)


def schedule(seed: str, kinds: Sequence[Kind]) -> Iterator[tuple[Kind, Fault]]:
    """Faults without end, the same for the same seed. Each kind comes once before any comes twice."""
    rng = Random(seed)
    first = rng.sample(list(kinds), len(kinds))
    while True:
        kind = first.pop() if first else rng.choices(kinds, [kind.weight for kind in kinds])[0]
        yield kind, Fault(kind.name, rng.uniform(*kind.seconds), rng.random())


def target(kind: Kind, nodes: dict[str, Node], holder: str, variant: float) -> Node | None:
    """The node that it is for: that of the holder, or one of the others, or any; only those that it can be done to."""
    able = {
        name: node
        for name, node in nodes.items()
        if isinstance(node, GuestNode if kind.inject is _power_cut else SpaceNode) or kind.inject in _ANYWHERE
    }
    if kind.on == "holder":
        return able.get(holder)
    if kind.on == "other":
        able.pop(holder, None)
    return list(able.values())[int(variant * len(able))] if able else None


def pids(node: Node, *parts: str) -> list[int]:
    """Of these parts of a namespace's node, found without asking them."""
    return [
        int(process.name)
        for process in leftovers.processes(node.place)
        if any(part in f"{process.detail} " for part in parts)
    ]


def _send(found: Sequence[int], number: signal.Signals) -> None:
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _kill(*parts: str) -> Inject:
    def inject(stage: Stage, node: Node, fault: Fault) -> bool:
        found = pids(node, *parts)
        _send(found, signal.SIGKILL)
        time.sleep(fault.seconds)
        return bool(found)

    return inject


def _stop(*parts: str) -> Inject:
    def inject(stage: Stage, node: Node, fault: Fault) -> bool:
        found = pids(node, *parts)
        try:
            _send(found, signal.SIGSTOP)
            time.sleep(fault.seconds)
        finally:
            _send(found, signal.SIGCONT)
        return bool(found)

    return inject


def _kill_everything(stage: Stage, node: Node, fault: Fault) -> bool:
    assert isinstance(node, SpaceNode)
    node.kill_all()
    time.sleep(fault.seconds)
    return True


def _kill_everywhere(stage: Stage, node: Node, fault: Fault) -> bool:
    """All processes of all nodes of this machine, and the power of the others."""
    for one in stage.nodes.values():
        if isinstance(one, GuestNode):
            one.power_cut()
        elif isinstance(one, SpaceNode):
            one.kill_all()
    time.sleep(fault.seconds)
    return True


def _power_cut(stage: Stage, node: Node, fault: Fault) -> bool:
    assert isinstance(node, GuestNode)
    node.power_cut()
    time.sleep(fault.seconds)
    return True


def _cut_off(stage: Stage, node: Node, fault: Fault) -> bool:
    try:
        stage.cut_off(node)
        time.sleep(fault.seconds)
    finally:
        stage.join(node)
    return True


def _cut_records(stage: Stage, node: Node, fault: Fault) -> bool:
    assert isinstance(node, SpaceNode)
    try:
        node.cut_records()
        time.sleep(fault.seconds)
    finally:
        node.join_records()
    return True


def _records_away(stage: Stage, node: Node, fault: Fault) -> bool:
    try:
        stage.kill_records()
        time.sleep(fault.seconds)
    finally:
        stage.start_records()
    return True


def _move(stage: Stage, node: Node, fault: Fault) -> bool:
    """It may be refused, for nobody stands by there, or not come to pass, for another fault is on."""
    try:
        stage.move(node.name)
    except ProgramFailedError:
        return False
    return True


_ANYWHERE = (_cut_off, _move, _records_away, _kill_everywhere)

KINDS = (
    Kind("kill the share manager that serves", _kill(SHARE), 6, seconds=(0.0, 2.0)),
    Kind("kill the engine that serves", _kill(ENGINE), 6),
    Kind("kill ganesha", _kill(GANESHA), 6),
    Kind("kill share manager and engine", _kill(SHARE, ENGINE), 4, seconds=(0.0, 2.0)),
    Kind("kill a standby", _kill(SHARE), 3, "other", (0.0, 2.0)),
    Kind("kill a replica", _kill(REPLICA), 6, "any"),
    Kind("kill everything on the node that serves", _kill_everything, 5, seconds=(0.5, 4.0)),
    Kind("kill everything on another node", _kill_everything, 3, "other", (0.5, 4.0)),
    Kind("kill everything on all nodes", _kill_everywhere, 1, "any", (0.0, 1.0)),
    Kind("stop the share manager that serves", _stop(SHARE), 3, seconds=(0.5, 8.0)),
    Kind("stop all of the share that serves", _stop(SHARE, ENGINE, GANESHA), 3, seconds=(0.5, 8.0)),
    Kind("stop a replica", _stop(REPLICA), 4, "any", (0.3, 12.0)),
    Kind("power cut of a node", _power_cut, 6, "any", (0.0, 2.0)),
    Kind("cut off the node that serves", _cut_off, 5, seconds=(0.5, 10.0)),
    Kind("cut off another node", _cut_off, 3, "other", (0.5, 10.0)),
    Kind("cut the node that serves off the record server", _cut_records, 3, seconds=(0.5, 8.0)),
    Kind("record server killed", _records_away, 3, "any", (0.5, 6.0)),
    Kind("planned move", _move, 6, "other"),
)
