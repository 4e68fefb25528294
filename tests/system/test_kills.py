"""Every part is killed under a workload that holds a lock, appends and syncs; nothing of it may be lost.

One client appends under its lock while the other tries to get that lock. After each kind of fault: no error at the
client, every acknowledged record in the file (seen from the other client, and in every replica afterwards), the lock
never to be had, and the replicas identical.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import pytest

from tests.conftest import Progress
from tests.lab import images
from tests.lab.guest import Guest, Job
from tests.lab.mounts import mounted
from tests.lab.share import Share, Status
from tests.lab.stalls import Stalls, worst_after
from tests.lab.workloads import appender, locks, pressure, sharedlog, tree
from tests.system.conftest import SHORT_GRACE, MakeShare

MIB = 1 << 20
# seconds to mend from which on the log should show what took them
SLOW = 6.0
REPLICAS = ("r1", "r2", "r3")
# other rounds and another --network for a longer run by command (docs/testing.md)
ROUNDS = int(os.environ.get("KILL_ROUNDS", "2"))
NETWORK = os.environ.get("KILL_NETWORK", "host")


@dataclass
class Fire:
    """A share with the workload on it, mounted `here` on the client that appends and `there` on the other. Faults are
    noted with their time, judged at the end."""

    share: Share
    job: Job[appender.Outcome]
    watch: Job[locks.Watched]
    progress: Progress
    here: str
    there: str
    faults: list[tuple[str, float, float]] = field(default_factory=list)
    asking: bool = False
    """As in `tests.system.test_nodes`."""

    @contextlib.contextmanager
    def fault(self, kind: str) -> Iterator[None]:
        """The block does harm and waits until the product says that it is mended; then records must flow again."""
        began = time.time()
        yield
        mended = time.time()
        self.job.wait_event("progress", timeout=90, after=mended)
        self.share.wait_settled()
        settled = time.time()
        self.faults.append((kind, began, settled))
        self.progress(f"{kind}: mended after {mended - began:.1f} s, settled after {settled - began:.1f} s")
        if mended - began > SLOW:
            for event in self.share.events:
                if event["time"] >= began:
                    self.progress(f"    {event['time'] - began:6.2f} s  {event['event']}: {event.get('message')}")

    def kill(self, kind: str, *names: str) -> Status:
        """Kill these parts at once; serve again if the share manager was one of them."""
        before = self.share.status().pids()
        with self.fault(kind):
            self.share.signal(names, signal.SIGKILL)
            if not self.share.serving:
                self.share.start()
            return self.share.wait_status(
                f"mended after the kill of {', '.join(names)}",
                lambda status: (
                    status.state == "running"
                    and all(status.pids().get(name) not in (None, before[name]) for name in names)
                ),
            )


@contextlib.contextmanager
def under_fire(
    share: Share, clients: tuple[Guest, Guest], stalls: Stalls, progress: Progress, versions: tuple[str, str]
) -> Iterator[Fire]:
    """Serve, mount on both clients, run the workload; at the end everything is checked, and the share is stopped."""
    one, two = clients
    share.start()
    with mounted(one, share.export, versions[0]) as here, mounted(two, share.export, versions[1]) as there:
        job = one.spawn(appender.append, path=f"{here}/log")
        job.wait_event("running")
        watch = two.spawn(locks.watch, path=f"{there}/log")
        watch.wait_event("watching")
        fire = Fire(share, job, watch, progress, here, there)
        assert {one.address, two.address} <= {client["address"] for client in share.status().clients}
        yield fire
        watched, outcome = watch.finish(), job.finish()
        for kind, began, settled in fire.faults:
            stalls.add(kind, worst_after(outcome["gaps"], began, settled))
        worst = max((gap["end"] - gap["start"] for gap in outcome["gaps"]), default=0.0)
        rate = outcome["acknowledged"] / outcome["seconds"]
        progress(
            f"{outcome['acknowledged']} records, {rate:.0f}/s, median {outcome['median_ms']} ms, worst {worst:.2f} s"
        )
        assert outcome["errors"] == []
        assert (watched["violations"], watched["errors"]) == ([], [])
        assert watched["denied"] > 0
        count = outcome["acknowledged"]
        assert two.call(appender.verify, path=f"{there}/log", acknowledged=count) == []
        # the other client says so of a lock that it was only asking for at that moment
        assert fire.asking or "lost" not in one.kernel_log()
    stop_and_compare(share, {"log": count})


def stop_and_compare(share: Share, logs: dict[str, int]) -> None:
    """Stop in order; then every replica holds the same, and every acknowledged record."""
    share.wait_settled()
    directories = share.replica_directories()
    share.stop()
    assert images.differences(directories) == []
    for directory in directories:
        for name, count in logs.items():
            content = images.read_ext4(images.head(directory), f"data/{name}")
            assert appender.verify_bytes(content, count) == []
    images.check_ext4(images.head(directories[0]))


StartFire = Callable[..., contextlib.AbstractContextManager[Fire]]


@pytest.fixture
def start_fire(
    make_share: MakeShare, one: Guest, two: Guest, stalls: Stalls, progress: Progress, request: pytest.FixtureRequest
) -> StartFire:
    def start(
        name: str, versions: tuple[str, str] = ("4.2", "4.1"), frontend: str = "device", network: str = NETWORK
    ) -> contextlib.AbstractContextManager[Fire]:
        share = make_share(name, options=(*SHORT_GRACE, "--frontend", frontend, "--network", network))
        return under_fire(share, (one, two), stalls, progress, versions)

    return start


def test_killing_ganesha(start_fire: StartFire) -> None:
    with start_fire("ganesha") as fire:
        for _ in range(ROUNDS):
            fire.kill("kill ganesha", "ganesha")


def test_killing_ganesha_behind_a_gate(start_fire: StartFire) -> None:
    """Not even the dying server's FIN gets out, so clients are back as soon as the next one is."""
    # a share that loses its server often is served again later and later, which is not what is measured
    for first in range(0, ROUNDS, 3):
        with start_fire(f"gate-{first}", network="here") as fire:
            for _ in range(min(3, ROUNDS - first)):
                fire.kill("kill ganesha (behind a gate)", "ganesha")


def test_killing_ganesha_again_before_its_clients_are_back(start_fire: StartFire) -> None:
    with start_fire("twice", ("4.1", "4.2")) as fire, fire.fault("kill ganesha, and the next one"):
        for _ in range(2):
            before = fire.share.status().pids()["ganesha"]
            os.kill(before, signal.SIGKILL)
            fire.share.wait_status("with a new ganesha", partial(is_another, "ganesha", before))


def is_another(name: str, pid: int, status: Status) -> bool:
    return status.state == "running" and status.pids().get(name) not in (None, pid)


def test_killing_each_replica_in_turn(start_fire: StartFire) -> None:
    with start_fire("replicas", ("4.1", "4.2")) as fire:
        epoch = fire.share.status().epoch
        for name in REPLICAS:
            fire.kill("kill a replica", name)
        # service went on: nothing was attached again
        assert fire.share.status().epoch == epoch


def test_killing_two_replicas_at_once(start_fire: StartFire) -> None:
    with start_fire("two-replicas") as fire:
        for names in (("r1", "r2"), ("r2", "r3")):
            fire.kill("kill two replicas", *names)


def test_killing_the_engine_which_is_replaced_in_place(start_fire: StartFire) -> None:
    with start_fire("engine") as fire:
        before = fire.share.status()
        for _ in range(3):
            fire.kill("kill the engine (replaced in place)", "engine")
        after = fire.share.status()
        assert (after.epoch, after.pids()["ganesha"]) == (before.epoch, before.pids()["ganesha"])


def test_killing_an_engine_that_cannot_be_replaced_in_place(start_fire: StartFire) -> None:
    """Attach, mount and export anew, in the order in which no client sees an error."""
    with start_fire("reattach", frontend="pyfuse3") as fire:
        epoch = fire.share.status().epoch
        for _ in range(ROUNDS):
            fire.kill("kill the engine (attached anew)", "engine")
        assert fire.share.status().epoch == epoch + ROUNDS


def test_killing_the_engine_while_the_share_comes_up(start_fire: StartFire) -> None:
    """It dies between mounting and exporting: whoever has to mend that must not be waiting on the volume itself."""
    with start_fire("early") as fire, fire.fault("kill share manager, then the new engine"):
        fire.share.signal(["share-manager"], signal.SIGKILL)
        fire.share.spawn()
        fire.share.wait_event("mounted")
        os.kill(fire.share.engine(), signal.SIGKILL)
        if not fire.share.comes_up():
            fire.share.start()


def test_killing_the_share_manager(start_fire: StartFire) -> None:
    with start_fire("manager", ("4.1", "4.2")) as fire:
        for _ in range(2):
            fire.kill("kill the share manager", "share-manager")


def test_killing_share_manager_and_engine(start_fire: StartFire) -> None:
    with start_fire("both") as fire:
        for _ in range(2):
            fire.kill("kill share manager and engine", "share-manager", "engine")


def test_killing_everything_at_once(start_fire: StartFire) -> None:
    with start_fire("all") as fire:
        for _ in range(ROUNDS):
            fire.kill("kill everything", "share-manager", "engine", "ganesha", *REPLICAS)


def is_out(name: str, status: Status) -> bool:
    return status.replica(name).state != "in_sync"


def test_a_replica_that_hangs_leaves_and_comes_back(start_fire: StartFire) -> None:
    with start_fire("hang") as fire:
        for name in ("r2", "r1"):
            pid = fire.share.status().pids()[name]
            try:
                with fire.fault("a replica hangs"):
                    os.kill(pid, signal.SIGSTOP)
                    fire.share.wait_status(f"without {name}", partial(is_out, name))
                    # the others go on before it wakes up
                    fire.job.wait_event("progress", timeout=60, after=time.time())
                    os.kill(pid, signal.SIGCONT)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)


def test_bulk_writes_across_kills_of_everything_in_turn(
    make_share: MakeShare, one: Guest, two: Guest, progress: Progress
) -> None:
    """Full pipes at every kill: replicas that miss much, and differ in what was under way."""
    share = make_share("bulk", size="512Mi", options=SHORT_GRACE).start()
    with mounted(one, share.export) as here, mounted(two, share.export, "4.1") as there:
        for number, names in enumerate((("r2",), ("r1",), ("engine",), ("r3", "engine"), ("ganesha",))):
            before = share.status().pids()
            stored = share.stored()
            large = one.spawn(tree.write_large, path=f"{here}/large-{number}", seed=number, size=48 * MIB)
            small = two.spawn(tree.write, directory=f"{there}/tree-{number}", seed=number, files=30, largest=400_000)
            share.wait_stored(stored + 3 * 8 * MIB)
            under_way = not large.done
            for name in names:
                os.kill(before[name], signal.SIGKILL)
            for name in names:
                share.wait_status("mended", partial(is_another, name, before[name]))
            digest, digests = large.result(), small.result()
            two.call(tree.drop_caches)
            assert two.call(tree.digest, path=f"{there}/large-{number}") == digest, names
            assert one.call(tree.verify, directory=f"{here}/tree-{number}", digests=digests) == [], names
            share.wait_settled()
            kind = f"bulk writes, kill of {' and '.join(names)}"
            progress(f"{kind}: all there, the large file was {'under way' if under_way else 'written already'}")
    stop_and_compare(share, {})


@pytest.mark.parametrize(
    ("victims", "frontend"),
    [
        (("engine",), "pyfuse3"),
        (("engine",), "device"),
        (("ganesha",), "device"),
        (("share-manager", "engine"), "device"),
    ],
    ids=lambda value: value if isinstance(value, str) else " and ".join(value),
)
def test_unstable_writes_survive(
    make_share: MakeShare, one: Guest, two: Guest, victims: tuple[str, ...], frontend: str
) -> None:
    """Written, answered, not committed; then the fault, then fsync.

    A new ganesha has another write verifier, so the client sends everything again. Only an engine that is replaced
    under a ganesha that stays needs none of that: the server's page cache is still there.
    """
    size = 6 * MIB
    share = make_share(f"unstable-{victims[0]}", options=(*SHORT_GRACE, "--frontend", frontend)).start()
    with mounted(one, share.export, "4.2", "write=eager") as here, mounted(two, share.export) as there:
        before = share.status().pids()
        job = one.spawn(pressure.unstable, path=f"{here}/unstable", mountpoint=here, seed=77, size=size)
        job.wait_event("pushed")
        for name in victims:
            os.kill(before[name], signal.SIGKILL)
        if "share-manager" in victims:
            share.wait_end()
            share.start()
        for name in victims:
            share.wait_status("mended", partial(is_another, name, before[name]))
        counted = job.finish()
        sent = counted["pushed"]["WRITE"] - counted["before"]["WRITE"]
        assert sent >= size // MIB
        replaced = victims == ("engine",) and frontend == "device"
        assert (share.status().pids()["ganesha"] == before["ganesha"]) is replaced
        if not replaced:
            assert counted["after"]["WRITE"] >= counted["pushed"]["WRITE"] + sent
        assert counted["after"]["COMMIT"] > counted["pushed"]["COMMIT"]
        two.call(tree.drop_caches)
        assert two.call(tree.digest, path=f"{there}/unstable") == pressure.expected_digest(77, size)
    stop_and_compare(share, {})


@pytest.mark.parametrize("victim", ["ganesha", "engine"])
def test_three_writers_share_a_log_across_a_kill(
    make_share: MakeShare, one: Guest, two: Guest, progress: Progress, victim: str
) -> None:
    share = make_share(f"log-{victim}", options=SHORT_GRACE).start()
    with mounted(one, share.export) as here, mounted(two, share.export, "4.1") as there:
        jobs = {
            writer: guest.spawn(sharedlog.write, path=f"{place}/log", writer=writer, count=0, pause=0.02)
            for writer, guest, place in (("pod-a", one, here), ("pod-b", one, here), ("pod-c", two, there))
        }
        for job in jobs.values():
            job.wait_event("writing")
        before = share.status().pids()[victim]
        share.signal([victim], signal.SIGKILL)
        share.wait_status("mended", partial(is_another, victim, before))
        share.wait_settled()
        written = {}
        for job in jobs.values():
            job.stop()
        for writer, job in jobs.items():
            outcome = job.result()
            assert outcome["errors"] == [], writer
            written[writer] = outcome["lines"]
        progress(f"shared log across a kill of {victim}: {written}")
        assert two.call(sharedlog.verify, path=f"{there}/log", written=written) == []
        assert one.call(sharedlog.verify, path=f"{here}/log", written=written) == []
    stop_and_compare(share, {})
