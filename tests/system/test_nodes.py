"""A share that moves between nodes, under a kernel client that holds a lock, appends and syncs.

The nodes are network namespaces: what a node's death takes from the page cache is tested with guests. After each change
of node: no error at the client, every acknowledged record in the file, the lock never to be had by another client, and
the replicas identical.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.conftest import Progress
from tests.lab import images
from tests.lab.guest import Guest, Job
from tests.lab.mounts import mounted
from tests.lab.network import Lab
from tests.lab.nodes import Cluster, GuestNode, Node, SpaceNode
from tests.lab.stalls import Stalls, worst_after
from tests.lab.workloads import appender, locks, names, once
from tests.system.conftest import SHORT_GRACE

FENCED = 4


@dataclass
class Fire:
    """A volume on several nodes with the workload on it, mounted `here` on the client that appends and `there` on the
    other. Changes of node are noted with their time. What the clients did is known at the end: `records`
    appended, with `gaps`, and `rounds` of names, with those that were `refused`."""

    cluster: Cluster[Any]
    job: Job[appender.Outcome]
    names: Job[once.Outcome]
    progress: Progress
    here: str
    there: str
    faults: list[tuple[str, float, float]] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)
    gaps: list[appender.Gap] = field(default_factory=list)
    records: int = 0
    rounds: int = 0
    asking: bool = False
    """The appending client asks for other locks, or gives them back, while there is no server: its kernel counts these
    as lost. Had it lost the one that it holds, its next write would fail."""

    @contextlib.contextmanager
    def fault(self, kind: str, then: str) -> Iterator[None]:
        """The block makes node `then` serve; records must flow again."""
        began = time.time()
        yield
        self.cluster[then].share.wait_event("ready", after=began)
        mended = time.time()
        self.job.wait_event("progress", timeout=90, after=mended)
        self.cluster.wait_status(then, "running", lambda status: status["state"] == "running")
        self.faults.append((kind, began, time.time()))
        last = self.cluster[then].status()["node"]["last_failover"]
        assert last["after"] == self.cluster[then].name
        self.progress(f"{kind}: served after {mended - began:.2f} s, by itself {last['duration']} s ({last['cause']})")


@contextlib.contextmanager
def under_fire(
    cluster: Cluster[Any], clients: tuple[Guest, Guest], stalls: Stalls, progress: Progress, forgetful: bool
) -> Iterator[Fire]:
    """Serve, mount, run the workload; at the end everything is checked, and all nodes are stopped. `forgetful`: a
    server dies with its memory of answers, so a name may be refused that was made."""
    one, two = clients
    cluster.start()
    with mounted(one, cluster.export) as here, mounted(two, cluster.export, "4.1") as there:
        job = one.spawn(appender.append, path=f"{here}/log")
        names = two.spawn(once.names, directory=f"{there}/names", pause=0.02)
        job.wait_event("running")
        names.wait_event("running")
        watch = two.spawn(locks.watch, path=f"{there}/log")
        watch.wait_event("watching")
        # on a busy machine one may have left already, and its node could not take over
        cluster.wait_settled(cluster.serving())
        fire = Fire(cluster, job, names, progress, here, there)
        try:
            yield fire
        except BaseException:
            # shown with the failure
            print(job.events[-3:], names.events[-3:], one.kernel_log(), two.kernel_log(), sep="\n")
            raise
        watched, outcome, named = watch.finish(), job.finish(), names.finish()
        for kind, began, mended in fire.faults:
            stalls.add(kind, worst_after(outcome["gaps"], began, mended))
        progress(f"{outcome['acknowledged']} records, stalls {[_seconds(gap) for gap in outcome['gaps']]}")
        progress(f"{named['rounds']} rounds of names, refused: {named['errors']}")
        fire.records, fire.gaps = outcome["acknowledged"], outcome["gaps"]
        fire.rounds, fire.refused = named["rounds"], named["errors"]
        assert outcome["errors"] == []
        assert (watched["violations"], watched["errors"]) == ([], [])
        assert watched["denied"] > 0
        if forgetful:
            assert {error["errno"] for error in named["errors"]} <= {errno.EEXIST, errno.ENOENT}
        else:
            assert named["errors"] == []
        count = outcome["acknowledged"]
        assert two.call(appender.verify, path=f"{there}/log", acknowledged=count) == []
        said = one.last_words()
        assert fire.asking or "lost" not in said, (time.time(), fire.faults)
        one.kernel_log()
    cluster.wait_settled(cluster.serving())
    cluster.stop()
    with cluster.replica_directories() as directories:
        assert images.differences(directories) == []
        if "--encrypt" in cluster.options:
            for directory in directories:
                assert images.words_in(images.head(directory), [appender.record("record", 0)[:17].decode()]) == []
            return
        contents = [images.content(directory, cluster.place / directory.name) for directory in directories]
        for image in contents:
            assert appender.verify_bytes(images.read_ext4(image, "data/log"), count) == []
        images.check_ext4(contents[0])


def _seconds(gap: appender.Gap) -> float:
    return round(gap["end"] - gap["start"], 2)


StartFire = Callable[..., contextlib.AbstractContextManager[Fire]]


@pytest.fixture
def start_fire(lab: Lab, one: Guest, two: Guest, stalls: Stalls, progress: Progress) -> Iterator[StartFire]:
    made: list[Cluster[Any]] = []

    def start(
        name: str, *, forgetful: bool, kind: type[Node] = SpaceNode, options: tuple[str, ...] = ()
    ) -> contextlib.AbstractContextManager[Fire]:
        made.append(Cluster(lab, name, kind=kind, options=(*SHORT_GRACE, *options)))
        return under_fire(made[-1], (one, two), stalls, progress, forgetful)

    yield start
    for cluster in made:
        cluster.close()


def test_moving_there_and_back_and_a_record_server_that_is_away(start_fire: StartFire) -> None:
    """Not one name is refused: what is under way is answered before the server stops. A record server that is away
    moves nothing, and stops nothing."""
    with start_fire("move", forgetful=False) as fire:
        cluster = fire.cluster
        with fire.fault("planned move", "b"):
            cluster.move("b")
        moved = cluster["b"].status()
        # the former holder gave its right up, so nothing was waited for
        assert moved["right_held"] is True
        assert moved["phases"]["right to serve"] < 2
        epoch = moved["epoch"]
        cluster.records.kill()
        time.sleep(6)
        status = cluster["b"].status()
        assert (status["state"], status["node"]["records"]) == ("running", False)
        cluster.records.start().wait_event("ready")
        cluster.wait_status("b", "back at the record server", lambda status: status["node"]["records"] is True)
        # then only the node that serves cannot reach it: the others can, and hear from that node itself that it serves
        cluster["b"].cut_records()
        cluster.wait_status("b", "cut off", lambda status: status["node"]["records"] is False)
        time.sleep(5)
        cluster["b"].join_records()
        cluster.wait_status("b", "back at the record server", lambda status: status["node"]["records"] is True)
        assert cluster["b"].status()["epoch"] == epoch
        with fire.fault("planned move", "a"):
            cluster.move("a")


def test_killing_a_share_manager_then_everything_then_stopping_all_of_it(start_fire: StartFire) -> None:
    with start_fire("kill", forgetful=True) as fire:
        a, b = fire.cluster["a"], fire.cluster["b"]
        with fire.fault("kill the share manager, standby takes over", "b"):
            a.kill("share-manager")
        a.share.start().wait_event("standby")
        with fire.fault("kill everything on a node", "a"):
            b.kill_all()
        b.replicas.start().wait_event("ready")
        b.share.start().wait_event("standby")
        fire.cluster.wait_settled("a")
        with fire.fault("stop everything of a share (SIGSTOP)", "b"):
            frozen = a.freeze()
        # it wakes up, believes that it serves, and is refused by the replicas
        a.thaw(frozen)
        assert a.share.wait_end() == FENCED
        assert "10.99.0.200" not in a.command("ip", "address").stdout
        a.share.start().wait_event("standby")
        fire.cluster.wait_settled("b")


ENCRYPTED = (
    *("--encrypt", "--passphrase-file", "/run/passphrase"),
    # cheap to derive
    *("--luks-pbkdf-memory", "1Mi", "--luks-pbkdf-time", "100"),
)


class VaultNode(GuestNode):
    """It has a passphrase. On the second node something else has the first loop devices and the first mapping, so the
    share's have other numbers there."""

    def wait_up(self) -> None:
        super().wait_up()
        self.guest.run("sh", "-c", "printf %s the-passphrase >/run/passphrase; modprobe -a dm-mod dm-crypt")
        if self.name.startswith("b"):
            other = "for i in 1 2 3; do truncate -s 1M /run/other-$i; losetup -f /run/other-$i; done"
            self.guest.run("sh", "-c", f"{other}; dmsetup create other --table '0 2048 linear /dev/loop0 0'")

    def minors(self) -> tuple[str, str]:
        """Of the share's loop device and of its mapping."""
        status = self.status()
        mappings = dict(line.split() for line in self.guest.run("dmsetup", "ls").stdout.splitlines())
        (mapping,) = [minor for name, minor in mappings.items() if name.startswith("sm-")]
        return status["device"], mapping


def test_cutting_the_power_of_the_node_that_serves(start_fire: StartFire, one: Guest, two: Guest) -> None:
    """Encrypted. What was acknowledged is on the other node; when the first one is back it is given what it missed. A
    new client's first name and first lock, a moment old, are there, too; and handles do not depend on the numbers of
    devices."""
    with start_fire("power", forgetful=True, kind=VaultNode, options=ENCRYPTED) as fire:
        cluster = fire.cluster
        # another version is another client to the server
        with mounted(one, cluster.export, "4.0") as fresh:
            before = cluster["a"].minors()
            held = one.spawn(locks.rename_and_hold, old=f"{fresh}/old-name", new=f"{fresh}/new-name")
            with fire.fault("node's power cut, standby takes over", "b"):
                held.wait_event("held")
                cluster["a"].power_cut()
            after = cluster["b"].minors()
            assert all(one != other for one, other in zip(before, after, strict=True)), (before, after)
            # also when grace is over and whoever has not reclaimed has lost
            cluster.wait_status("b", "without grace", lambda status: status["in_grace"] is False)
            assert two.call(locks.probe, path=f"{fire.there}/new-name") == {"getlk": True, "setlk": True}
            assert two.call(names.attempts, operations=[("read", f"{fire.there}/old-name")]) == [errno.ENOENT]
            held.finish()
        node = cluster["a"]
        node.boot()
        node.wait_up()
        node.replicas.start().wait_event("ready")
        node.share.start().wait_event("standby")
        cluster.wait_settled("b")
