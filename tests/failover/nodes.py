"""Rows on two nodes: the one that serves loses a part, its power or its network, or is asked to leave."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from engine.records import RecordsClient
from engine.secret import read_secret
from share_manager.share.handover import Timing
from tests.failover.ground import Ground, count_refused
from tests.failover.measure import Measured
from tests.failover.probes import probes
from tests.lab.mounts import mounted
from tests.lab.nodes import RECORDS, Cluster, GuestNode, Node, SpaceNode
from tests.lab.stalls import Stalls
from tests.lab.workloads import appender
from tests.system.test_nodes import FENCED, Fire, under_fire

Act = Callable[[Ground, Fire, str, str], None]
"""What happens to the node that serves (the first name), so that the second one serves."""


def _move(ground: Ground, fire: Fire, serving: str, other: str) -> None:
    fire.cluster.move(other)


def _kill_manager(ground: Ground, fire: Fire, serving: str, other: str) -> None:
    fire.cluster[serving].kill("share-manager")


def _kill_everything(ground: Ground, fire: Fire, serving: str, other: str) -> None:
    fire.cluster[serving].kill_all()


def _cut_power(ground: Ground, fire: Fire, serving: str, other: str) -> None:
    fire.cluster[serving].power_cut()


def _cut_power_cold(ground: Ground, fire: Fire, serving: str, other: str) -> None:
    """Nothing of the share runs on the other node until somebody has noticed."""
    fire.cluster[serving].power_cut()
    ground.lab.inside(lambda: hand_over(fire.cluster, other))
    fire.cluster[other].share.start()


def _cut_power_and_say_who_is_gone(ground: Ground, fire: Fire, serving: str, other: str) -> None:
    fire.cluster[serving].power_cut()
    fire.cluster.command("records", "gone", fire.cluster.volume, "--client", ground.three.hostname)


def hand_over(cluster: Cluster[Any], to: str) -> None:
    """What a controller does for a volume without a standby: it watches the lease, and gives it to a node, on which it
    then starts a share. Inside the lab's network."""
    duration = Timing().duration
    with RecordsClient(f"tcp:{RECORDS}", read_secret(cluster.secret)) as client:
        lease, version = client.read_lease(cluster.volume)
        changed = time.monotonic()
        while time.monotonic() - changed < duration:
            lease, now = client.read_lease(cluster.volume, version, 0.25)
            if now != version:
                version, changed = now, time.monotonic()
        wanted = cluster[to].name
        given = msgspec.structs.replace(lease.renewed(), phase="released", wanted=wanted, failover=os.urandom(6).hex())
        done, _, _ = client.swap_lease(cluster.volume, version, given)
        assert done


def _restore(fire: Fire, serving: str, other: str, *, power: bool, replicas: bool, share: bool) -> None:
    node = fire.cluster[serving]
    if power:
        node.boot()
        node.wait_up()
    if replicas:
        node.replicas.start().wait_event("ready")
    if share:
        node.share.start().wait_event("standby")
    fire.cluster.wait_settled(other)


class Kind(msgspec.Struct, frozen=True, kw_only=True):
    """`act` is done; then what it took is given back: the node's `power`, its `replicas`, its `share`. `forgetful`: the
    server dies with its memory of answers. `dies`: the client that holds a lock dies at the same moment."""

    act: Act
    node: type[Node] = SpaceNode
    forgetful: bool = True
    power: bool = False
    replicas: bool = False
    share: bool = True
    standby: bool = True
    dies: bool = False


MOVE = Kind(act=_move, forgetful=False, share=False)
MANAGER = Kind(act=_kill_manager)
EVERYTHING = Kind(act=_kill_everything, replicas=True)
POWER = Kind(act=_cut_power, node=GuestNode, power=True, replicas=True)
POWER_COLD = Kind(act=_cut_power_cold, node=GuestNode, power=True, replicas=True, share=False, standby=False)
POWER_DEAD = msgspec.structs.replace(POWER, dies=True)
POWER_GONE = msgspec.structs.replace(POWER_DEAD, act=_cut_power_and_say_who_is_gone)


@contextmanager
def _burning(ground: Ground, kind: Kind, into: Measured) -> Iterator[Fire]:
    stalls = Stalls()
    cluster: Cluster[Any] = Cluster(ground.lab, into.row, kind=kind.node, options=ground.options, standby=kind.standby)
    try:
        with under_fire(cluster, ground.clients, stalls, ground.progress, kind.forgetful) as fire:
            fire.asking = True
            yield fire
        count_refused(fire.refused, into)
    finally:
        into.stall += [seconds for values in stalls.seen.values() for seconds in values]
        cluster.close()


def change(ground: Ground, rounds: int, into: Measured, *, kind: Kind) -> None:
    """There and back. Raises AssertionError, GuestError."""
    with _burning(ground, kind, into) as fire:
        for number, (serving, other) in zip(range(rounds), _turns(), strict=False):
            dying = ground.three if kind.dies else None
            with probes(*ground.clients, fire.here, fire.there, dying=dying, export=fire.cluster.export) as asked:
                with fire.fault(f"{into.row} {number + 1}/{rounds}", other):
                    asked.die()
                    began = time.time()
                    kind.act(ground, fire, serving, other)
                    asked.ask()
                asked.collect(began, into)
            _restore(fire, serving, other, power=kind.power, replicas=kind.replicas, share=kind.share)


def restart_manager(ground: Ground, rounds: int, into: Measured) -> None:
    """Without a standby, the node's own init system starts it again. Raises AssertionError, GuestError."""
    kind = msgspec.structs.replace(MANAGER, standby=False)
    with _burning(ground, kind, into) as fire:
        node = fire.cluster["a"]
        for number in range(rounds):
            with probes(*ground.clients, fire.here, fire.there) as asked:
                with fire.fault(f"{into.row} {number + 1}/{rounds}", "a"):
                    began = time.time()
                    node.kill("share-manager")
                    node.share.start()
                    asked.ask()
                asked.collect(began, into)
            fire.cluster.wait_settled("a")


def partition(ground: Ground, rounds: int, into: Measured) -> None:
    """The node that serves is cut off together with a client of its own, which goes on writing as long as it is
    answered: not one of its writes may be acknowledged once the other side serves, and each that was must be there in
    the end. Raises AssertionError, GuestError."""
    kind = Kind(act=_move)
    apart: list[tuple[float, float, appender.Outcome]] = []
    with _burning(ground, kind, into) as fire:
        ground.three.start()
        with mounted(ground.three, fire.cluster.export) as there:
            for number, (serving, other) in zip(range(rounds), _turns(), strict=False):
                node = fire.cluster[serving]
                log = f"{there}/apart-{number}"
                job = ground.three.spawn(appender.append, path=log)
                job.wait_event("running")
                with probes(*ground.clients, fire.here, fire.there) as asked:
                    try:
                        with fire.fault(f"{into.row} {number + 1}/{rounds}", other):
                            began = time.time()
                            ground.lab.cut_off(node.link, ground.three.link)
                            asked.ask()
                    finally:
                        ground.lab.join(node.link, ground.three.link)
                    joined = time.time()
                    assert node.share.wait_end() == FENCED
                    job.wait_event("progress", timeout=90, after=joined)
                    asked.collect(began, into)
                outcome = job.finish()
                assert outcome["errors"] == []
                assert ground.three.call(appender.verify, path=log, acknowledged=outcome["acknowledged"]) == []
                apart.append((began, joined, outcome))
                _restore(fire, serving, other, power=False, replicas=False, share=True)
        ground.three.close()
    both = [complaint for cut in apart for complaint in acknowledged_by_both(*cut, fire.gaps)]
    assert both == [], both


def acknowledged_by_both(began: float, joined: float, old: appender.Outcome, new_gaps: list[appender.Gap]) -> list[str]:
    """What is wrong with the silence of the side that was cut off from `began` to `joined`."""
    silent = [gap for gap in old["gaps"] if gap["start"] < joined and gap["end"] > began]
    stalled = [gap for gap in new_gaps if gap["start"] < joined and gap["end"] > began]
    if not silent or not stalled:
        return [f"nobody stood still after {began:.3f}"]
    # the last gap reaches to the end of the partition: before it every acknowledgement was the old side's
    last, first = max(silent, key=lambda gap: gap["end"]), max(stalled, key=lambda gap: gap["end"] - gap["start"])
    complaints = []
    if last["end"] < joined:
        complaints.append(f"the side that was cut off acknowledged a write at {last['end'] - began:.2f} s")
    if last["start"] >= first["end"]:
        complaints.append(
            f"the old side acknowledged at {last['start'] - began:.2f} s, the new one at {first['end'] - began:.2f} s"
        )
    return complaints


def _turns() -> Iterator[tuple[str, str]]:
    return itertools.cycle((("a", "b"), ("b", "a")))
