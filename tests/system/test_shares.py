"""What a share of several nodes has in common with `serve`: a network namespace of its own, and encryption."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Progress
from tests.lab import images
from tests.lab.guest import Guest, GuestError, Job
from tests.lab.mounts import mounted
from tests.lab.network import Lab
from tests.lab.nodes import ADDRESS, PROGRAM, Cluster, GuestNode, SpaceNode
from tests.lab.stalls import Stalls, worst_after
from tests.lab.workloads import appender, names, served
from tests.system.conftest import SHORT_GRACE

KEY = "/run/key"
WORD = "known plaintext 52c7d0aa"
# cheap to derive, since every takeover does
CHEAP = ("--luks-pbkdf-memory", "1Mi", "--luks-pbkdf-time", "100")


class OwnNode(SpaceNode):
    """Its share has a namespace of its own, on a bridge of the node."""

    def boot(self) -> None:
        super().boot()
        for words in ("link add br1 type bridge", "link set eth0 master br1", "address flush dev eth0"):
            self._ip(words)
        for words in (f"address add {self.address}/24 dev br1", "link set br1 up"):
            self._ip(words)

    def _ip(self, words: str) -> None:
        done = self.command("ip", *words.split())
        assert done.returncode == 0, done.stderr

    def share_argv(self) -> list[str]:
        own = ["--network", "own", "--address", f"{ADDRESS}/24", "--bridge", "br1"]
        return [PROGRAM, "share", self.cluster.volume, *self._common(), *own, "--standby", *self.cluster.options]


class VaultNode(GuestNode):
    """Serves an encrypted volume, for dm-crypt needs another kernel than the host's. The passphrase comes by stdin."""

    def wait_up(self) -> None:
        super().wait_up()
        self.guest.run("sh", "-c", f"printf %s the-passphrase >{KEY}")

    def share_argv(self) -> list[str]:
        words = " ".join([*super().share_argv(), "--passphrase-file", "-"])
        # exec: share-manager is what has to get the signals
        return ["sh", "-c", f"exec {words} <{KEY}"]


@contextlib.contextmanager
def serving(cluster: Cluster[Any], client: Guest, version: str = "4.2") -> Iterator[tuple[str, Job[appender.Outcome]]]:
    """A client that appends; at the end nothing is lost, doubled or seen as an error."""
    cluster.start()
    with mounted(client, cluster.export, version) as here:
        job = client.spawn(appender.append, path=f"{here}/log")
        job.wait_event("running")
        try:
            yield here, job
        except BaseException:
            print(job.events[-3:], client.kernel_log(), sep="\n")
            raise
        outcome = job.finish()
        assert outcome["errors"] == []
        assert client.call(appender.verify, path=f"{here}/log", acknowledged=outcome["acknowledged"]) == []
        assert "lost" not in client.kernel_log()


def flows_again(job: Job[appender.Outcome], cluster: Cluster[Any], then: str, began: float) -> None:
    """Wait for it, when node `then` serves anew."""
    cluster[then].share.wait_event("ready", after=began)
    job.wait_event("progress", timeout=90, after=time.time())
    cluster.wait_status(then, "running", lambda status: status["state"] == "running")


@pytest.fixture
def clusters() -> Iterator[list[Cluster[Any]]]:
    made: list[Cluster[Any]] = []
    yield made
    for cluster in made:
        cluster.close()


def test_a_share_in_a_namespace_of_its_own_changes_its_clients_and_its_node(
    lab: Lab, one: Guest, two: Guest, clusters: list[Cluster[Any]], stalls: Stalls
) -> None:
    cluster = Cluster(lab, "own", kind=OwnNode, options=SHORT_GRACE)
    clusters.append(cluster)
    with serving(cluster, one) as (_, job):
        a, b = cluster["a"], cluster["b"]
        # nothing of the share is in the node's own network
        assert ADDRESS not in a.command("ip", "address").stdout
        assert "share-manager" not in a.command("nft", "list", "tables").stdout
        assert [client["address"] for client in a.status()["clients"]] == [one.address]
        allow = (PROGRAM, "allow", cluster.volume, "--data-dir", str(a.data_dir))
        assert a.command(*allow, "--set", f"{one.address}/32").returncode == 0
        with pytest.raises(GuestError):
            two.run("mkdir", "-p", "/mnt/refused")
            mount = ("mount", "-t", "nfs", "-o", "vers=4.2,retry=0", cluster.export.source, "/mnt/refused")
            two.run("timeout", "-s", "KILL", "2", *mount)
        assert a.command(*allow, "--everyone").returncode == 0
        with mounted(two, cluster.export, "4.1") as there:
            two.call(names.write_text, path=f"{there}/file", text="two")
            began = time.time()
            cluster.move("b")
            flows_again(job, cluster, "b", began)
            assert two.call(names.read_text, path=f"{there}/file") == "two"
            killed = b.kill("share-manager")
            flows_again(job, cluster, "a", killed)
            assert two.call(names.read_text, path=f"{there}/file") == "two"
            b.share.start().wait_event("standby")
            cluster.wait_settled("a")
            cause = a.status()["node"]["last_failover"]["cause"]
            assert cause == f"the share manager of {b.name} died"
            ended = time.time()
    outcome = job.result()
    stalls.add("share manager killed (own namespace)", worst_after(outcome["gaps"], killed, ended))
    cluster.stop()


def test_an_encrypted_share_of_two_nodes(
    lab: Lab, one: Guest, clusters: list[Cluster[Any]], stalls: Stalls, progress: Progress
) -> None:
    """Its engine is killed where the kernel hands its requests to nobody; it moves; its node loses power."""
    cluster = Cluster(lab, "vault", kind=VaultNode, options=(*SHORT_GRACE, "--encrypt", *CHEAP))
    clusters.append(cluster)
    a, b = cluster["a"], cluster["b"]
    faults: list[tuple[str, float, float]] = []
    with serving(cluster, one) as (here, job):
        one.run("sh", "-c", f"yes '{WORD}' | head -c 1000000 >{here}/known && sync {here}/known")
        for _ in range(2):
            a.share.wait_event("spare_ready", after=faults[-1][1] if faults else 0.0)
            killed = time.time()
            a.guest.call(served.kill, pids=[a.status()["engine"]["pid"]])
            flows_again(job, cluster, "a", killed)
            faults.append(("engine killed (encrypted, in UML)", killed, time.time()))
        assert a.status()["encrypted"] is True
        # every node knows that it is encrypted, before it has anything of it
        assert b.share.stop() == 0
        bare = [word for word in GuestNode.share_argv(b) if word not in (*CHEAP, "--encrypt")]
        refused = b.command("env", "PYTHONDONTWRITEBYTECODE=1", *bare)
        assert (refused.returncode, "passphrase-file" in refused.stderr) == (4, True)
        assert len(refused.stderr.splitlines()) == 1
        b.share.start().wait_event("standby")
        began = time.time()
        cluster.move("b")
        flows_again(job, cluster, "b", began)
        faults.append(("planned move (encrypted, in UML)", began, time.time()))
        assert b.status()["encrypted"] is True
        cluster.wait_settled("b")
        cut = b.power_cut()
        flows_again(job, cluster, "a", cut)
        faults.append(("node's power cut (encrypted)", cut, time.time()))
        assert one.run("head", "-c", str(len(WORD)), f"{here}/known").stdout == WORD
        b.boot()
        b.wait_up()
        b.replicas.start().wait_event("ready")
        b.share.start().wait_event("standby")
        cluster.wait_settled("a")
    gaps = job.result()["gaps"]
    for kind, began, ended in faults:
        stalls.add(kind, worst_after(gaps, began, ended))
        progress(f"{kind}: {worst_after(gaps, began, ended):.2f} s")
    cluster.stop()
    with cluster.replica_directories() as directories:
        assert images.differences(directories) == []
        for directory in directories:
            assert images.words_in(images.head(directory), (WORD, "the-passphrase")) == []


def test_what_share_refuses(tmp_path: Path, lab: Lab) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"s" * 32)
    common = [PROGRAM, "share", "vol1", "--node", "a", "--records", "127.0.0.1:1", "--secret-file", str(secret)]
    for words, said in (
        (["--network", "own", "--address", "10.0.0.1/24"], "--bridge"),
        (["--network", "own", "--bridge", "br0"], "--address"),
        (["--network", "own", "--bridge", "br0", "--address", "10.0.0.1"], "--address"),
        (["--network", "own", "--bridge", "br0", "--address", "10.0.0.1/24", "--interface", "eth0"], "--interface"),
        (["--bridge", "br0"], "--network own"),
        (["--encrypt"], "--passphrase-file"),
        (["--passphrase-file", str(tmp_path / "none")], "none"),
    ):
        done = lab.run([*common, *words], cwd=Path("/"))
        assert (done.returncode, said in done.stderr, len(done.stderr.splitlines())) == (2, True, 1), done.stderr
