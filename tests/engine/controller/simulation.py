"""A volume in miniature: the real core, simulated replicas, record and client, and a model that judges them.

One byte stands for one block. Time is the order of events; whoever holds the `Random` chooses it. A replica's crash
loses an arbitrary part of what it had not flushed. Replicas are added, removed, and replaced by ones that hold garbage.
The judge keeps, for every block, the values that a read may return, and fails on the first one that it may not.

Snapshots, removals and reverts (`Change`) are carried out as engine/controller/chains.py does it, one step at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from engine import ops
from engine.controller import core as decide
from engine.controller import lineage
from engine.controller.actions import Disconnect, Faulted, Fenced, ReplicaState, Rest, WriteRecord
from engine.controller.core import Core
from engine.controller.foresight import Foresight
from engine.wire.messages import SnapshotEntry

SIZE = 24
REGION = 4
CORRUPT = 13
Token = tuple[int, int]
SNAPSHOT, REVERT, REMOVE = 200, 201, 202
BARRIERS = frozenset({ops.FLUSH, decide.SETTLED, decide.TRACK, SNAPSHOT, REVERT, REMOVE})


@dataclass
class Record:
    replicas: tuple[str, ...]
    in_sync: tuple[str, ...]
    epoch: int = 0
    version: int = 1
    # the snapshot that a revert under way goes back to
    pending: str = ""
    reverted_without: frozenset[str] = frozenset()

    def next(self, **changes: Any) -> Record:
        new = replace(self, version=self.version + 1, **changes)
        return replace(new, reverted_without=new.reverted_without - set(new.in_sync))


@dataclass
class Snap:
    """`data` is the whole volume as it was, which merging removed ones away does not change."""

    name: str
    created: str
    data: bytes
    removed: bool = False
    live: bool = True


@dataclass
class Change:
    """One change of the chain: `hold` until all is quiet, `told` until all answered or are lost, then `recorded`."""

    kind: int
    name: str
    created: str
    phase: str = "hold"
    waiting: set[str] = field(default_factory=set)
    done: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)
    allowed: list[set[int]] = field(default_factory=list)


class SimReplica:
    """Content, intent map and change maps as a replica server keeps them; maps are durable before data, always."""

    def __init__(self, name: str, size: int, region: int) -> None:
        self.name = name
        self.region = region
        self.durable = bytearray(size)
        self.data = bytearray(size)
        self.intent: set[int] = set()
        self.last_seq: dict[int, int] = {}
        self.inherited: set[int] = set()
        self.tracked: dict[str, set[int]] = {}
        # every value a block ever had here
        self.seen: list[set[int]] = [{0} for _ in range(size)]
        # blocks that the disk lost: those that checksums tell of, and those that it cannot read
        self.rot: set[int] = set()
        self.unreadable: set[int] = set()
        self.token: Token = (0, 0)
        self.instance = 0
        self.up = True
        self.hung = False
        # durable: up to which region it is filled, on top of which snapshot; None when maps tell all that is missing
        self.rebuild: int | None = None
        self.rebuild_top: object = None
        self.filled: dict[int, int] = {}
        self.snaps: list[Snap] = []

    def lose_everything(self, rng: Random) -> None:
        """An empty directory takes its place; what a hole would hide is garbage here."""
        instance = self.instance
        self.__init__(self.name, len(self.data), self.region)  # type: ignore[misc]
        self.instance = instance + 1
        self.rebuild = 0
        self.drop_head(rng)

    def drop_head(self, rng: Random) -> None:
        self.data[:] = rng.randbytes(len(self.data))
        self.durable[:] = self.data
        self.rebuild = 0

    def begin_rebuild(self, source: SimReplica, rng: Random) -> None:
        """The snapshots are the source's; the head stays when what lies below it is the same."""
        top = lineage.newest(source.listing())
        if self.rebuild is None or self.rebuild_top != top:
            self.drop_head(rng)
        self.rebuild_top = top
        self.snaps = [replace(snap) for snap in source.snaps]

    def save_rebuild(self, frontier: int) -> None:
        self.durable[:] = self.data
        self.rebuild = frontier
        filled, self.filled = self.filled, {}
        for region, seq in filled.items():
            if self.last_seq.get(region, -1) <= seq:
                self.intent.discard(region)
                self.inherited.discard(region)
                self.last_seq.pop(region, None)

    def listing(self) -> list[SnapshotEntry]:
        return [
            SnapshotEntry(
                name=snap.name,
                parent="",
                created=snap.created,
                user_created=True,
                removed=snap.removed,
                live=snap.live,
                children=1,
                size=len(self.data),
                allocated=0,
            )
            for snap in sorted(self.snaps, key=lambda snap: not snap.live)
        ]

    def snap(self, name: str) -> Snap:
        return next(snap for snap in self.snaps if snap.name == name)

    def change(self, kind: int, name: str, created: str) -> None:
        if kind == SNAPSHOT:
            assert name not in [snap.name for snap in self.snaps]
            self.snaps.append(Snap(name, created, bytes(self.data)))
            self.durable[:] = self.data
        elif kind == REMOVE:
            self.snap(name).removed = True
        else:
            chosen = self.snap(name)
            assert not chosen.removed
            if chosen.live:
                for later in self.snaps[self.snaps.index(chosen) + 1 :]:
                    later.live = False
            else:
                # only its own line is below the head then; the model needs no more than that
                raise AssertionError("reverts go back along the chain")
            self.data[:] = self.durable[:] = chosen.data
            for block, value in enumerate(self.data):
                self.seen[block].add(value)

    def merge(self) -> None:
        """Removed ones go, but for the one that the head builds on."""
        live = [snap for snap in self.snaps if snap.live]
        self.snaps = [snap for snap in self.snaps if not snap.removed or snap in live[-1:]]

    def open(self, token: Token) -> bool:
        if token < self.token:
            return False
        self.token = token
        # sequence numbers belong to one connection: what is set already is inherited from here on
        self.last_seq.clear()
        self.filled.clear()
        self.inherited = set(self.intent)
        return True

    def _touch(self, seq: int, offset: int, length: int) -> None:
        for region in range(offset // self.region, (offset + length - 1) // self.region + 1):
            self.intent.add(region)
            self.last_seq[region] = seq
            for changes in self.tracked.values():
                changes.add(region)

    def rotten(self, offset: int, length: int) -> int | None:
        """The first block of the range whose content is not what was written."""
        return next((block for block in range(offset, offset + length) if block in self.rot), None)

    def handle(self, op: int, seq: int, offset: int, length: int, payload: Any) -> bytes:
        if op in (ops.WRITE, ops.UNMAP, decide.WRITE_LAYER):
            for block in self.rot & set(range(offset, offset + length)):
                # a power cut that brings the damage back, after the sums went with the write, is not what this tests
                self.durable[block] = payload[block - offset] if payload else 0
                self.rot.discard(block)
            self.unreadable -= set(range(offset, offset + length))
        if op in (ops.READ, decide.READ_LAYER):
            return bytes(self.data[offset : offset + length])
        if op in (ops.WRITE, decide.WRITE_LAYER):
            self._touch(seq, offset, length)
            if op == decide.WRITE_LAYER and self.rebuild is not None:
                self.filled[offset // self.region] = seq
            self.data[offset : offset + length] = payload
            for i, value in enumerate(payload):
                self.seen[offset + i].add(value)
        elif op == ops.UNMAP:
            self._touch(seq, offset, length)
            self.data[offset : offset + length] = bytes(length)
        elif op == decide.MEND:
            _, data = payload
            self.data[offset : offset + length] = data
            self.durable[offset : offset + length] = data
            self.rot -= set(range(offset, offset + length))
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
        elif op == decide.STATE:
            self.rebuild = None
        elif op in (SNAPSHOT, REVERT, REMOVE):
            self.change(op, *payload)
        return b""

    def track(self, names: tuple[str, ...]) -> None:
        self.tracked = {name: self.tracked.get(name, set(self.intent)) for name in names}

    def crash(self, rng: Random, power: bool) -> None:
        """The process ends; with `power`, so does what the disk had not got, block by block as luck has it."""
        self.up = False
        self.hung = False
        self.instance += 1
        self.last_seq.clear()
        self.filled.clear()
        if power:
            for block in range(len(self.data)):
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

    def __init__(self, size: int) -> None:
        self.cells: list[list[Cell]] = [[Cell({0}, acked=True)] for _ in range(size)]
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

    def answered(self, ask: Ask, error: int, data: ops.Data) -> None:
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

    def now(self, core: Core) -> list[set[int]]:
        """What each block may hold while `core` is held and quiet: all that was admitted, nothing that waits."""
        waiting = {id(cell) for *_, ask in core._queue if ask.op != ops.READ for cell in ask.cells}
        found = []
        for history in self.cells:
            cell = next(cell for cell in reversed(history) if id(cell) not in waiting)
            found.append(set(cell.possible))
        return found

    def reverted(self, content: bytes) -> None:
        """The volume is what it was then, on disk."""
        self.cells = [[Cell({value}, acked=True)] for value in content]

    def crashed(self) -> None:
        """The engine is gone: unacknowledged writes may or may not have happened; so may unflushed ones after a
        power loss."""
        for block, history in enumerate(self.cells):
            # what is older than the last acknowledged write comes back only with a power loss, now or later
            first = 0 if self.power_lost else max(i for i, cell in enumerate(history) if cell.acked)
            possible = set().union(*(cell.possible for cell in history[first:]))
            self.cells[block] = [*history[:first], Cell(possible, acked=True)]
        self.power_lost = False


class Whim(Foresight):
    """Right or wrong: a flush goes with a write as luck has it."""

    def __init__(self, rng: Random, ahead: float) -> None:
        # nothing is learnt, and a world that is copied is small
        self._rng = rng
        self._ahead = ahead

    def write(self, length: int) -> bool:
        return self._rng.random() < self._ahead

    def flush(self) -> None:
        pass


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
        self.removing: set[str] = set()
        self.change: Change | None = None
        self.reverting = False
        self.maintenance = False

    def attach(self) -> bool:
        record = self.world.record
        names = list(record.replicas)
        reached = []
        for name in record.in_sync:
            replica = self.world.replicas[name]
            if replica.up and not replica.hung and (self, name) not in self.world.cut:
                if not replica.open(self.token):
                    self.dead = self.fenced = True
                    return False
                replica.rebuild = None
                reached.append(name)
        if not reached:
            self.dead = True
            return False
        # whom the record names, as far as this engine knows
        self.members = record.in_sync
        self.core = Core(
            size=self.world.size,
            replicas=names,
            in_sync=record.in_sync,
            region_size=self.world.region,
            foresight=Whim(self.world.rng, self.world.ahead),
        )
        dirty: set[int] = set()
        self.world.found = {name: [set(values) for values in self.world.replicas[name].seen] for name in reached}
        for name in reached:
            self.links[name] = Link(self.world.replicas[name].instance)
            dirty |= self.world.replicas[name].intent
        for name in record.in_sync:
            if name not in reached:
                self.core.lost(self.core.bit(name), "unreachable")
        if not self.settle_chains(reached):
            return False
        self.core.begin(dirty)
        self.drain()
        return True

    def settle_chains(self, reached: list[str]) -> bool:
        """`Chains.make_equal`, which may be cut short anywhere."""
        world = self.world
        replicas = {name: world.replicas[name] for name in reached}
        steps: list[tuple[SimReplica, int, str]] = []
        if world.record.pending:
            self.reverting = True
            steps += [(replica, REVERT, world.record.pending) for replica in replicas.values()]
        for replica, kind, name in steps:
            if world.unlucky():
                self.dead = True
                return False
            replica.change(kind, name, "")
        verdict = lineage.reconcile({name: replica.listing() for name, replica in replicas.items()})
        assert not verdict.leave, "members differ in a way that no crash explains"
        for name, snapshots in verdict.remove.items():
            for one in snapshots:
                assert one not in world.snapshots or one in world.removing, f"{one} was acknowledged"
                if world.unlucky():
                    self.dead = True
                    return False
                replicas[name].change(REMOVE, one, "")
        if self.reverting:
            world.judge.reverted(world.snapshots[world.record.pending])
        return True

    @property
    def ready(self) -> bool:
        if not self.attached and not self.dead and not self.core.leaving:
            if self.reverting and not self.finish_revert():
                return False
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
                assert op != ops.READ or self.core.members(mask)[0] in self.members, "a stale replica is read from"
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
                    case WriteRecord(in_sync):
                        assert self.record_wanted is None
                        self.record_wanted = in_sync
                    case Disconnect(name, _):
                        self.links.pop(name, None)
                        self.maps_due.pop(name, None)
                    case Rest():
                        core.rested()
                    case Fenced():
                        self.fenced = True
                        self.dead = True
                    case Faulted():
                        self.dead = True

    def write_record(self) -> None:
        wanted, self.record_wanted = self.record_wanted, None
        assert wanted
        if self.change_record(in_sync=wanted):
            self.members = wanted
            self.core.recorded(wanted)
            self.drain()

    def change_record(self, **changes: Any) -> bool:
        if self.world.record.epoch != self.token[0]:
            self.dead = self.fenced = True
            self.core.stopped = True
            return False
        self.world.record = self.world.record.next(**changes)
        return True

    # changes of the chain

    @property
    def unequal(self) -> bool:
        return bool(self.core.leaving or self.core.dirty or self.core.resyncs)

    def begin_change(self, kind: int, name: str) -> None:
        """Held from now on, but for a removal, which changes nothing that anybody reads."""
        if self.unequal or self.change is not None:
            return
        self.world.changes += 1
        self.world.reverts += kind == REVERT
        self.change = Change(kind, name, f"t{self.world.changes}")
        if kind == REVERT:
            if not self.change_record(pending=name):
                return
            self.reverting = True
        if kind == REMOVE:
            self.world.removing.add(name)
            self.tell()
        else:
            self.core.hold()
        self.drain()

    @property
    def change_due(self) -> bool:
        """Whether `step_change` would get on."""
        change = self.change
        if change is None or self.dead:
            return False
        if change.phase == "hold":
            return self.core.quiet
        if change.phase == "told":
            return not change.waiting & set(self.links)
        return not self.core.leaving

    def step_change(self) -> None:
        change = self.change
        assert change is not None
        if change.phase == "hold":
            if self.unequal:
                self.release()
                if change.kind != REVERT or self.change_record(pending=""):
                    self.reverting = False
                    self.change = None
                return
            self.tell()
        elif change.phase == "told":
            if change.done:
                for name in change.refused:
                    self.lose(name, "refused what others did")
            change.phase = "recorded"
            if change.kind != REMOVE:
                self.release()
        elif not change.done or change.kind == REMOVE:
            # nobody is left, or nobody did it
            if self.reverting and not self.finish_revert():
                return
            self.change = None
        else:
            if change.kind == SNAPSHOT:
                self.world.check_snapshot(change)
            else:
                self.world.judge.reverted(self.world.snapshots[change.name])
                if not self.finish_revert():
                    return
            self.change = None

    def tell(self) -> None:
        change = self.change
        assert change is not None
        change.phase = "told"
        change.waiting = set(self.core.members(self.core.fanout)) & set(self.links)
        change.allowed = self.world.judge.now(self.core)
        for name in change.waiting:
            self.links[name].frames.append(Frame(change.kind, -1, 0, 0, (change.name, change.created)))

    def release(self) -> None:
        self.core.release()
        self.drain()

    def finish_revert(self) -> bool:
        away = frozenset(self.world.record.replicas) - set(self.world.record.in_sync)
        self.reverting = False
        return self.change_record(pending="", reverted_without=away)

    def told(self, name: str, status: int) -> None:
        """A replica's answer to the change."""
        change = self.change
        if status == decide.STALE_EPOCH:
            self.dead = self.fenced = True
            self.core.stopped = True
        elif change is not None and name in change.waiting:
            change.waiting.discard(name)
            (change.refused if status else change.done).add(name)

    def lose(self, name: str, reason: str) -> None:
        if not self.dead:
            self.core.lost(self.core.bit(name), reason)
            self.links.pop(name, None)
            self.drain()

    def may_return(self, name: str) -> bool:
        return (
            self.core.state(name) is ReplicaState.OUT and name not in self.removing and self.world.reaches(self, name)
        )

    def bring_back(self, name: str) -> None:
        replica = self.world.replicas[name]
        if self.change is not None or self.world.record.pending:
            return
        member = self.core.members(self.core.in_sync)[0]
        if not self.world.usable(self, member):
            return
        extra = lineage.returning(self.world.replicas[member].listing(), replica.listing())
        rebuild = replica.rebuild is not None or extra is None
        if rebuild and self.core.untracked:
            # before all survivors note what it misses, what it remembers must not count
            return
        if not replica.open(self.token):
            self.dead = self.fenced = True
            self.core.stopped = True
            return
        own = set(replica.intent)
        if rebuild:
            self.world.rebuilds += 1
            replica.begin_rebuild(self.world.replicas[member], self.world.rng)
        else:
            for one in extra or ():
                assert one not in self.world.snapshots or one in self.world.removing, f"{one} was acknowledged"
                replica.change(REMOVE, one, "")
        if name in self.world.record.reverted_without:
            own = set(range(self.world.regions))
        replica.track(self.core.members(self.core.departed))
        link = self.links[name] = Link(replica.instance)
        self.core.opened(self.core.bit(name))
        self.world.resumed += bool(replica.rebuild)
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
            got[member] = set(tracked[name]) if name in tracked else set(range(self.world.regions))
            return
        if not got:
            return
        del self.maps_due[name]
        if self.links.get(name) is link:
            regions = set().union(own, *got.values())
            filled = self.world.replicas[name].rebuild
            if filled is not None:
                regions |= set(range(filled, self.world.regions))
            self.core.resync(self.core.bit(name), regions)
            self.drain()

    def save_rebuild(self, name: str, then_crash: bool) -> None:
        """As the driver does now and then: what is filled is synced and remembered."""
        resync = self.core.resyncs[self.core.bit(name)]
        replica = self.world.replicas[name]
        frontier = self.world.regions if resync.frontier is None else resync.frontier
        assert replica.rebuild is not None
        replica.save_rebuild(max(replica.rebuild, frontier))
        if then_crash:
            self.world.crash_replica(name, power=self.world.rng.random() < 0.5)

    def saves(self) -> list[str]:
        """Replicas of which more is filled than is remembered."""
        found = []
        for name in self.core.members(self.core.resyncing):
            resync, known = self.core.resyncs[self.core.bit(name)], self.world.replicas[name].rebuild
            if resync.regions is not None and known is not None and self.world.usable(self, name):
                frontier = self.world.regions if resync.frontier is None else resync.frontier
                if frontier > known:
                    found.append(name)
        return found

    def add(self, rng: Random) -> None:
        if not self.owns_record():
            return
        self.world.rebuilds += 1
        name = next(f"r{i}" for i in range(1, 99) if f"r{i}" not in self.world.record.replicas)
        self.world.replicas.setdefault(name, SimReplica(name, self.world.size, self.world.region)).lose_everything(rng)
        self.core.add(name)
        self.world.change_record(replicas=(*self.world.record.replicas, name))
        self.drain()

    def remove(self, name: str) -> None:
        """Out of the set first, and out of the record when that is done."""
        if self.core.in_sync == self.core.bit(name):
            return
        self.removing.add(name)
        self.lose(name, "is being removed")

    def removed(self, name: str) -> None:
        self.removing.discard(name)
        if self.owns_record():
            self.world.change_record(replicas=tuple(n for n in self.world.record.replicas if n != name))
            self.core.remove(self.core.bit(name))
            self.drain()

    def owns_record(self) -> bool:
        if self.world.record.epoch != self.token[0]:
            self.dead = self.fenced = True
            self.core.stopped = True
        return not self.dead


class World:
    def __init__(self, rng: Random, replicas: int = 3, size: int = SIZE, region: int = REGION) -> None:
        self.rng = rng
        # how likely a write has a flush sent with it
        self.ahead = 0.5
        self.size = size
        self.region = region
        self.regions = size // region
        names = [f"r{i + 1}" for i in range(replicas)]
        self.replicas = {name: SimReplica(name, size, region) for name in names}
        self.record = Record(tuple(names), tuple(names))
        self.resumed = 0
        self.judge = Judge(size)
        self.engines: list[Engine] = []
        self.highest_attached: Token = (0, 0)
        self.found: dict[str, list[set[int]]] = {}
        self.cut: set[tuple[Engine, str]] = set()
        self.crashes = 0
        self.flips = 0
        self.repairs = 0
        self.changes = 0
        self.reverts = 0
        self.peace = False
        self.rebuilds = 0
        # acknowledged ones, and those that somebody began to remove
        self.snapshots: dict[str, bytes] = {}
        self.removing: set[str] = set()

    def unlucky(self) -> bool:
        return not self.peace and self.rng.random() < 0.05

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

    def reaches(self, engine: Engine, name: str) -> bool:
        replica = self.replicas[name]
        return replica.up and not replica.hung and (engine, name) not in self.cut

    def change_record(self, **changes: Any) -> None:
        self.record = self.record.next(**changes)

    def replace_directory(self, name: str) -> None:
        """Somebody gives a replica that is out an empty directory."""
        self.replicas[name].lose_everything(self.rng)
        self.rebuilds += 1

    def attach(self) -> Engine | None:
        self.record = self.record.next(epoch=self.record.epoch + 1)
        engine = Engine(self, (self.record.epoch, 1))
        if not engine.attach():
            return None
        self.engines.append(engine)
        return engine

    def revertible(self, name: str) -> bool:
        """Below the head of every member, and nobody removes it."""
        if name in self.removing:
            return False
        snaps = [[snap for snap in self.replicas[member].snaps if snap.name == name] for member in self.record.in_sync]
        return all(one and one[0].live and not one[0].removed for one in snaps)

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

    def check_snapshot(self, change: Change) -> None:
        """Acknowledged: it is the same on all that the record names, and one point of the clients' order."""
        found = {name: replica.snap(change.name) for name, replica in self.replicas.items() if name in change.done}
        contents = {snap.data for snap in found.values()}
        assert len(contents) == 1, f"snapshot {change.name} differs"
        (content,) = contents
        for block, value in enumerate(content):
            assert value in change.allowed[block], f"snapshot {change.name} has {value} in block {block}"
        for name in self.record.in_sync:
            assert name in change.done, f"{name} lacks snapshot {change.name}"
        self.snapshots[change.name] = content

    def check_late(self, ask: Ask) -> None:
        """An engine that was replaced may only hear of writes that the new one found on every replica it reached.

        (A read may be stale there: what keeps clients from asking is the share's self-fencing.)
        """
        if ask.op != ops.WRITE:
            return
        for name, seen in self.found.items():
            for i, cell in enumerate(ask.cells):
                assert cell.possible <= seen[ask.offset + i], f"{name} acknowledged a write to a fenced engine"

    def check_standing(self) -> None:
        """What holds at every moment: somebody is recorded, and what an acknowledged flush covered is on the disk of
        everybody who is."""
        assert self.record.in_sync, "the in-sync set is empty"
        if self.record.pending:
            # some members are what they were at the snapshot already
            return
        for name in self.record.in_sync:
            durable = self.replicas[name].durable
            for block, history in enumerate(self.judge.cells):
                assert block in self.replicas[name].rot or any(durable[block] in cell.possible for cell in history), (
                    f"{name} has {durable[block]} on its disk in block {block}, which is older than a flush"
                )

    # events

    def deliver_frame(self, engine: Engine, name: str) -> None:
        link, replica = engine.links[name], self.replicas[name]
        index = self.rng.randrange(len(link.frames))
        frame = link.frames[index]
        if frame.op in BARRIERS:
            # what was sent before it is applied before it
            index = 0
            frame = link.frames[0]
        elif any(f.op in BARRIERS for f in link.frames[:index]):
            index = 0
            frame = link.frames[0]
        del link.frames[index]
        if engine.token < replica.token:
            link.answers.append((frame.seq, decide.STALE_EPOCH, b""))
            return
        if (
            frame.op in (ops.READ, decide.READ_LAYER)
            and (bad := replica.rotten(frame.offset, frame.length)) is not None
        ):
            link.answers.append((frame.seq, CORRUPT, bytes([bad])))
            return
        if frame.op in (ops.READ, decide.READ_LAYER) and replica.unreadable & set(
            range(frame.offset, frame.offset + frame.length)
        ):
            link.answers.append((frame.seq, decide.IO_ERROR, b"bad sector"))
            return
        if frame.op in (SNAPSHOT, REVERT, REMOVE) and self.unlucky():
            link.answers.append((frame.seq, decide.NO_SPACE, b""))
            return
        payload = replica.handle(frame.op, frame.seq, frame.offset, frame.length, frame.payload)
        if frame.op not in (decide.SETTLED, decide.STATE):
            link.answers.append((frame.seq, decide.OK, payload))

    def deliver_answer(self, engine: Engine, name: str) -> None:
        link = engine.links[name]
        seq, status, payload = link.answers.pop(self.rng.randrange(len(link.answers)))
        if engine.dead:
            return
        if seq < 0:
            engine.told(name, status)
        elif status == CORRUPT:
            self.repairs += 1
            engine.core.damaged(engine.core.bit(name), seq, payload[0], 1)
            engine.drain()
        else:
            self.repairs += status == decide.IO_ERROR
            engine.core.answered(engine.core.bit(name), seq, status, payload)
            engine.drain()

    @property
    def damaged(self) -> bool:
        return any(replica.rot or replica.unreadable for replica in self.replicas.values())

    def flip(self, engine: Engine) -> None:
        """The disk of one replica loses a block; its checksums, or the disk itself, know it.

        A second one of the volume never has the same region damaged at a time: that would be lost.
        """
        rng = self.rng
        members = [name for name in self.record.in_sync if self.usable(engine, name)]
        block = rng.randrange(SIZE)
        region = set(range(block // REGION * REGION, block // REGION * REGION + REGION))
        damaged = any((replica.rot | replica.unreadable) & region for replica in self.replicas.values())
        # checksums are of regions at rest, and those are equal
        contents = {bytes(replica.data[min(region) : max(region) + 1]) for replica in self.replicas.values()}
        busy = any(replica.intent & {block // REGION} for replica in self.replicas.values())
        if len(members) < len(self.replicas) or len(members) < 2 or damaged or busy or len(contents) > 1:
            return
        self.flips += 1
        replica = self.replicas[rng.choice(members)]
        # a disk that cannot read what was written anew is thrown out: that would be a second failure
        if rng.random() < 0.7 or engine.core._rewritten:
            replica.rot.add(block)
            replica.data[block] ^= 0xFF
        else:
            replica.unreadable.add(block)

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
        self.peace = True
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
            if engine.change_due:
                engine.step_change()
                continue
            if not engine.ready:
                continue
            for name in list(engine.maps_due):
                engine.gather_maps(name, self.rng)
                moved = True
            for name in list(engine.removing):
                if engine.core.state(name) is ReplicaState.OUT and name not in self.record.in_sync:
                    engine.removed(name)
                    moved = True
            for name in self.record.replicas:
                if engine.may_return(name):
                    engine.bring_back(name)
                    moved = True
            if not moved and engine.core.idle and not engine.core.dirty and not engine.core.resyncing:
                break
        else:
            raise AssertionError("it never comes to rest")
        assert set(self.record.in_sync) == set(self.record.replicas), "a replica did not come back"
        replicas = [self.replicas[name] for name in self.record.replicas]
        for block in range(self.size):
            values = {replica.data[block] for replica in replicas if block not in replica.rot}
            assert len(values) == 1, f"replicas differ: {[bytes(replica.data).hex() for replica in replicas]}"
        assert all(replica.rebuild is None for replica in replicas)
        kept = [
            {snap.name: (snap.created, snap.live, snap.data) for snap in replica.snaps if not snap.removed}
            for replica in replicas
        ]
        assert all(one == kept[0] for one in kept), f"snapshots differ: {kept}"
        for name, content in self.snapshots.items():
            if name not in self.removing:
                assert kept[0][name][2] == content, f"snapshot {name} has changed"

    def finish(self, current: Engine | None) -> None:
        """Peace, attaching anew where it takes that; then all replicas are equal and everything can be read."""
        for _ in range(3):
            if current is not None and not current.dead:
                self.quiesce(current)
                if not current.dead:
                    break
            self.judge.crashed()
            self.cut.clear()
            current = self.attach()
            assert current is not None
        assert current is not None
        assert not current.dead
        assert current.ready
        # each read has one block of one replica repaired
        for _ in range(len(self.replicas) * self.size // REGION if self.flips else 1):
            current.submit(ops.READ, 0, self.size)
            self.quiesce(current)


def run(
    rng: Random,
    steps: int,
    replicas: int = 3,
    partitions: bool = True,
    membership: bool = True,
    flips: bool = False,
) -> World:
    """`steps` random events, then peace; the assertions on the way are the test."""
    world = World(rng, replicas)
    current = world.attach()
    assert current is not None
    # where everything breaks all the time, nothing that takes long gets far
    trouble = rng.choice((0.3, 0.3, 0.03))
    for step in range(steps):
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
            if not world.damaged:  # nobody leaves for being slow
                choices.append((2, engine.tick, ()))
            if flips:
                choices.append((3, world.flip, (engine,)))
            if engine.change is None and not flips:  # damage of snapshots is not simulated
                choices.append((3, engine.begin_change, (SNAPSHOT, f"s{world.changes + 1}")))
                live = [name for name in world.snapshots if world.revertible(name)]
                if live:
                    choices.append((1, engine.begin_change, (REMOVE, rng.choice(live))))
                    choices.append((6, setattr, (engine, "maintenance", True)))
                    if engine.maintenance and not engine.core.inflight:
                        choices.append((40, engine.begin_change, (REVERT, rng.choice(live))))
            if engine.maintenance:
                # nobody has the volume
                choices = [one for one in choices if one[1] != engine.submit]
                if engine.change is None:
                    choices.append((2, setattr, (engine, "maintenance", False)))
        if engine.change_due:
            choices.append((8, engine.step_change, ()))
        choices.extend((6, engine.gather_maps, (name, rng)) for name in engine.maps_due)
        choices.extend((20, engine.save_rebuild, (name, rng.random() < 0.3)) for name in engine.saves())
        if engine.ready and membership and engine.change is None:
            names = [name for name in engine.core.names if name]
            if len(names) < 4 and rng.random() < 0.1:
                choices.append((1, engine.add, (rng,)))
            for name in names:
                out = engine.core.state(name) is ReplicaState.OUT and name not in world.record.in_sync
                if name in engine.removing:
                    if out:
                        choices.append((4, engine.removed, (name,)))
                elif len(names) > 1 and rng.random() < 0.03:
                    choices.append((1, engine.remove, (name,)))
                elif out and engine.owns_record() and rng.random() < 0.2:
                    choices.append((1, world.replace_directory, (name,)))
        for name, replica in world.replicas.items():
            if not replica.up:
                choices.append((3, setattr, (replica, "up", True)))
                continue
            choices.append((1, replica.merge, ()))
            if world.damaged:
                # a second failure at the same time may be one too many
                continue
            if rng.random() < trouble:
                choices.append((1, world.crash_replica, (name, rng.random() < 0.5)))
            if replica.hung:
                choices.append((3, setattr, (replica, "hung", False)))
                if name in engine.core.names:
                    choices.append((2, engine.lose, (name, "hangs")))
            elif rng.random() < trouble:
                choices.append((1, setattr, (replica, "hung", True)))
            if name in engine.core.names and engine.may_return(name):
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
                if rng.random() < 0.3 and not world.damaged:
                    for name in world.replicas:
                        world.crash_replica(name, power=True)
                current = None
            continue
        weights = [weight for weight, _, _ in choices]
        if choices:
            _, act, arguments = rng.choices(choices, weights)[0]
            act(*arguments)
            if step % 8 == 0:
                world.check_standing()
    world.peace = True
    for replica in world.replicas.values():
        replica.up, replica.hung = True, False
    world.finish(current)
    return world
