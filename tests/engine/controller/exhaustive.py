"""Every sequence of events of a small volume, from every interrupted step.

The world of `simulation`, without luck: all that may happen next is tried, in every order, as far as a budget of client
requests and of faults goes. A fault is a connection that breaks, a replica that is restarted or loses what it had not
flushed, an engine that dies (also between the swap of the record and the answer) with any of the replicas losing power,
attached anew with any of them reachable, or an engine that is replaced while it lives. States that differ in nothing
that matters are tried once, so sequences are counted, not walked one by one.
"""

from __future__ import annotations

import contextlib
import copyreg
import hashlib
import io
import pickle
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import chain, combinations
from random import Random
from typing import Any, NamedTuple, cast

from engine import ops
from engine.controller import core as decide
from engine.controller.actions import ReplicaState
from engine.controller.core import Core
from tests.engine.controller.simulation import Ask, Engine, Judge, SimReplica, Whim, World

Event = tuple[Any, ...]


class Budget(NamedTuple):
    """How often what is left to happen. `returns`: replicas brought back."""

    writes: int = 1
    flushes: int = 1
    reads: int = 1
    settles: int = 1
    returns: int = 1
    faults: int = 2

    def without(self, what: str) -> Budget:
        return self._replace(**{what: getattr(self, what) - 1})


class Straight:
    """Stands for `Random`: frames arrive in their order, and a power loss takes everything that was not flushed."""

    def random(self) -> float:
        return 0.0

    def randrange(self, _: int) -> int:
        return 0

    def choice(self, options: Sequence[Any]) -> Any:
        return options[0]


class Report:
    def __init__(self) -> None:
        self.states = 0
        self.transitions = 0
        self.sequences = 0
        self.rests = 0
        self.longest = 0

    def __str__(self) -> str:
        return (
            f"{self.sequences} sequences of up to {self.longest} events, {self.states} states, "
            f"{self.transitions} transitions, {self.rests} times brought to rest"
        )


class BrokenPromiseError(AssertionError):
    def __init__(self, events: Sequence[Event], reason: str) -> None:
        super().__init__(events, reason)
        self.events = events
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.reason}\nafter {' '.join('-'.join(map(str, event)) for event in self.events)}"


def current(world: World) -> Engine | None:
    """The engine that was attached last, if it lives."""
    return world.engines[-1] if world.engines and not world.engines[-1].dead else None


def subsets(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    return chain.from_iterable(combinations(names, count) for count in range(len(names) + 1))


def possible(world: World, budget: Budget) -> Iterator[tuple[Event, Budget]]:
    """What may happen next, and what is left of the budget then."""
    for number, each in enumerate(world.engines):
        if each.dead:
            continue
        for name, link in each.links.items():
            if not world.usable(each, name):
                yield ("notice", number, name), budget
                continue
            if link.frames:
                yield ("frame", number, name), budget
            if link.answers:
                yield ("answer", number, name), budget
        if each.record_wanted is not None:
            yield ("record", number), budget
        for name in each.maps_due:
            yield ("maps", number, name), budget
    engine = current(world)
    names = list(world.replicas)
    if engine is None:
        yield ("attach", (), ()), budget
        return
    if engine.ready:
        for what in ("write", "flush", "read"):
            if getattr(budget, f"{what}s" if what != "flush" else "flushes"):
                yield (what,), budget.without(f"{what}s" if what != "flush" else "flushes")
        if budget.settles and engine.core.settled > engine.core._settled_sent:
            yield ("tick",), budget.without("settles")
    for name in names:
        if budget.returns and engine.core.state(name) is ReplicaState.OUT:
            yield ("back", name), budget.without("returns")
    if not budget.faults:
        return
    left = budget.without("faults")
    for name in names:
        if name in engine.links:
            yield ("break", name), left
        yield ("restart", name), left
        yield ("power", name), left
    for lost in subsets(names):
        yield ("attach", lost, ()), left
        if engine.record_wanted is not None:
            yield ("recorded-attach", lost, ()), left
    for away in subsets(world.record.in_sync):
        if len(away) < len(world.record.in_sync):
            yield ("replace", away), left
            if away:
                yield ("attach", (), away), left


def happen(world: World, event: Event) -> None:
    kind, *details = event
    if kind in ("frame", "answer", "notice", "record", "maps"):
        engine = world.engines[details[0]]
        if kind == "frame":
            world.deliver_frame(engine, details[1])
        elif kind == "answer":
            world.deliver_answer(engine, details[1])
        elif kind == "notice":
            engine.lose(details[1], "connection broke")
        elif kind == "maps":
            engine.gather_maps(details[1], world.rng)
        else:
            engine.write_record()
    elif kind == "replace":
        world.judge.crashed()
        attach(world, details[0])
    elif kind in ("attach", "recorded-attach"):
        engine = world.engines[-1]
        if kind == "recorded-attach":
            engine.drain = lambda: None  # type: ignore[method-assign]
            engine.write_record()
        for name in details[0]:
            restart(world, name, power=True)
        # whoever is still there of the engines before dies with it
        world.engines.clear()
        world.judge.crashed()
        attach(world, details[1])
    elif kind in ("restart", "power"):
        restart(world, details[0], power=kind == "power")
    else:
        engine = world.engines[-1]
        if kind == "write":
            engine.submit(ops.WRITE, 0, 1)
        elif kind == "read":
            engine.submit(ops.READ, 0, 1)
        elif kind == "flush":
            engine.submit(ops.FLUSH)
        elif kind == "tick":
            engine.tick()
        elif kind == "back":
            engine.bring_back(details[0])
        elif kind == "break":
            engine.lose(details[0], "connection broke")
    for engine in world.engines:
        _ = engine.ready
    world.check_standing()


def restart(world: World, name: str, power: bool) -> None:
    world.crash_replica(name, power)
    world.replicas[name].up = True


def attach(world: World, away: Sequence[str]) -> None:
    for name in away:
        world.replicas[name].hung = True
    world.attach()
    for name in away:
        world.replicas[name].hung = False


_COSMETIC = {
    World: {"rng", "crashes", "found", "highest_attached", "size", "region"},
    Engine: {"world", "asks"},
    Judge: {"reads", "acknowledged"},
    SimReplica: {"seen", "name", "region"},
    Core: {"_reasons", "clock", "_next_ping", "outbox", "replies", "actions", "names", "size", "region_size"},
}


# what the core is made of; compiled classes tell nobody how to save them
_BLANKS: dict[type, Callable[[], Any]] = {
    Core: lambda: Core(size=1, replicas=("r1",), in_sync=("r1",)),
    Whim: lambda: Whim(cast(Random, Straight()), 0.0),
    decide.Request: lambda: decide.Request(ops.READ, 0, 1),
    decide.Repair: lambda: decide.Repair(0, None, None, by_checksum=False),
    decide.Resync: decide.Resync,
    decide._Piece: lambda: decide._Piece(decide.Request(ops.READ, 0, 1)),
    decide._Ahead: decide._Ahead,
    decide._SettleInherited: decide._SettleInherited,
    decide._SwapIn: lambda: decide._SwapIn(0),
}


def _attributes(blank: Any) -> tuple[str, ...]:
    """Of an object that was just made; without its properties, which cannot be set."""
    found = []
    for name in (name for name in dir(blank) if not name.startswith("__") and hasattr(blank, name)):
        value = getattr(blank, name)
        if not callable(value):
            with contextlib.suppress(AttributeError):
                setattr(blank, name, value)
                found.append(name)
    return tuple(found)


_ATTRIBUTES = {kind: _attributes(make()) for kind, make in _BLANKS.items()}


def _blank(kind: type) -> Any:
    return _BLANKS[kind]()


def _fill(value: Any, fields: dict[str, Any]) -> None:
    for name, item in fields.items():
        setattr(value, name, item)


def _whole(value: Any) -> tuple[Any, ...]:
    fields = {name: getattr(value, name) for name in _ATTRIBUTES[type(value)]}
    return _blank, (type(value),), fields, None, None, _fill


class _Saver(pickle.Pickler):
    dispatch_table = {**copyreg.dispatch_table, **dict.fromkeys(_BLANKS, _whole)}  # noqa: RUF012 - where pickle looks for it


def save(world: World) -> bytes:
    """For `pickle.loads`."""
    out = io.BytesIO()
    _Saver(out, -1).dump(world)
    return out.getvalue()


def _bare(value: Any) -> tuple[Any, ...]:
    kind = type(value)
    skip = _COSMETIC.get(kind, set())
    names = _ATTRIBUTES.get(kind, getattr(value, "__dict__", {}))
    fields = {name: getattr(value, name) for name in names if name not in skip}
    if isinstance(value, Engine):
        # fingerprints know contents and not identities
        fields["fresh"] = [
            (value.world.usable(value, name), name in value.maps_due and value.maps_due[name][0] is link)
            for name, link in value.links.items()
        ]
    return (kind, (), fields)


class _Fingerprint(pickle.Pickler):
    dispatch_table = {**copyreg.dispatch_table, **dict.fromkeys((*_BLANKS, *_COSMETIC), _bare)}  # noqa: RUF012 - where pickle looks for it


def freeze(world: World) -> bytes:
    """What a world is, apart from what no later event depends on."""
    out = io.BytesIO()
    pickler = _Fingerprint(out, -1)
    pickler.fast = True
    pickler.dump(world)
    return hashlib.blake2b(out.getvalue(), digest_size=12).digest()


def settled(world: World, budget: Budget) -> bool:
    """Whether nothing is left that a client asks for or could be told, nor a fault: the order of the rest is free."""
    engine = current(world)
    return (
        engine is not None
        and engine.attached
        and not any(budget)
        and not any(isinstance(request.token, Ask) for request in engine.core.inflight.values())
        and not engine.core.waiting
        and not any(each.links for each in world.engines[:-1] if not each.dead)
    )


def start(replicas: int, in_sync: Sequence[str], before: Sequence[Event] = (), *, ahead: bool = False) -> World:
    """A volume of one block, attached; whoever is not in sync is out, with a map of its absence at the others.

    `before` has happened then. With `ahead` every write has a flush sent with it.
    """
    world = World(cast(Random, Straight()), replicas, size=1, region=1)
    world.ahead = float(ahead)
    world.record.in_sync = tuple(in_sync)
    for name in in_sync:
        world.replicas[name].track(tuple(other for other in world.replicas if other not in in_sync))
    attach(world, ())
    _ = world.engines[-1].ready
    for event in before:
        happen(world, event)
    return world


# a replica that was away has been given all it missed but the last region, and a client has written meanwhile
COMING_BACK: tuple[Event, ...] = (
    ("frame", 0, "r1"),
    ("answer", 0, "r1"),
    ("back", "r2"),
    ("maps", 0, "r2"),
    ("write",),
    ("frame", 0, "r1"),
    ("answer", 0, "r1"),
    ("frame", 0, "r2"),
    ("answer", 0, "r2"),
    ("maps", 0, "r2"),
)
# the engine died when a write had reached the first replica only; a client reads that block, so it is being made equal
AFTER_A_CRASH: tuple[Event, ...] = (
    ("write",),
    ("frame", 0, "r1"),
    ("attach", (), ()),
    ("read",),
    ("frame", 0, "r1"),
)


def explore(
    world: World, budget: Budget, *, longest: int | None = None, say: Callable[[Report], None] = lambda report: None
) -> Report:
    """Everything that can come of `world` within the budget, in at most `longest` events.

    Raises BrokenPromiseError with a shortest way there. `say` is told after every further event.
    """
    report = Report()
    # state -> how it was reached
    first: dict[Hashable, tuple[Hashable, Event] | None] = {}
    ways: dict[Hashable, int] = {}
    key: Hashable = (freeze(world), budget)
    first[key], ways[key] = None, 1
    level = {key: (save(world), budget)}

    def way(state: Hashable, last: Event) -> list[Event]:
        events = [last]
        while (before := first[state]) is not None:
            state, event = before
            events.append(event)
        return events[::-1]

    while level and report.longest != longest:
        following: dict[Hashable, tuple[bytes, Budget]] = {}
        for state, (blob, budget) in level.items():
            report.states += 1
            for event, left in list(possible(pickle.loads(blob), budget)):
                after: World = pickle.loads(blob)
                try:
                    happen(after, event)
                    reached: Hashable = (freeze(after), left)
                    report.transitions += 1
                    report.sequences += ways[state]
                    if reached not in first:
                        first[reached], ways[reached] = (state, event), 0
                        over = settled(after, left)
                        if not over:
                            following[reached] = (save(after), left)
                        if over or "attach" in event[0] or event[0] == "replace":
                            report.rests += 1
                            after.finish(current(after))
                    if reached in following:
                        ways[reached] += ways[state]
                except AssertionError as error:
                    raise BrokenPromiseError(way(state, event), str(error)) from error
        level = following
        report.longest += 1
        say(report)
    return report
