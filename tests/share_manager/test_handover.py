"""Who serves, decided by several processes over one lease: single decisions, and all sequences with interruptions."""

from __future__ import annotations

import copy
import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec
import pytest

from engine.records import ORPHANED, Lease
from share_manager.share.handover import HOLDING, Handover, Role, Step, Timing

TIMING = Timing()


class Server:
    """The lease on a record server; `boot` is another one after a restart."""

    def __init__(self) -> None:
        self.lease = Lease()
        self.changes = 0
        self.boot = 0

    @property
    def version(self) -> str:
        return f"{self.boot}:{self.changes}"

    def swap(self, expected: str, lease: Lease) -> bool:
        if expected != self.version:
            return False
        self.lease = lease
        self.changes += 1
        return True


@dataclass
class Process:
    """A share manager. `runs`: the epoch that its share was attached with, None while none runs here."""

    handover: Handover
    runs: int | None = None
    serves: bool = False
    alive: bool = True
    ids: int = 0


@dataclass
class World:
    """Two nodes or more, what may still happen to them, and the highest epoch that the replicas have seen."""

    nodes: dict[str, Process]
    server: Server
    now: float = 0.0
    epoch: int = 0
    starts: int = 0
    faults: int = 0
    history: list[str] = field(default_factory=list)

    def start(self, node: str, *, stay: bool = True) -> None:
        self.starts += 1
        numbers = itertools.count()
        self.nodes[node] = Process(
            Handover(
                node,
                f"{node}{self.starts}",
                stay=stay,
                timing=TIMING,
                new_id=lambda: f"{node}{next(copy.copy(numbers))}",
            )
        )


def turn(world: World, node: str, *, answer: bool = True, arrives: bool = True) -> None:
    """A process does its next step with the record server; it may not arrive there, or its answer may be lost."""
    process = world.nodes[node]
    handover = process.handover
    step = handover.step(world.now)
    obey(world, node)
    if not arrives:
        handover.missed(world.now)
        return
    done = False
    if step.swap is not None:
        done = world.server.swap(handover.version, step.swap)
    if not answer:
        handover.missed(world.now)
        return
    handover.seen(world.server.lease, world.server.version, world.now, swapped=done)
    obey(world, node)


def obey(world: World, node: str) -> None:
    """What the driver does at once when a role changes."""
    process = world.nodes[node]
    if process.handover.role is Role.TAKING and process.runs is None:
        begin(world, node)


def begin(world: World, node: str) -> None:
    """It claims its epoch: from here on no other can write."""
    process = world.nodes[node]
    lease = world.server.lease
    if lease.phase == "taking" and (lease.holder, lease.instance) == (node, process.handover.instance):
        failover = process.handover.failover
        if failover is not None and failover.cause in ("move", "released") and failover.before != node:
            # who released has left before
            assert world.nodes[failover.before].runs is None, world.history
    world.epoch += 1
    process.runs = world.epoch


def ready(world: World, node: str) -> None:
    process = world.nodes[node]
    process.serves = True
    assert process.runs is not None
    process.handover.ready(process.runs, world.now)


def end(world: World, node: str, *, failed: bool) -> None:
    process = world.nodes[node]
    fenced = process.runs is not None and process.runs < world.epoch
    process.runs, process.serves = None, False
    process.handover.ended(world.now, failed=failed or fenced, fenced=fenced)


def release(world: World, instance: str) -> None:
    """What the engine of a dead process does in the end."""
    lease = world.server.lease
    if lease.instance == instance and lease.phase != "released":
        world.server.lease = msgspec.structs.replace(lease.renewed(), phase="released", cause=ORPHANED)
        world.server.changes += 1


def able(world: World) -> Iterator[str]:
    """Nodes whose process lives and has something to do."""
    for name, process in world.nodes.items():
        if process.alive and process.handover.role is not Role.ENDED:
            yield name


def settle(world: World) -> None:
    """No more faults: whoever ended is started again, as an init system does, and time goes on."""
    for _ in range(200):
        for name, process in list(world.nodes.items()):
            if not process.alive or process.handover.role is Role.ENDED:
                world.start(name)
        for name in list(able(world)):
            process = world.nodes[name]
            turn(world, name)
            role = process.handover.role
            if process.runs is not None and (role is Role.LEAVING or process.runs < world.epoch):
                end(world, name, failed=False)
            elif role is Role.TAKING and process.runs is not None:
                ready(world, name)
        world.now += 0.25
        if at_rest(world):
            return
    raise AssertionError((world.history, world.server.lease, {n: p.handover.role for n, p in world.nodes.items()}))


def at_rest(world: World) -> bool:
    serving = [name for name, process in world.nodes.items() if process.serves and process.runs == world.epoch]
    others = [process.handover.role for name, process in world.nodes.items() if name not in serving]
    lease = world.server.lease
    return (
        len(serving) == 1
        and lease.holder == serving[0]
        and lease.phase == "serving"
        and not lease.wanted
        and all(role is Role.STANDBY for role in others)
    )


FAULT = 1


def successors(world: World) -> Iterator[World]:
    """Everything that may happen next."""

    def after(what: str) -> World:
        following = copy.deepcopy(world)
        following.history.append(what)
        return following

    for name in able(world):
        process = world.nodes[name]
        following = after(f"turn {name}")
        turn(following, name)
        yield following
        if process.runs is not None and process.handover.role is Role.TAKING:
            following = after(f"ready {name}")
            ready(following, name)
            yield following
        if process.runs is not None and process.handover.role is Role.LEAVING:
            following = after(f"left {name}")
            end(following, name, failed=False)
            yield following
        if world.faults <= 0:
            continue
        for what, how in (("lost", {"answer": False}), ("cut", {"arrives": False})):
            following = after(f"turn {name}, {what}")
            following.faults -= FAULT
            turn(following, name, **how)
            yield following
        if process.runs is not None:
            following = after(f"failed {name}")
            following.faults -= FAULT
            end(following, name, failed=True)
            yield following
        following = after(f"killed {name}")
        following.faults -= FAULT
        following.start(name)
        yield following
        if process.runs is not None:
            following = after(f"killed {name}, its engine releases the lease")
            following.faults -= FAULT
            following.start(name)
            release(following, process.handover.instance)
            yield following
        if not world.server.lease.wanted and world.server.lease.holder not in ("", name):
            following = after(f"move to {name}")
            following.faults -= FAULT
            following.server.lease = msgspec.structs.replace(
                following.server.lease.renewed(), wanted=name, failover="move"
            )
            following.server.changes += 1
            yield following
    if world.faults > 0:
        following = after("server restarts")
        following.faults -= FAULT
        following.server.boot += 1
        yield following
    for seconds in (0.5, 3.0):
        following = after(f"{seconds} s pass")
        following.now += seconds
        yield following


def key(world: World) -> tuple[object, ...]:
    """States that differ in nothing that matters are tried once: times count as far as a decision looks at them."""

    def ago(at: float | None) -> float | None:
        return None if at is None else min(round(world.now - at, 2), 9.0)

    lease = world.server.lease
    parts: list[object] = [(lease.holder, lease.instance[-1:], lease.phase, lease.wanted), world.faults]
    for name, process in sorted(world.nodes.items()):
        h = process.handover
        parts.append(
            (
                name,
                h.role,
                h.version == world.server.version,
                h._mine(world.server.lease),
                h._mine(h.lease),
                (h.lease.holder, h.lease.phase, h.lease.wanted),
                h.deposed,
                h.failover is not None,
                ago(h._changed_at),
                ago(h._answered_at),
                ago(h._renewed_at),
                max(round(h._not_before - world.now, 2), 0.0),
                process.runs is not None,
                process.runs == world.epoch,
                process.serves,
            )
        )
    return tuple(parts)


def explore(first: World, events: int) -> int:
    seen = {key(first)}
    waiting = deque([(first, 0)])
    tried = 0
    while waiting:
        world, depth = waiting.popleft()
        tried += 1
        settle(copy.deepcopy(world))
        if depth == events:
            continue
        for following in successors(world):
            found = key(following)
            if found not in seen:
                seen.add(found)
                waiting.append((following, depth + 1))
    return tried


def served(names: str = "ab") -> World:
    """`a` serves, the others stand by."""
    world = World({}, Server())
    for name in names:
        world.start(name)
    turn(world, "a")
    turn(world, "a")
    ready(world, "a")
    settle(world)
    world.history.clear()
    assert world.nodes["a"].serves
    return world


@pytest.mark.parametrize(("faults", "events"), [(1, 6), (2, 5)])
def test_whatever_happens_one_node_serves_in_the_end_and_none_leaves_the_lease_too_early(
    faults: int, events: int
) -> None:
    world = served()
    world.faults = faults
    assert explore(world, events) > 100


def test_a_move_goes_to_the_node_that_is_wanted() -> None:
    world = served()
    world.server.lease = msgspec.structs.replace(world.server.lease.renewed(), wanted="b", failover="f1")
    world.server.changes += 1
    settle(world)
    assert world.nodes["b"].serves
    done = world.nodes["b"].handover.failover
    assert done is not None
    assert (done.id, done.cause, done.before, done.after) == ("f1", "move", "a", "b")
    assert not done.silent
    assert done.duration is not None
    assert done.duration < 2


def test_who_is_wanted_and_does_not_come_is_not_waited_for_long() -> None:
    world = served()
    world.server.lease = msgspec.structs.replace(world.server.lease.renewed(), wanted="nobody")
    world.server.changes += 1
    settle(world)
    assert world.nodes["a"].serves
    assert world.now < 10


def test_a_holder_that_renews_keeps_the_volume_however_long() -> None:
    world = served()
    epoch = world.epoch
    for _ in range(400):
        for name in "ab":
            turn(world, name)
        world.now += 0.25
    assert world.epoch == epoch


def test_a_record_server_that_was_away_makes_nobody_late() -> None:
    world = served()
    epoch = world.epoch
    for _ in range(2400):  # ten minutes
        for name in "ab":
            turn(world, name, arrives=False)
        world.now += 0.25
    # the standby is back first, and again much later than the holder's lease lasts
    world.server.boot += 1
    for _ in range(4):
        turn(world, "b")
        world.now += 0.25
    for _ in range(40):
        for name in "ba":
            turn(world, name)
        world.now += 0.25
    assert (world.epoch, world.nodes["a"].serves) == (epoch, True)


def test_a_silent_holder_is_replaced_in_time() -> None:
    world = served()
    world.nodes["a"].alive = False
    began = world.now
    b = world.nodes["b"].handover
    turn(world, "b")
    while b.role is not Role.TAKING:
        # it is there when the time is up, however seldom it looks before
        world.now += max(0.01, b.step(world.now).watch)
        turn(world, "b")
        assert world.now - began < TIMING.duration + 0.1
    assert b.failover is not None
    assert b.failover.silent


def test_a_holder_that_died_is_replaced_at_once_when_its_engine_says_so() -> None:
    world = served()
    world.nodes["a"].alive, world.nodes["a"].runs = False, None
    release(world, world.nodes["a"].handover.instance)
    # a later word is for nobody
    release(world, "of another life")
    for _ in range(2):
        turn(world, "b")
    handover = world.nodes["b"].handover
    assert handover.role is Role.TAKING
    assert handover.failover is not None
    assert handover.failover.cause == "the share manager of a died"


def test_a_holder_that_only_the_record_server_has_lost_keeps_the_volume() -> None:
    world = served()
    b, instance = world.nodes["b"].handover, world.nodes["a"].handover.instance
    for _ in range(100):
        b.heard(instance, world.now)
        turn(world, "b")
        assert b.role is Role.STANDBY
        world.now += 0.25
    b.heard("of another life", world.now)
    while b.role is Role.STANDBY:
        turn(world, "b")
        world.now += 0.05
    assert b.failover is not None
    assert b.failover.cause == "a was silent"


def test_one_that_wakes_up_and_finds_the_lease_gone_leaves_for_good() -> None:
    world = served()
    settle(world)
    for _ in range(20):
        turn(world, "b")
        world.now += 0.25
    ready(world, "b")
    turn(world, "a")
    handover = world.nodes["a"].handover
    assert handover.role is Role.LEAVING
    end(world, "a", failed=False)
    assert (handover.role, handover.deposed) == (Role.ENDED, True)


def test_one_without_standby_ends_when_another_serves_and_takes_back_what_nobody_took() -> None:
    world = World({}, Server())
    world.start("a", stay=False)
    turn(world, "a")
    turn(world, "a")
    ready(world, "a")
    turn(world, "a")
    world.start("b", stay=False)
    for _ in range(6):
        for name in "ba":
            turn(world, name)
        world.now += 0.25
    assert (world.nodes["b"].handover.role, world.nodes["b"].handover.elsewhere) == (Role.ENDED, True)
    world.server.lease = msgspec.structs.replace(world.server.lease.renewed(), wanted="c")
    world.server.changes += 1
    settled = world.nodes["a"].handover
    for _ in range(40):
        turn(world, "a")
        if settled.role is Role.LEAVING and world.nodes["a"].runs is not None:
            end(world, "a", failed=False)
        if settled.role is Role.TAKING:
            break
        world.now += 0.25
    assert settled.failover is not None
    assert settled.failover.cause == "c did not take over"


def test_a_holder_that_cannot_serve_leaves_if_others_stand_by() -> None:
    world = served()
    handover = world.nodes["a"].handover
    handover.unwell(world.now)
    world.now += TIMING.unwell
    roles = []
    for others in (False, True):
        handover.others = others
        handover.step(world.now)
        roles.append(handover.role)
    assert roles == [Role.SERVING, Role.LEAVING]


def test_stopping_releases_the_lease_for_whoever_stands_by() -> None:
    world = served()
    handover = world.nodes["a"].handover
    handover.stopped()
    world.nodes["a"].runs = None
    turn(world, "a")
    assert handover.role is Role.ENDED
    assert handover.role not in HOLDING
    assert (world.server.lease.phase, world.server.lease.wanted) == ("released", "")
    turn(world, "b")
    assert isinstance(world.nodes["b"].handover.step(world.now), Step)
    turn(world, "b")
    assert world.nodes["b"].handover.role is Role.TAKING
