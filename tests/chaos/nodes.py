"""Random faults on all of a volume's nodes under real kernel clients: `python -m tests.chaos nodes`.

Two nodes are network namespaces, whose processes can be killed one by one; the third is a guest, whose power can be
cut. Two more guests are the clients.
"""

from __future__ import annotations

import contextlib
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

import msgspec

from engine.errors import RecordError
from engine.records import RecordsClient
from engine.secret import read_secret
from tests.chaos.node_faults import KINDS, Fault, Kind, schedule, target
from tests.chaos.report import ByKind, Happened, Stalls, by_kind, summarise
from tests.failover.ground import ground
from tests.lab.guest import GuestError
from tests.lab.nodes import RECORDS, Cluster, GuestNode, Node, Running, SpaceNode
from tests.lab.program import ProgramFailedError
from tests.lab.stalls import Stalls as Seen
from tests.lab.stalls import worst_after
from tests.lab.workloads.appender import Gap
from tests.system.test_failovers import counting
from tests.system.test_nodes import Fire, under_fire

Tell = Callable[[str], None]
MENDED = 240.0
RECORD_SERVER = "record server"
_CALM = 60.0
_LOOK = 0.3
# until what a fault did is felt
_SOON = 3.0


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """`seconds` of faults; mending and verifying come on top."""

    seconds: float
    seed: int
    kinds: Sequence[Kind] = KINDS
    share: tuple[str, ...] = ()


class NodesReport(msgspec.Struct, kw_only=True):
    """`problems` is empty when nothing was lost and everything ended as it must. `took_over` by cause. `ended`: exit
    statuses of shares that ended by themselves."""

    seed: int
    seconds: float
    faults: dict[str, ByKind] = {}
    injected: int = 0
    missed: int = 0
    records: int = 0
    counted: int = 0
    names: int = 0
    refused: dict[str, int] = {}
    stalls: Stalls = Stalls()
    epoch: int = 0
    took_over: dict[str, int] = {}
    ended: dict[str, int] = {}
    problems: list[str] = []

    @property
    def ok(self) -> bool:
        return not self.problems


class Nodes:
    """The cluster as faults see it, with what starts again what they have killed."""

    def __init__(self, cluster: Cluster[Any], tell: Tell) -> None:
        self.cluster = cluster
        self.causes: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()
        self.problems: list[str] = []
        self._tell = tell
        self._client = RecordsClient(f"tcp:{RECORDS}", read_secret(cluster.secret))
        self._busy = {name: threading.Lock() for name in (RECORD_SERVER, *self.nodes)}
        self._ending = threading.Event()
        self._released = threading.Event()

    @property
    def nodes(self) -> dict[str, Node]:
        return {node.name: node for node in self.cluster.nodes.values()}

    def holder(self) -> str:
        try:
            lease, _ = self.cluster.lab.inside(lambda: self._client.another().read_lease(self.cluster.volume))
        except RecordError:
            return ""
        return lease.holder if lease.phase == "serving" else ""

    def cut_off(self, node: Node) -> None:
        self.cluster.lab.cut_off(node.link)

    def join(self, node: Node) -> None:
        # one that was switched off meanwhile has the same link again
        self.cluster.lab.join(node.link)

    def kill_records(self) -> None:
        self.cluster.records.kill()

    def start_records(self) -> None:
        self.cluster.records.start().wait_event("ready")

    def move(self, to: str) -> None:
        self.cluster.command("move", self.cluster.volume, "--to", to, "--timeout", "30")

    @contextlib.contextmanager
    def taken(self, names: Sequence[str]) -> Iterator[bool]:
        """With nothing else being done to these nodes, nor anything started on them; whether that was to be had."""
        with contextlib.ExitStack() as stack:
            for name in sorted(names):
                if not self._busy[name].acquire(timeout=0.1):
                    yield False
                    return
                stack.callback(self._busy[name].release)
            yield True

    # the init systems

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """What has ended is started again, on nodes to which nothing is being done."""
        keepers = [threading.Thread(target=self._keep, args=(node,), name=node.name) for node in self.nodes.values()]
        for keeper in keepers:
            keeper.start()
        try:
            yield
        finally:
            self._released.set()
            for keeper in keepers:
                keeper.join()

    def stop_keeping(self) -> None:
        """Nothing is started any more. The threads that booted guests go on: a guest ends with the thread that did."""
        self._ending.set()
        for node in self.nodes.values():
            with self._busy[node.name]:
                for program in (node.share, node.replicas):
                    self._note(program)

    def _keep(self, node: Node) -> None:
        while not self._released.wait(_LOOK):
            with self._busy[node.name]:
                if self._ending.is_set():
                    continue
                try:
                    self._revive(node)
                except (ProgramFailedError, GuestError, TimeoutError, OSError) as error:
                    self._tell(f"{node.name} does not come up: {error}"[:500])

    def _revive(self, node: Node) -> None:
        if isinstance(node, GuestNode) and not node.guest.alive:
            for program in (node.share, node.replicas):
                self._note(program)
            node.boot()
            node.wait_up()
        for program in (node.replicas, node.share):
            if not program.running:
                self._note(program)
                program.start()

    def _note(self, program: Running) -> None:
        """What a run of it did, before the next one."""
        for event in program.events:
            if event["event"] == "took_over":
                self.causes[event["cause"].removeprefix(f"{event['before']} ")] += 1
            if "a defect of share-manager" in event.get("message", ""):
                self.problems.append(f"{program.name}: {event['message']}")
            if event["event"] == "failed":
                self.ended[str(event["exit_status"])] += 1
                self._tell(f"{program.name} ended: {event['message']}")

    def whole(self, patience: float) -> str:
        """Wait until everything runs again and is in sync; what is missing, nothing if all is well."""
        end = time.monotonic() + patience
        missing = "nothing was looked at"
        while missing and time.monotonic() < end:
            missing = self._missing()
            if missing:
                time.sleep(_LOOK)
        return missing

    def _missing(self) -> str:
        for node in self.nodes.values():
            # which has one reader at a time
            if not self._busy[node.name].acquire(timeout=_LOOK):
                return f"{node.name} is busy"
            try:
                if not (node.share.running and node.replicas.running):
                    return f"{node.name} is down"
            finally:
                self._busy[node.name].release()
        holder = self.holder()
        if not holder:
            return "nobody serves"
        for node in self.nodes.values():
            try:
                status = node.status()
            except (ProgramFailedError, GuestError, TimeoutError, OSError) as error:
                return f"{node.name}: {error}"
            if node.name != holder and status["state"] != "standby":
                return f"{node.name} is {status['state']}"
            if node.name == holder and status["state"] != "running":
                return f"{node.name} has the lease and is {status['state']}"
            if node.name == holder and any(replica["state"] != "in_sync" for replica in status["replicas"]):
                return f"replicas are {[replica['state'] for replica in status['replicas']]}"
            if node.name == holder and status["in_grace"]:
                return "grace"
        return ""


class Inflictor:
    """Two lanes of faults, so that some meet what others have just broken. Seconds since 1970 in `faults`."""

    def __init__(self, nodes: Nodes, options: Options, tell: Tell) -> None:
        self.faults: list[Happened] = []
        self.missed = 0
        self.problems: list[str] = []
        self._over = False
        self._nodes = nodes
        self._options = options
        self._tell = tell

    def run(self, fire: Fire) -> None:
        end = time.monotonic() + self._options.seconds
        lanes = [
            threading.Thread(target=self._lane, args=("main", 1.0, 6.0, 0.6, end), name="main"),
            threading.Thread(target=self._lane, args=("beside", 15.0, 40.0, 0.0, end), name="beside"),
        ]
        for lane in lanes:
            lane.start()
        for lane in lanes:
            while lane.is_alive():
                lane.join(1.0)
                # read what the clients say, or they would wait for that in the end
                if (fire.job.done or fire.names.done) and not self._over:
                    self.problems.append("a client's work has ended by itself")
                    self._over = True

    def _lane(self, name: str, least: float, most: float, calm: float, end: float) -> None:
        """One fault after the other, `least` to `most` seconds apart; before a `calm` share of them all is mended."""
        seed = f"{self._options.seed} {name}"
        rng = Random(seed)
        for kind, fault in schedule(seed, self._options.kinds):
            pause, calmly = rng.uniform(least, most), rng.random() < calm
            time.sleep(max(0.0, min(pause, end - time.monotonic())))
            if calmly:
                self._nodes.whole(min(_CALM, max(0.0, end - time.monotonic())))
            if time.monotonic() >= end or self._over:
                return
            try:
                self._inflict(kind, fault)
            except Exception:
                self.problems.append(f"fault {fault.kind}: {traceback.format_exc()}")
                return

    def _inflict(self, kind: Kind, fault: Fault) -> None:
        nodes = self._nodes
        node = target(kind, nodes.nodes, nodes.holder(), fault.variant)
        if node is None:
            self.missed += 1
            return
        with nodes.taken(_touched(kind, node, list(nodes.nodes))) as ours:
            if not ours:
                self.missed += 1
                return
            length = f" for {fault.seconds:.1f} s" if fault.seconds else ""
            self._tell(f"FAULT {fault.kind}: {node.name}{length}")
            happened = Happened(kind=fault.kind, targets=(node.name,), start=time.time(), end=0.0, survived=True)
            hit = kind.inject(nodes, node, fault)
            happened.end = time.time()
        if hit:
            self.faults.append(happened)
        else:
            self.missed += 1


def _touched(kind: Kind, node: Node, nodes: list[str]) -> list[str]:
    """What nobody else may touch meanwhile. A move is nobody's: what it moves may be killed under it."""
    match kind.name:
        case "planned move":
            return []
        case "record server killed":
            return [RECORD_SERVER]
        case "kill everything on all nodes":
            return nodes
    return [node.name]


def _kind_of(cluster: Cluster[Any], name: str) -> Node:
    return GuestNode(cluster, name) if name == "c" else SpaceNode(cluster, name)


def campaign(options: Options, tell: Tell) -> NodesReport:
    """Raises AssertionError when it leaves something behind on the machine."""
    report = NodesReport(seed=options.seed, seconds=options.seconds)
    with ground(options.share, tell) as made:
        cluster: Cluster[Any] = Cluster(
            made.lab, "chaos", ("a", "b", "c"), kind=_kind_of, options=options.share, network="host"
        )
        gaps: list[Gap] = []
        inflictor: Inflictor | None = None
        try:
            for guest in made.clients:
                guest.kernel_log()
            with (
                contextlib.ExitStack() as stack,
                under_fire(cluster, made.clients, Seen(), tell, forgetful=True) as fire,
            ):
                with counting(fire, *made.clients) as counted:
                    nodes = Nodes(cluster, tell)
                    inflictor = Inflictor(nodes, options, tell)
                    stack.enter_context(nodes.kept())
                    inflictor.run(fire)
                    tell("no more faults; waiting until all is mended")
                    missing = nodes.whole(MENDED)
                    nodes.stop_keeping()
                    if missing:
                        report.problems.append(f"{MENDED:.0f} s after the last fault: {missing}")
                report.counted = counted.total
                report.epoch = cluster[cluster.serving()].status()["epoch"]
            gaps = fire.gaps
            report.records, report.names = fire.records, fire.rounds
            report.refused = dict(Counter(str(error["operation"]) for error in fire.refused))
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            report.problems.append(f"{where.line}: {type(error).__name__}: {error}"[:3000])
            tell(traceback.format_exc())
            for node in cluster.nodes.values():
                alive = node.guest.alive if isinstance(node, GuestNode) else True
                tell(f"{node.name}: alive {alive}, share runs {node.share.running}, replicas {node.replicas.running}")
        finally:
            cluster.close()
    if inflictor is not None:
        report.problems += [*inflictor.problems, *nodes.problems]
        for fault in inflictor.faults:
            fault.stall = worst_after(gaps, fault.start, fault.end + _SOON)
        report.faults = by_kind(inflictor.faults)
        report.injected, report.missed = len(inflictor.faults), inflictor.missed
        report.took_over, report.ended = dict(nodes.causes), dict(nodes.ended)
    report.stalls = summarise([gap["end"] - gap["start"] for gap in gaps])
    return report


def lines(report: NodesReport) -> list[str]:
    rows = [f"{'fault':<50} {'injected':>8} {'median stall':>12} {'worst stall':>12}"]
    rows += [
        f"{kind:<50} {row.injected:>8} {row.median_stall:>10.2f} s {row.worst_stall:>10.2f} s"
        for kind, row in report.faults.items()
    ]
    taken = ", ".join(f"{cause} {count}" for cause, count in sorted(report.took_over.items()))
    ended = ", ".join(f"status {status}: {count}" for status, count in sorted(report.ended.items()))
    refused = ", ".join(f"{operation} {count}" for operation, count in sorted(report.refused.items()))
    return [
        *rows,
        f"seed {report.seed}, {report.seconds:.0f} s of faults",
        f"faults injected {report.injected}; aimed at what was not there {report.missed}",
        f"epochs {report.epoch}; taken over: {taken or 'never'}; shares that ended by themselves: {ended or 'none'}",
        f"records appended and synced under the lock {report.records}, counted by two clients {report.counted}, "
        f"rounds of names {report.names}, refused: {refused or 'none'}",
        f"stalls {report.stalls.count}, median {report.stalls.median:.2f} s, worst {report.stalls.worst:.2f} s",
        "nothing was lost" if report.ok else "FAILED: " + "; ".join(report.problems),
    ]
