"""Changes of node that meet something else: a client that is away, a snapshot, a replica that is behind, a full volume,
another crash; with clients on both sides of a lock who count together."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from tests.conftest import Progress
from tests.lab.guest import Guest, Job
from tests.lab.mounts import mount, mounted
from tests.lab.network import Lab
from tests.lab.nodes import PROGRAM, Cluster, SpaceNode
from tests.lab.stalls import Stalls
from tests.lab.workloads import appender, locks, names, pressure, tree
from tests.system.conftest import SHORT_GRACE
from tests.system.test_nodes import Fire, under_fire

MIB = 1 << 20
# so that a failover takes less than a lease, and a grace period has room for a second crash
LONGER_GRACE = ("--lease-lifetime", "30", "--grace-period", "40")


@pytest.fixture
def three(lab: Lab) -> Iterator[Guest]:
    guest = Guest(lab, "three").start()
    yield guest
    guest.close()


@dataclass
class Counted:
    total: int = 0


@contextlib.contextmanager
def counting(fire: Fire, one: Guest, two: Guest) -> Iterator[Counted]:
    """Both clients count in one file, each time under the lock of it: not one addition is lost or done twice."""
    counted = Counted()
    fire.asking = True
    jobs: list[Job[locks.Added]] = [
        guest.spawn(locks.add, path=f"{place}/counter") for guest, place in ((one, fire.here), (two, fire.there))
    ]
    for job in jobs:
        job.wait_event("adding", 60)
    yield counted
    for job in jobs:
        job.stop()
    outcomes = [job.result() for job in jobs]
    fire.progress(f"counted {[outcome['added'] for outcome in outcomes]}")
    assert [outcome["errors"] for outcome in outcomes] == [[], []]
    # a client that was refused a lock asks again after up to 30 s
    assert all(outcome["added"] > 2 for outcome in outcomes)
    counted.total = sum(outcome["added"] for outcome in outcomes)
    assert int(two.call(names.read_text, path=f"{fire.there}/counter")) == counted.total


def snapshot(cluster: Cluster[Any], node: str, name: str) -> int:
    argv = [PROGRAM, "snapshot", "create", cluster.volume, name, "--data-dir", str(cluster[node].data_dir)]
    done: subprocess.CompletedProcess[str] = cluster[node].command(*argv)
    if done.returncode != 0:
        assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.returncode


def snapshots(cluster: Cluster[Any], node: str) -> str:
    argv = [PROGRAM, "snapshot", "list", cluster.volume, "--data-dir", str(cluster[node].data_dir)]
    done: subprocess.CompletedProcess[str] = cluster[node].command(*argv, "--output", "json")
    assert done.returncode == 0, done.stderr
    return done.stdout


def is_not_in_sync(replica: str, status: dict[str, Any]) -> bool:
    return any(one["name"] == replica and one["state"] != "in_sync" for one in status["replicas"])


def test_moves_during_a_snapshot_and_to_a_replica_that_is_behind_with_a_client_that_is_away(
    lab: Lab, one: Guest, two: Guest, three: Guest, stalls: Stalls, progress: Progress
) -> None:
    cluster: Cluster[Any] = Cluster(lab, "meets", kind=SpaceNode, options=LONGER_GRACE)
    try:
        with (
            under_fire(cluster, (one, two), stalls, progress, forgetful=False) as fire,
            counting(fire, one, two),
            mounted(three, cluster.export, "4.1") as third,
        ):
            away = three.spawn(appender.append, path=f"{third}/away")
            away.wait_event("running")

            # one client does not notice that the share moves, until it is over
            taken: list[int] = []
            taker = threading.Thread(target=lambda: taken.append(snapshot(cluster, "a", "meanwhile")))
            three.pause()
            with fire.fault("planned move, during a snapshot", "b"):
                taker.start()
                cluster.move("b")
                taker.join()
            three.resume()
            away.wait_event("progress", 60, after=time.time())
            # it was taken, or refused in one line
            assert ("meanwhile" in snapshots(cluster, "b")) is (taken == [0])

            # the node that takes over has a replica that misses much
            pid = cluster["a"].replica_pid()
            os.kill(pid, signal.SIGSTOP)
            try:
                cluster.wait_status("b", "without r1", partial(is_not_in_sync, "r1"))
                digest = two.call(tree.write_large, path=f"{fire.there}/large", seed=3, size=48 * MIB)
                began = time.time()
                os.kill(pid, signal.SIGCONT)
                cluster["b"].share.wait_event("replica_resyncing", after=began)
                # in the middle of it
                os.kill(pid, signal.SIGSTOP)
                assert is_not_in_sync("r1", cluster["b"].status())
                with fire.fault("planned move, to a replica that is behind", "a"):
                    cluster.move("a")
            finally:
                os.kill(pid, signal.SIGCONT)
            cluster["a"].share.wait_event("replica_in_sync", after=began)
            two.call(tree.drop_caches)
            assert two.call(tree.digest, path=f"{fire.there}/large") == digest

            with fire.fault("planned move, back", "b"):
                cluster.move("b")
            outcome = away.finish()
            assert outcome["errors"] == []
            assert two.call(appender.verify, path=f"{fire.there}/away", acknowledged=outcome["acknowledged"]) == []
            assert "lost" not in three.kernel_log()
    finally:
        cluster.close()


def test_a_second_crash_during_grace_and_a_client_that_is_gone(
    lab: Lab, one: Guest, two: Guest, three: Guest, stalls: Stalls, progress: Progress
) -> None:
    nodes = ("a", "b", "c")
    cluster: Cluster[Any] = Cluster(lab, "again", nodes, kind=SpaceNode, options=LONGER_GRACE)
    try:
        with under_fire(cluster, (one, two), stalls, progress, forgetful=True) as fire, counting(fire, one, two):
            place = mount(three, cluster.export, "4.1")
            holder = three.spawn(locks.hold, path=f"{place}/held")
            holder.wait_event("held")
            # it does not notice the first crash at all, so that grace lasts until the second
            three.pause()
            cluster["a"].kill_all()
            first = cluster.wait_serving("b", "c")
            (second,) = {"b", "c"} - {first}
            assert cluster[first].status()["in_grace"] is True
            with fire.fault("the next one dies during grace", second):
                cluster[first].kill("share-manager")
            three.resume()
            cluster["a"].replicas.start().wait_event("ready")
            cluster[first].share.start().wait_event("standby")
            cluster.wait_settled(second)
            assert two.call(locks.probe, path=f"{fire.there}/held") == {"getlk": True, "setlk": True}
            assert "lost" not in three.kernel_log()

            waiter = two.spawn(locks.hold, path=f"{fire.there}/held")
            waiter.wait_event("asking")
            with fire.fault("a client dies with the node, and is said to be gone", first):
                three.power_cut()
                cluster[second].kill_all()
                cluster.command("records", "gone", cluster.volume, "--client", three.hostname)
            said = cluster[first].share.wait_event("clients_forgotten")
            assert said["clients"] == [f"Linux NFSv4.1 {three.hostname}"]
            served = time.time()
            cluster.wait_status(first, "without grace", lambda status: status["in_grace"] is False)
            # nobody waited for more than the next look at who is back
            assert time.time() - served < 20
            waiter.wait_event("held", 60)
            waiter.finish()
            cluster[second].replicas.start().wait_event("ready")
            for name in ("a", second):
                cluster[name].share.start().wait_event("standby")
    finally:
        cluster.close()


def test_a_volume_filled_by_root_takes_a_new_client_a_lock_and_a_failover(
    lab: Lab, one: Guest, two: Guest, progress: Progress
) -> None:
    cluster: Cluster[Any] = Cluster(lab, "filled", kind=SpaceNode, options=SHORT_GRACE, size="128Mi")
    a, b = cluster["a"], cluster["b"]
    try:
        cluster.start()
        with mounted(one, cluster.export) as here:
            one.call(names.write_text, path=f"{here}/kept", text="kept")
            filled = one.call(pressure.fill, path=f"{here}/filler", most=256 * MIB)
            assert filled["errno"] == "ENOSPC"
            with mounted(two, cluster.export, "4.1") as there:
                holder = two.spawn(locks.hold, path=f"{there}/kept")
                holder.wait_event("held")
                began = time.time()
                a.kill_all()
                b.share.wait_event("ready", after=began)
                assert one.call(locks.probe, path=f"{here}/kept") == {"getlk": True, "setlk": True}
                cluster.wait_status("b", "without grace", lambda status: status["in_grace"] is False)
                assert one.call(locks.probe, path=f"{here}/kept") == {"getlk": True, "setlk": True}
                holder.finish()
                assert "lost" not in two.kernel_log()
                assert two.call(names.read_text, path=f"{there}/kept") == "kept"
                one.run("rm", f"{here}/filler")
                one.call(names.write_text, path=f"{here}/kept", text="room again")
                assert two.call(names.read_text, path=f"{there}/kept") == "room again"
        a.replicas.start().wait_event("ready")
        a.share.start().wait_event("standby")
        cluster.wait_settled("b")
        cluster.stop()
    finally:
        cluster.close()
