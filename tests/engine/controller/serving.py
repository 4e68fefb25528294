"""A world in which share managers come and go, and the one promise: never two of them with an open port.

The decisions are the product's own (`Right`, `Confirmations`); clocks, messages, the record and the kernel's gate are
simulated. Whatever can happen next is an action by name, so a test may try all orders of a few or many at random. Time
is real time; every machine's clock has its own speed. A pause of a process is that none of its actions are taken.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from engine.controller.right import Right
from engine.replica.right import Confirmations

Action = tuple[object, ...]


@dataclass(frozen=True)
class Rules:
    """Seconds. `lasts` and `age` as in `RightOptions`; `permit` of the gate. The
    rest is as it should be unless a test wants to see what it is good for."""

    lasts: float = 3.0
    age: float = 3.5
    permit: float = 0.2
    joins_flush: bool = True
    restarts_forget: bool = False
    in_sync_only: bool = False
    lifeline: bool = True


@dataclass
class Replica:
    speed: float
    confirmations: Confirmations
    epoch: int = 0
    owner: int = 0
    closed: bool = True
    alive: bool = True


@dataclass
class Holder:
    epoch: int
    speed: float
    right: Right
    members: frozenset[int] = frozenset()
    connected: set[int] = field(default_factory=set)
    joining: set[int] = field(default_factory=set)
    ready: bool = False
    dead: bool = False
    given_up: set[int] = field(default_factory=set)
    # its share manager and its NFS server, which may die before its engine
    managed: bool = True
    answers: bool = True
    orphaned: bool = False
    # the share's half: what it calculated under a permit, and the kernel's gate, both in real time
    permit: tuple[float, float] | None = None
    gate: float = -math.inf
    served: bool = False


class TwoServeError(AssertionError):
    pass


class World:
    def __init__(self, replicas: int, speeds: list[float], rules: Rules, step: float = 0.5) -> None:
        self.rules = rules
        self.now = 100.0
        self.step = step
        self.speeds = speeds
        self.replicas = [
            Replica(speeds[i], Confirmations(self.now * speeds[i], 0, closed=True)) for i in range(replicas)
        ]
        self.holders: list[Holder] = []
        # the record: epoch and in-sync set
        self.record = (0, frozenset(range(replicas)))
        # under way: (to replica?, holder, replica, what, detail)
        self.messages: list[tuple[bool, int, int, str, float]] = []
        self.both_served = 0

    def clock(self, of: Replica | Holder) -> float:
        return self.now * of.speed

    def check(self) -> None:
        serving = [holder.epoch for holder in self.holders if holder.answers and self.now < holder.gate]
        if len(serving) > 1:
            raise TwoServeError(f"epochs {serving} serve at {self.now:.2f}")

    # what can happen

    def actions(self) -> list[Action]:
        found: list[Action] = [("time",)]
        # TCP keeps the order of each direction of a connection
        links = [message[:3] for message in self.messages]
        found += [("deliver", index) for index, link in enumerate(links) if link not in links[:index]]
        for number, holder in enumerate(self.holders):
            if holder.dead:
                continue
            found += self._of_holder(number, holder)
        if len(self.holders) < 3:
            found.append(("attach",))
        for number, replica in enumerate(self.replicas):
            found.append(("restart", number) if replica.alive else ("start", number))
        return found

    def _of_holder(self, number: int, holder: Holder) -> list[Action]:
        found: list[Action] = [("die", number)]
        if holder.managed:
            found.append(("kill", number))
        elif holder.answers:
            found.append(("server-dies", number))
        if not holder.managed and not holder.orphaned and not (holder.answers and self.rules.lifeline):
            found.append(("orphan", number))
        if holder.permit is not None:
            found.append(("apply", number))
        for index in range(len(self.replicas)):
            link = (number, index)
            if index in holder.connected:
                found.append(("lose", *link))
                if not any(message[1:4] == (*link, "confirm") for message in self.messages):
                    found.append(("ask", *link))
                if holder.ready and index not in holder.members and index not in holder.joining:
                    found.append(("join", *link))
                if index in holder.joining:
                    found.append(("record-join", *link))
            elif holder.ready:
                found.append(("open", *link))
                if index in holder.members and len(holder.members) > 1:
                    found.append(("record-drop", *link))
            elif index in holder.members and index not in holder.given_up:
                found += [("open", *link), ("give-up", *link)]
        if not holder.ready and holder.members <= holder.connected | holder.given_up and holder.connected:
            found.append(("ready", number))
        if holder.ready and self._may_serve(holder):
            found.append(("permit", number))
        if holder.served and self.now >= holder.gate:
            found.append(("leave", number))
        return found

    def _may_serve(self, holder: Holder) -> bool:
        clock, older = self.clock(holder), holder.right.older_at
        return holder.managed and clock < holder.right.until and (older is None or clock >= older + self.rules.age)

    # what happens then

    def do(self, action: Action) -> None:
        kind, *rest = action
        getattr(self, "_" + str(kind).replace("-", "_"))(*rest)
        self.check()

    def _time(self) -> None:
        self.now = round(self.now + self.step, 6)

    def _attach(self) -> None:
        epoch, members = self.record
        self.record = (epoch + 1, members)
        speed = self.speeds[len(self.replicas) + len(self.holders)]
        self.holders.append(Holder(epoch + 1, speed, Right(self.rules.lasts, 2.0), members))

    def _die(self, number: int) -> None:
        # its gate is the kernel's
        self.holders[number].dead = True

    def _kill(self, number: int) -> None:
        """The share manager alone: nobody opens the gate any more, and its server is to die with it, soon."""
        holder = self.holders[number]
        holder.managed, holder.permit = False, None

    def _server_dies(self, number: int) -> None:
        self.holders[number].answers = False

    def _orphan(self, number: int) -> None:
        """The engine finds that nobody is left who could answer, and leaves in order."""
        holder = self.holders[number]
        holder.orphaned = True
        for index in holder.connected:
            self._send(number, index, "close")

    def _restart(self, number: int) -> None:
        replica = self.replicas[number]
        replica.alive, replica.owner = False, 0
        for index in range(len(self.holders)):
            self._lose(index, number)

    def _start(self, number: int) -> None:
        replica = self.replicas[number]
        replica.alive = True
        closed = replica.closed or self.rules.restarts_forget
        replica.confirmations = Confirmations(self.clock(replica), replica.epoch, closed=closed)

    def _send(self, number: int, index: int, what: str, asked: float = 0.0) -> None:
        message = (True, number, index, what, asked)
        if message not in self.messages:
            self.messages.append(message)

    def _open(self, number: int, index: int) -> None:
        self._send(number, index, "open")

    def _ask(self, number: int, index: int) -> None:
        self._send(number, index, "confirm", self.clock(self.holders[number]))

    def _join(self, number: int, index: int) -> None:
        if self.rules.joins_flush:
            self._send(number, index, "flush")
        else:
            self.holders[number].joining.add(index)

    def _give_up(self, number: int, index: int) -> None:
        self.holders[number].given_up.add(index)

    def _lose(self, number: int, index: int) -> None:
        holder = self.holders[number]
        holder.connected.discard(index)
        holder.joining.discard(index)
        self.messages = [message for message in self.messages if message[1:3] != (number, index)]

    def _ready(self, number: int) -> None:
        holder = self.holders[number]
        if self.record[0] != holder.epoch:
            holder.dead = True
            return
        holder.members = frozenset(holder.connected & holder.members)
        self.record = (holder.epoch, holder.members)
        holder.ready = True

    def _record_drop(self, number: int, index: int) -> None:
        self._swap(number, self.holders[number].members - {index})

    def _record_join(self, number: int, index: int) -> None:
        self._swap(number, self.holders[number].members | {index})
        self.holders[number].joining.discard(index)

    def _swap(self, number: int, members: frozenset[int]) -> None:
        holder = self.holders[number]
        if self.record[0] != holder.epoch:
            holder.dead = True
            return
        self.record = (holder.epoch, members)
        holder.members = members

    def _permit(self, number: int) -> None:
        holder = self.holders[number]
        left = (holder.right.until - self.clock(holder)) / holder.speed
        holder.permit = (self.now + self.rules.permit, left)

    def _apply(self, number: int) -> None:
        holder = self.holders[number]
        assert holder.permit is not None
        ends, left = holder.permit
        holder.permit = None
        if self.now <= ends:
            holder.gate = self.now + left
            holder.served = True
            self.both_served += len([other for other in self.holders if other.served]) > 1

    def _leave(self, number: int) -> None:
        """In order: the port is shut, then the replicas are closed."""
        holder = self.holders[number]
        for index in holder.connected:
            replica = self.replicas[index]
            if replica.owner == holder.epoch:
                replica.owner, replica.closed = 0, True
                replica.confirmations.closed()
        holder.dead = True

    def _deliver(self, position: int) -> None:
        to_replica, number, index, what, asked = self.messages.pop(position)
        holder, replica = self.holders[number], self.replicas[index]
        if to_replica:
            if not replica.alive:
                return
            self.messages.append((False, number, index, *self._at_replica(holder, replica, what, asked)))
            return
        if holder.dead:
            return
        if what == "stale":
            holder.dead = True
        elif what.startswith("opened"):
            if index not in holder.given_up:
                if not holder.ready and what == "opened-older":
                    holder.right.heard(asked, self.clock(holder))
                holder.connected.add(index)
        elif what == "flush" and index in holder.connected:
            holder.joining.add(index)
        elif what == "confirm" and index in holder.connected:
            holder.right.confirmed(1 << index, asked)
            required = holder.members if self.rules.in_sync_only else holder.members | holder.connected
            holder.right.extend(sum(1 << member for member in required))

    def _at_replica(self, holder: Holder, replica: Replica, what: str, asked: float) -> tuple[str, float]:
        """Its answer."""
        clock = self.clock(replica)
        if what == "open":
            if holder.epoch < replica.epoch:
                return "stale", 0.0
            replica.epoch = replica.owner = holder.epoch
            replica.closed = False
            replica.confirmations.opened(holder.epoch, clock)
            age = replica.confirmations.age(clock)
            return ("opened", 0.0) if age is None else ("opened-older", age)
        if replica.owner != holder.epoch:
            return "stale", 0.0
        if what == "close":
            replica.owner, replica.closed = 0, True
            replica.confirmations.closed()
            return what, asked
        if what == "confirm" or self.rules.joins_flush:
            replica.confirmations.confirmed(clock)
        return what, asked
