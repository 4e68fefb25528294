"""A volume in miniature: the real core, simulated replicas, record and client, and a model that judges them.

One byte stands for one block. Time is the order of events; whoever holds the `Random` chooses it. A replica's crash
loses an arbitrary part of what it had not flushed. The judge keeps, for every block, the values that a read may
return, and fails on the first one that it may not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from engine import ops
from engine.controller import core as decide
from engine.controller.core import Core, ReplicaState

SIZE = 24
REGION = 4
Token = tuple[int, int]


@dataclass
class Record:
    in_sync: tuple[str, ...]
    epoch: int = 0
    version: int = 1


class SimReplica:
    """Content, intent map and change maps as a replica server keeps them; maps are durable before data, always."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.durable = bytearray(SIZE)
        self.data = bytearray(SIZE)
        self.intent: set[int] = set()
        self.last_seq: dict[int, int] = {}
        self.inherited: set[int] = set()
        self.tracked: dict[str, set[int]] = {}
        # every value a block ever had here
        self.seen: list[set[int]] = [{0} for _ in range(SIZE)]
        self.token: Token = (0, 0)
        self.instance = 0
        self.up = True
        self.hung = False

    def open(self, token: Token) -> bool:
        if token < self.token:
            return False
        self.token = token
        # sequence numbers belong to one connection: what is set already is inherited from here on
        self.last_seq.clear()
        self.inherited = set(self.intent)
        return True

    def _touch(self, seq: int, offset: int, length: int) -> None:
        for region in range(offset // REGION, (offset + length - 1) // REGION + 1):
            self.intent.add(region)
            self.last_seq[region] = seq
            for changes in self.tracked.values():
                changes.add(region)

    def handle(self, op: int, seq: int, offset: int, length: int, payload: Any) -> bytes:
        if op == ops.READ:
            return bytes(self.data[offset : offset + length])
        if op == ops.WRITE:
            self._touch(seq, offset, length)
            self.data[offset : offset + length] = payload
            for i, value in enumerate(payload):
                self.seen[offset + i].add(value)
        elif op == ops.UNMAP:
            self._touch(seq, offset, length)
            self.data[offset : offset + length] = bytes(length)
        elif op == ops.FLUSH:
            self.durable[:] = self.data
        elif op == decide.SETTLED:
            if length:
                self.inherited.clear()
            for region in self.intent - self.inherited:
                # a write into an inherited region settles that write, not what the last life left there
                if self.last_seq.get(region, -1) < offset:
                    self.intent.discard(region)
                    self.last_seq.pop(region, None)
        elif op == decide.TRACK:
            self.track(payload)
        return b""

    def track(self, names: tuple[str, ...]) -> None:
        self.tracked = {name: self.tracked.get(name, set(self.intent)) for name in names}

    def crash(self, rng: Random, power: bool) -> None:
        """The process ends; with `power`, so does what the disk had not got, block by block as luck has it."""
        self.up = False
        self.hung = False
        self.instance += 1
        self.last_seq.clear()
        if power:
            for block in range(SIZE):
                if rng.random() < 0.5:
                    self.data[block] = self.durable[block]
            self.durable[:] = self.data


@dataclass
class Frame:
    op: int
    seq: int
    offset: int
    length: int
    payload: Any


@dataclass
class Link:
    """One connection: frames on their way there, answers on their way back."""

    instance: int
    frames: list[Frame] = field(default_factory=list)
    answers: list[tuple[int, int, bytes]] = field(default_factory=list)


@dataclass(eq=False)
class Cell:
    """What a block may hold from one write on until the next."""

    possible: set[int]
    acked: bool = False
    # once a read has said which of several values it is
    seen: Cell | None = None


@dataclass
class Ask:
    op: int
    offset: int
    length: int
    cells: list[Cell]
    upto: dict[int, Cell] = field(default_factory=dict)


class Judge:
    """The client's view, kept across engines."""

    def __init__(self) -> None:
        self.cells: list[list[Cell]] = [[Cell({0}, acked=True)] for _ in range(SIZE)]
        self.value = 0
        self.power_lost = False
        self.reads = 0
        self.acknowledged = 0

    def submit(self, op: int, offset: int, length: int) -> tuple[Ask, bytes]:
        if op in (ops.WRITE, ops.UNMAP):
            self.value = self.value % 255 + 1
            fill = self.value if op == ops.WRITE else 0
            cells = [Cell({fill}) for _ in range(length)]
            for i, cell in enumerate(cells):
                self.cells[offset + i].append(cell)
            return Ask(op, offset, length, cells), bytes([fill]) * length if op == ops.WRITE else b""
        if op == ops.READ:
            return Ask(op, offset, length, [self.cells[offset + i][-1] for i in range(length)]), b""
        upto = {
            block: next(cell for cell in reversed(history) if cell.acked) for block, history in enumerate(self.cells)
        }
        return Ask(op, 0, 0, [], upto), b""

    def answered(self, ask: Ask, error: int, data: bytes) -> None:
        assert not error, f"error {error} for {ask}"
        self.acknowledged += 1
        if ask.op == ops.READ:
            self.reads += 1
            for i, (asked, value) in enumerate(zip(ask.cells, data, strict=True)):
                cell = asked.seen or asked
                assert value in cell.possible, (
                    f"block {ask.offset + i} read as {value}, only {sorted(cell.possible)} are possible"
                )
                history = self.cells[ask.offset + i]
                if len(cell.possible) > 1 and cell in history:
                    # seen is not yet durable: a power loss may still bring back what was possible before
                    cell.seen = Cell({value}, acked=True)
                    history.insert(history.index(cell) + 1, cell.seen)
        elif ask.op == ops.FLUSH:
            for block, floor in ask.upto.items():
                history = self.cells[block]
                if floor in history:
                    del history[: history.index(floor)]
        else:
            for cell in ask.cells:
                cell.acked = True

    def crashed(self) -> None:
        """The engine is gone: unacknowledged writes may or may not have happened; so may unflushed ones after a
        power loss."""
        for block, history in enumerate(self.cells):
            # what is older than the last acknowledged write comes back only with a power loss, now or later
            first = 0 if self.power_lost else max(i for i, cell in enumerate(history) if cell.acked)
            possible = set().union(*(cell.possible for cell in history[first:]))
            self.cells[block] = [*history[:first], Cell(possible, acked=True)]
        self.power_lost = False


class Engine:
    """The core with the driver's duties done by hand, one event at a time."""

    def __init__(self, world: World, token: Token) -> None:
        self.world = world
        self.token = token
        self.links: dict[str, Link] = {}
        self.record_wanted: tuple[str, ...] | None = None
        self.asks: set[int] = set()
        self.dead = False
        self.fenced = False
        self.attached = False
        self.maps_due: dict[str, tuple[Link, dict[str, set[int]], set[int]]] = {}

    def attach(self) -> bool:
        record = self.world.record
        names = list(self.world.replicas)
        reached = []
        for name in record.in_sync:
            replica = self.world.replicas[name]
            if replica.up and not replica.hung and (self, name) not in self.world.cut:
                if not replica.open(self.token):
                    self.dead = self.fenced = True
                    return False
                reached.append(name)
        if not reached:
            self.dead = True
            return False
        self.core = Core(size=SIZE, replicas=names, in_sync=record.in_sync, region_size=REGION)
        dirty: set[int] = set()
        self.world.found = {name: [set(values) for values in self.world.replicas[name].seen] for name in reached}
        for name in reached:
            self.links[name] = Link(self.world.replicas[name].instance)
            dirty |= self.world.replicas[name].intent
        for name in record.in_sync:
            if name not in reached:
                self.core.lost(self.core.bit(name), "unreachable")
        self.core.begin(dirty)
        self.drain()
        return True

    @property
    def ready(self) -> bool:
        if not self.attached and not self.dead and not self.core.leaving:
            self.attached = True
            # from here on nobody with a lower token may acknowledge anything
            if self.token > self.world.highest_attached:
                self.world.highest_attached = self.token
        return self.attached and not self.dead and not self.core.stopped

    def submit(self, op: int, offset: int = 0, length: int = 0) -> None:
        ask, payload = self.world.judge.submit(op, offset, length)
        self.core.submit(op, offset, length, payload, ask)
        self.drain()

    def tick(self) -> None:
        self.core.tick(1.0)
        self.drain()

    def drain(self) -> None:
        core = self.core
        while core.outbox or core.replies or core.actions:
            sends, core.outbox = core.outbox, []
            for mask, op, seq, offset, length, payload in sends:
                for name in core.members(mask):
                    if name in self.links:
                        self.links[name].frames.append(Frame(op, seq, offset, length, payload))
            replies, core.replies = core.replies, []
            for ask, error, data in replies:
                if self.token < self.world.highest_attached:
                    self.world.check_late(ask)
                elif ask.op in (ops.WRITE, ops.UNMAP):
                    self.world.check_everywhere(self, ask)
                self.world.judge.answered(ask, error, data)
            actions, core.actions = core.actions, []
            for action in actions:
                match action:
                    case decide.WriteRecord(in_sync):
                        assert self.record_wanted is None
                        self.record_wanted = in_sync
                    case decide.Disconnect(name, _):
                        self.links.pop(name, None)
                        self.maps_due.pop(name, None)
                    case decide.Fenced():
                        self.fenced = True
                        self.dead = True
                    case decide.Faulted():
                        self.dead = True

    def write_record(self) -> None:
        wanted, self.record_wanted = self.record_wanted, None
        assert wanted
        if self.world.record.epoch != self.token[0]:
            self.dead = self.fenced = True
            self.core.stopped = True
            return
        self.world.record = Record(wanted, self.world.record.epoch, self.world.record.version + 1)
        self.core.recorded(wanted)
        self.drain()

    def lose(self, name: str, reason: str) -> None:
        if not self.dead:
            self.core.lost(self.core.bit(name), reason)
            self.links.pop(name, None)
            self.drain()

    def bring_back(self, name: str) -> None:
        replica = self.world.replicas[name]
        if not replica.open(self.token):
            self.dead = self.fenced = True
            self.core.stopped = True
            return
        own = set(replica.intent)
        replica.track(self.core.members(self.core.departed))
        link = self.links[name] = Link(replica.instance)
        self.core.opened(self.core.bit(name))
        self.maps_due[name] = (link, {}, own)
        self.drain()

    def gather_maps(self, name: str, rng: Random) -> None:
        """One survivor's map, or, when all have been read, the start of the copy."""
        link, got, own = self.maps_due[name]
        members = [m for m in self.core.members(self.core.in_sync) if m not in got and m in self.links]
        members = [m for m in members if self.world.usable(self, m)]
        if members:
            member = rng.choice(members)
            tracked = self.world.replicas[member].tracked
            got[member] = set(tracked[name]) if name in tracked else set(range(SIZE // REGION))
            return
        if not got:
            return
        del self.maps_due[name]
        if self.links.get(name) is link:
            self.core.resync(self.core.bit(name), set().union(own, *got.values()))
            self.drain()


class World:
    def __init__(self, rng: Random, replicas: int = 3, clean: bool = True) -> None:
        self.rng = rng
        names = [f"r{i + 1}" for i in range(replicas)]
        self.replicas = {name: SimReplica(name) for name in names}
        self.record = Record(tuple(names))
        self.judge = Judge()
        self.engines: list[Engine] = []
        self.highest_attached: Token = (0, 0)
        self.found: dict[str, list[set[int]]] = {}
        self.cut: set[tuple[Engine, str]] = set()
        self.crashes = 0

    def usable(self, engine: Engine, name: str) -> bool:
        replica = self.replicas[name]
        link = engine.links.get(name)
        return (
            replica.up
            and not replica.hung
            and (engine, name) not in self.cut
            and link is not None
            and link.instance == replica.instance
        )

    def attach(self) -> Engine | None:
        self.record = Record(self.record.in_sync, self.record.epoch + 1, self.record.version + 1)
        engine = Engine(self, (self.record.epoch, 1))
        if not engine.attach():
            return None
        self.engines.append(engine)
        return engine

    def check_everywhere(self, engine: Engine, ask: Ask) -> None:
        """Promise 1: whoever the record names and has not crashed since holds the acknowledged write."""
        for name in self.record.in_sync:
            if not self.usable(engine, name):
                continue
            data = self.replicas[name].data
            for i, cell in enumerate(ask.cells):
                block = ask.offset + i
                if self.judge.cells[block][-1] is cell:
                    assert data[block] in cell.possible, f"{name} lacks an acknowledged write of block {block}"

    def check_late(self, ask: Ask) -> None:
        """An engine that was replaced may only hear of writes that the new one found on every replica it reached.

        (A read may be stale there: what keeps clients from asking is the share's self-fencing.)
        """
        if ask.op != ops.WRITE:
            return
        for name, seen in self.found.items():
            for i, cell in enumerate(ask.cells):
                assert cell.possible <= seen[ask.offset + i], f"{name} acknowledged a write to a fenced engine"

    # events

    def deliver_frame(self, engine: Engine, name: str) -> None:
        link, replica = engine.links[name], self.replicas[name]
        index = self.rng.randrange(len(link.frames))
        frame = link.frames[index]
        if frame.op in (ops.FLUSH, decide.SETTLED, decide.TRACK):
            # what was sent before it is applied before it
            index = 0
            frame = link.frames[0]
        elif any(f.op in (ops.FLUSH, decide.SETTLED, decide.TRACK) for f in link.frames[:index]):
            index = 0
            frame = link.frames[0]
        del link.frames[index]
        if engine.token < replica.token:
            link.answers.append((frame.seq, decide.STALE_EPOCH, b""))
            return
        payload = replica.handle(frame.op, frame.seq, frame.offset, frame.length, frame.payload)
        if frame.op not in (decide.SETTLED, decide.STATE):
            link.answers.append((frame.seq, decide.OK, payload))

    def deliver_answer(self, engine: Engine, name: str) -> None:
        link = engine.links[name]
        seq, status, payload = link.answers.pop(self.rng.randrange(len(link.answers)))
        if not engine.dead:
            engine.core.answered(engine.core.bit(name), seq, status, payload)
            engine.drain()

    def crash_engine(self, engine: Engine) -> None:
        engine.dead = True
        self.engines.remove(engine)
        self.judge.crashed()

    def crash_replica(self, name: str, power: bool) -> None:
        self.crashes += 1
        self.judge.power_lost = self.judge.power_lost or power
        self.replicas[name].crash(self.rng, power)

    def quiesce(self, engine: Engine) -> None:
        """Let everything that is under way end well; raises AssertionError when it does not."""
        for replica in self.replicas.values():
            replica.up = True
            replica.hung = False
        self.cut.clear()
        for _ in range(20000):
            if engine.dead:
                return
            moved = False
            for name in list(engine.links):
                if not self.usable(engine, name):
                    engine.lose(name, "restarted")
                    moved = True
                    continue
                while name in engine.links and engine.links[name].frames:
                    self.deliver_frame(engine, name)
                    moved = True
                while name in engine.links and engine.links[name].answers:
                    self.deliver_answer(engine, name)
                    moved = True
            if engine.dead:
                return
            if engine.record_wanted is not None:
                engine.write_record()
                continue
            for name in list(engine.maps_due):
                engine.gather_maps(name, self.rng)
                moved = True
            for name in self.replicas:
                if engine.core.state(name) is ReplicaState.OUT:
                    engine.bring_back(name)
                    moved = True
            if not moved and engine.core.idle and not engine.core.dirty and not engine.core.resyncing:
                break
        else:
            raise AssertionError("it never comes to rest")
        assert self.record.in_sync == tuple(self.replicas), "a replica did not come back"
        contents = {bytes(replica.data) for replica in self.replicas.values()}
        assert len(contents) == 1, f"replicas differ: {[bytes(r.data).hex() for r in self.replicas.values()]}"


def run(rng: Random, steps: int, replicas: int = 3, partitions: bool = True) -> World:
    """`steps` random events, then peace; the assertions on the way are the test."""
    world = World(rng, replicas)
    current = world.attach()
    assert current is not None
    for _ in range(steps):
        choices: list[tuple[int, Callable[..., Any], tuple[Any, ...]]] = []
        engine = current
        if engine is None or engine.dead:
            if engine in world.engines:
                world.engines.remove(engine)
            world.judge.crashed()
            for replica in world.replicas.values():
                if not replica.up and rng.random() < 0.5:
                    replica.up = True
            current = world.attach()
            continue
        for each in list(world.engines):
            if each.dead:
                continue
            for name, link in each.links.items():
                if not world.usable(each, name):
                    if not world.replicas[name].hung:
                        choices.append((3, each.lose, (name, "connection broke")))
                    continue
                if link.frames:
                    choices.append((12, world.deliver_frame, (each, name)))
                if link.answers:
                    choices.append((12, world.deliver_answer, (each, name)))
            if each.record_wanted is not None:
                choices.append((4, each.write_record, ()))
        if engine.ready:
            offset = rng.randrange(SIZE)
            length = rng.randint(1, min(6, SIZE - offset))
            choices.append((14, engine.submit, (ops.WRITE, offset, length)))
            choices.append((10, engine.submit, (ops.READ, offset, length)))
            choices.append((1, engine.submit, (ops.UNMAP, offset, length)))
            choices.append((4, engine.submit, (ops.FLUSH,)))
            choices.append((2, engine.tick, ()))
        choices.extend((6, engine.gather_maps, (name, rng)) for name in engine.maps_due)
        for name, replica in world.replicas.items():
            if not replica.up:
                choices.append((3, setattr, (replica, "up", True)))
                continue
            if rng.random() < 0.3:
                choices.append((1, world.crash_replica, (name, rng.random() < 0.5)))
            if replica.hung:
                choices.append((3, setattr, (replica, "hung", False)))
                choices.append((2, engine.lose, (name, "hangs")))
            elif rng.random() < 0.3:
                choices.append((1, setattr, (replica, "hung", True)))
            if engine.core.state(name) is ReplicaState.OUT and not replica.hung and (engine, name) not in world.cut:
                choices.append((4, engine.bring_back, (name,)))
        if rng.random() < 0.012:
            if partitions and rng.random() < 0.5:
                # a second engine takes over while the first one still believes in itself
                for name in world.replicas:
                    if rng.random() < 0.2:
                        world.cut.add((engine, name))
                world.judge.crashed()
                current = world.attach()
            else:
                world.crash_engine(engine)
                if rng.random() < 0.3:
                    for name in world.replicas:
                        world.crash_replica(name, power=True)
                current = None
            continue
        weights = [weight for weight, _, _ in choices]
        if choices:
            _, act, arguments = rng.choices(choices, weights)[0]
            act(*arguments)
    for replica in world.replicas.values():
        replica.up, replica.hung = True, False
    for _ in range(3):
        if current is not None and not current.dead:
            world.quiesce(current)
            if not current.dead:
                break
        world.judge.crashed()
        world.cut.clear()
        current = world.attach()
        assert current is not None
    assert current is not None
    assert not current.dead
    assert current.ready
    current.submit(ops.READ, 0, SIZE)
    world.quiesce(current)
    return world
