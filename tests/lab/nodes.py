"""Several nodes with a record server and one volume on all of them: network namespaces of this machine, or guests.

Each node has an address on the lab's bridge, a data directory, a replica host and a share. Namespaces have one kernel
and are quick; guests have a kernel and a disk of their own, so their power can be cut.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, cast

import msgspec

from tests.lab import leftovers
from tests.lab.guest import Guest, GuestError, Job
from tests.lab.mounts import Export
from tests.lab.network import SUBNET, Lab
from tests.lab.program import Program, ProgramFailedError
from tests.lab.workloads import daemon

PROGRAM = str(Path(sys.executable).with_name("share-manager"))
RECORDS = f"{SUBNET}.1:7420"
ADDRESS = f"{SUBNET}.200"
REPLICA_PORT = 7500
GUEST_DATA = "/run/data"
GUEST_DISK = 768 << 20

_numbers = itertools.count(101)
N = TypeVar("N", bound="Node")


class Running(Protocol):
    """A command of the product that runs on a node: `Program` on this machine, `GuestProgram` in a guest."""

    name: str

    @property
    def running(self) -> bool: ...

    @property
    def events(self) -> list[dict[str, Any]]:
        """Of its last run."""

    def start(self) -> Running: ...

    def wait_event(self, name: str, budget: float = 60.0, after: float = 0.0) -> dict[str, Any]: ...

    def stop(self, budget: float = 60.0) -> int: ...

    def said(self) -> str: ...


class GuestProgram:
    """What `start` runs is a workload of the guest."""

    def __init__(self, name: str, guest: Guest, argv: list[str]) -> None:
        self.name = name
        self._guest = guest
        self._argv = argv
        self._job: Job[int] | None = None

    @property
    def running(self) -> bool:
        return self._job is not None and self._job in self._guest.jobs and not self._job.done

    @property
    def events(self) -> list[dict[str, Any]]:
        return self._job.events if self._job is not None else []

    def start(self) -> GuestProgram:
        self._job = self._guest.spawn(daemon.run, argv=self._argv, log=f"{GUEST_DATA}/{self.name}.stderr")
        return self

    def wait_event(self, name: str, budget: float = 60.0, after: float = 0.0) -> dict[str, Any]:
        assert self._job is not None
        try:
            return self._job.wait_event(name, budget, after)
        except (GuestError, TimeoutError) as error:
            raise ProgramFailedError(f"{self.name}: no event {name!r}: {error}\n{self.said()}") from error

    def stop(self, budget: float = 60.0) -> int:
        assert self._job is not None
        return self._job.finish(budget)

    def said(self) -> str:
        return "\n".join(map(str, self._job.events[-25:])) if self._job is not None else ""


class Node:
    """One of them. `close` leaves nothing of it."""

    interface = "eth0"
    network = "here"
    share: Running
    replicas: Running

    def __init__(self, cluster: Cluster[Any], name: str) -> None:
        self.cluster = cluster
        self.name = f"{name}{cluster.lab.mark}"
        self.place = cluster.place / name

    @property
    def address(self) -> str:
        raise NotImplementedError

    @property
    def link(self) -> str:
        """Its end of the lab's network."""
        raise NotImplementedError

    @property
    def data_dir(self) -> Path:
        """As the node knows it."""
        raise NotImplementedError

    def boot(self) -> None:
        """Begin to, without waiting for it."""

    def wait_up(self) -> None:
        """After `boot`."""

    def command(self, *argv: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Another program on it."""
        raise NotImplementedError

    @contextlib.contextmanager
    def at_rest(self) -> Iterator[Path]:
        """Its data directory as this machine sees it, when nothing runs on it any more."""
        yield self.data_dir

    def close(self) -> None: ...

    def replica_argv(self) -> list[str]:
        return [PROGRAM, "replica", "serve", *self._common()]

    def share_argv(self) -> list[str]:
        address = ["--address", f"{ADDRESS}/24", "--interface", self.interface]
        rest = [
            *(["--standby"] if self.cluster.standby else []),
            "--network",
            self.cluster.network or self.network,
            *self.cluster.options,
        ]
        return [PROGRAM, "share", self.cluster.volume, *self._common(), *address, *rest]

    def _common(self) -> list[str]:
        return [*self.cluster.common, "--node", self.name, "--data-dir", str(self.data_dir), "--output", "json"]

    def status(self) -> dict[str, Any]:
        argv = [PROGRAM, "status", self.cluster.volume, "--data-dir", str(self.data_dir), "--output", "json"]
        done = self.command(*argv)
        if done.returncode != 0:
            raise ProgramFailedError(f"{self.name}: status says {done.returncode}: {done.stderr}")
        return cast(dict[str, Any], msgspec.json.decode(done.stdout))


class GuestNode(Node):
    """A guest whose data directory is a disk of its own. Its power can be cut and it can be booted again."""

    interface = "vec0"
    # its kernel's nf_tables have no family inet
    network = "host"

    def __init__(self, cluster: Cluster[Any], name: str) -> None:
        super().__init__(cluster, name)
        self.place.mkdir(parents=True)
        self.disk = self.place / "disk.img"
        with self.disk.open("wb") as image:
            image.truncate(GUEST_DISK)
        _run("mkfs.ext4", "-q", "-E", "lazy_itable_init=1,nodiscard", str(self.disk))
        self.guest = Guest(cluster.lab, f"{name}-{cluster.volume}"[:20], memory="512M", disks=[self.disk])
        self.replicas = GuestProgram(f"replicas of {self.name}", self.guest, self.replica_argv())
        self.share = GuestProgram(f"share of {self.name}", self.guest, self.share_argv())

    @property
    def address(self) -> str:
        return self.guest.address

    @property
    def link(self) -> str:
        return self.guest.link

    @property
    def data_dir(self) -> Path:
        return Path(GUEST_DATA)

    def boot(self) -> None:
        self.guest.boot()

    def wait_up(self) -> None:
        self.guest.wait_up()
        self.guest.run("mkdir", "-p", GUEST_DATA)
        self.guest.run("mount", "-t", "ext4", "/dev/ubda", GUEST_DATA)
        self.guest.run("modprobe", "--all", "fuse", "loop", "nf_tables")

    def command(self, *argv: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
        return self.guest.run("env", "PYTHONDONTWRITEBYTECODE=1", *argv, timeout=timeout, check=False)

    def power_cut(self) -> float:
        """When."""
        now = time.time()
        self.guest.power_cut()
        return now

    @contextlib.contextmanager
    def at_rest(self) -> Iterator[Path]:
        self.guest.run("umount", GUEST_DATA)
        self.guest.power_cut()
        place = self.place / "mnt"
        place.mkdir(exist_ok=True)
        _run("mount", "-o", "loop,ro", str(self.disk), str(place))
        try:
            yield place
        finally:
            _run("umount", str(place))

    def close(self) -> None:
        for program in (self.share, self.replicas):
            print(f"{program.name}: {program.said()}")
        print(self.guest.console()[-2000:])
        self.guest.close()


class SpaceNode(Node):
    """A network namespace."""

    share: Program
    replicas: Program
    link = ""

    def __init__(self, cluster: Cluster[Any], name: str) -> None:
        super().__init__(cluster, name)
        number = next(_numbers)
        self._address = f"{SUBNET}.{number}"
        self._namespace = f"{cluster.lab.namespace}-{name}"
        self.link = f"{name}{number}"
        self.replicas = self._program("replicas", self.replica_argv())
        self.share = self._program("share", self.share_argv())

    @property
    def address(self) -> str:
        return self._address

    @property
    def data_dir(self) -> Path:
        return self.place / "data"

    def boot(self) -> None:
        self.place.mkdir(parents=True, exist_ok=True)
        lab = self.cluster.lab.namespace
        inside = ("ip", "-n", self._namespace)
        _run("ip", "netns", "add", self._namespace)
        _run(
            "ip", "-n", lab, "link", "add", self.link, "type", "veth", "peer", "name", "eth0", "netns", self._namespace
        )
        _run("ip", "-n", lab, "link", "set", self.link, "master", "br0", "up")
        _run(*inside, "link", "set", "lo", "up")
        _run(*inside, "address", "add", f"{self.address}/24", "dev", "eth0")
        _run(*inside, "link", "set", "eth0", "up")

    def command(self, *argv: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Another program in its namespace."""
        return subprocess.run(
            ["nsenter", f"--net=/run/netns/{self._namespace}", "--", *argv],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd="/",
            check=False,
        )

    def kill(self, *names: str) -> float:
        """SIGKILL parts of the share (share-manager, engine, ganesha), all at once; when."""
        status = self.status()
        pids = {"share-manager": self.share.pid, **{name: status[name]["pid"] for name in ("engine", "ganesha")}}
        now = time.time()
        for name in names:
            os.kill(pids[name], signal.SIGKILL)
        if "share-manager" in names:
            self.share.wait_end()
        return now

    def freeze(self) -> list[int]:
        """SIGSTOP all of the share, not the replicas; who that was."""
        status = self.status()
        pids = [self.share.pid, *(status[name]["pid"] for name in ("engine", "ganesha"))]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        return pids

    def thaw(self, pids: list[int]) -> None:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)

    def kill_all(self) -> float:
        """SIGKILL everything that runs on it; when."""
        now = time.time()
        for process in leftovers.processes(self.place):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process.name), signal.SIGKILL)
        for program in (self.share, self.replicas):
            program.wait_end()
        return now

    def replica_pid(self) -> int:
        """Of the replica server that it hosts."""
        (found,) = [process for process in leftovers.processes(self.place) if " -m engine.replica " in process.detail]
        return int(found.name)

    def cut_records(self) -> None:
        """No packet to or from the record server."""
        self._nft("add table inet lab; add chain inet lab out { type filter hook output priority 0; }")
        host, _, port = RECORDS.rpartition(":")
        self._nft(f"add rule inet lab out ip daddr {host} tcp dport {port} drop")

    def join_records(self) -> None:
        self._nft("delete table inet lab")

    def _nft(self, commands: str) -> None:
        done = self.command("nft", commands)
        assert done.returncode == 0, done.stderr

    def _program(self, what: str, argv: list[str]) -> Program:
        def start(argv: list[str], errors: Any) -> subprocess.Popen[bytes]:
            return subprocess.Popen(
                ["nsenter", f"--net=/run/netns/{self._namespace}", "--", *argv],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=self.cluster.lab.environment({leftovers.TOKEN: str(self.place)}),
                cwd="/",
                start_new_session=True,
            )

        return Program(f"{what} of {self.name}", argv, self.place / f"{what}-stderr", start)

    def close(self) -> None:
        for program in (self.share, self.replicas):
            print(f"{program.name}: {program.said()}")
            if program.running:
                with contextlib.suppress(ProgramFailedError):
                    program.stop()
        leftovers.remove(self.place, self.cluster.volume)
        for program in (self.share, self.replicas):
            if program.running:
                program.kill()
        if Path("/run/netns", self._namespace).exists():
            # the namespace itself goes later, when its last socket does
            _run("ip", "-n", self.cluster.lab.namespace, "link", "delete", self.link)
            _run("ip", "netns", "delete", self._namespace)


class Cluster(Generic[N]):
    """A volume with a replica on each node, served by one of them. `close` says what it had to remove."""

    def __init__(
        self,
        lab: Lab,
        name: str,
        nodes: Sequence[str] = ("a", "b"),
        *,
        kind: Callable[[Cluster[N], str], N],
        size: str = "256Mi",
        options: Sequence[str] = (),
        standby: bool = True,
        network: str = "",
    ) -> None:
        """`standby`: the nodes that do not serve stand by, else nothing of the share runs on them. `network`: of shares
        on nodes of several kinds, for a client must have one address everywhere; else what the kind can do."""
        self.lab = lab
        self.standby = standby
        self.network = network
        self.volume = f"{name}{lab.mark}"
        self.place = lab.directory / f"nodes-{name}"
        self.options = tuple(options)
        self.size = size
        self.export = Export(ADDRESS, 2049, f"/{self.volume}")
        self.secret = self.place / "secret"
        self.common = ["--records", RECORDS, "--secret-file", str(self.secret)]
        self.place.mkdir()
        listen = ["--listen", RECORDS, "--secret-file", str(self.secret), "--data-dir", str(self.place / "records")]
        argv = [PROGRAM, "records", "serve", *listen, "--output", "json"]
        self.records = Program("records", argv, self.place / "records-stderr", self._start)
        self.nodes = {name: kind(self, name) for name in nodes}

    def __getitem__(self, name: str) -> N:
        return self.nodes[name]

    def _start(self, argv: list[str], errors: Any) -> subprocess.Popen[bytes]:
        environment = {leftovers.TOKEN: str(self.place)}
        return self.lab.popen(argv, stdout=subprocess.PIPE, stderr=errors, env=environment, cwd=Path("/"))

    def start(self) -> Cluster[N]:
        """Everything; the first node serves."""
        self.records.start().wait_event("ready")
        placed = [f"{node.name}={node.address}:{REPLICA_PORT}" for node in self.nodes.values()]
        self.command("records", "create", self.volume, "--size", self.size, "--replica", *placed)
        first, *others = self.nodes.values()
        for node in self.nodes.values():
            node.boot()
        for node in self.nodes.values():
            node.wait_up()
            node.replicas.start()
        for node in self.nodes.values():
            node.replicas.wait_event("replica_started")
        first.share.start().wait_event("ready")
        for node in others if self.standby else ():
            node.share.start()
        for node in others if self.standby else ():
            node.share.wait_event("standby")
        return self

    def serving(self, *among: str) -> str:
        """Which of them. Raises ProgramFailedError when none does."""
        for name in among or self.nodes:
            if self[name].share.running and self[name].status()["state"] == "running":
                return name
        raise ProgramFailedError(f"nobody serves {self.volume}")

    def wait_serving(self, *among: str, budget: float = 60.0) -> str:
        """Which of them does. Raises ProgramFailedError."""
        end = time.monotonic() + budget
        while True:
            try:
                return self.serving(*among)
            except ProgramFailedError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)

    def command(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """Raises ProgramFailedError."""
        done = self.lab.run([PROGRAM, *argv, *self.common], cwd=Path("/"))
        if done.returncode != 0:
            raise ProgramFailedError(f"{' '.join(argv)}: {done.returncode}: {done.stdout}{done.stderr}")
        return done

    def move(self, to: str) -> None:
        self.command("move", self.volume, "--to", self[to].name)

    def wait_status(self, node: str, what: str, fits: Callable[[dict[str, Any]], bool], budget: float = 60.0) -> None:
        """Raises ProgramFailedError."""
        end = time.monotonic() + budget
        while True:
            status = self[node].status()
            if fits(status):
                return
            if time.monotonic() > end:
                raise ProgramFailedError(f"{node}: never {what}\n{status}\n{self[node].share.said()}")
            time.sleep(0.3)

    def wait_settled(self, node: str, budget: float = 90.0) -> None:
        """This one serves, all replicas are in sync, no grace period."""
        self.wait_status(node, "settled", settled, budget)

    @contextlib.contextmanager
    def replica_directories(self) -> Iterator[list[Path]]:
        """When all of it is stopped."""
        with contextlib.ExitStack() as stack:
            places = [stack.enter_context(node.at_rest()) for node in self.nodes.values()]
            yield [place / "replicas" / self.volume / f"r{number}" for number, place in enumerate(places, 1)]

    def stop(self) -> None:
        """All of it, in order; every part has to leave with status 0. Raises ProgramFailedError."""
        # who stands by first, or it would take over
        for node in self.nodes.values():
            if node.share.running and node.status()["state"] == "standby":
                _left(node.share)
        shares = [node.share for node in self.nodes.values()]
        for program in (*shares, *(node.replicas for node in self.nodes.values()), self.records):
            if program.running:
                _left(program)

    def close(self) -> None:
        for node in self.nodes.values():
            node.close()
        if self.records.running:
            self.records.stop()
        leftovers.remove(self.place, self.volume)
        shutil.rmtree(self.place, ignore_errors=True)


def settled(status: dict[str, Any]) -> bool:
    in_sync = all(replica["state"] == "in_sync" for replica in status["replicas"])
    return status["state"] == "running" and in_sync and status["in_grace"] is False


def _left(program: Running) -> None:
    code = program.stop()
    if code != 0:
        raise ProgramFailedError(f"{program.name} left with status {code}\n{program.said()}")


def _run(*argv: str) -> None:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip()}")
