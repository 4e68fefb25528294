"""The commands of several nodes, all on this machine: what they make, say and refuse."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.share_manager.conftest import Running, run_command, runtime_directories

pytestmark = pytest.mark.system

Start = Callable[..., Running]


def free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def common(start: Start, place: Path) -> list[str]:
    """Options that lead to a record server."""
    secret = str(place / "secret")
    server = start(
        "records", "serve", "--listen", "127.0.0.1:0", "--secret-file", secret, "--data-dir", f"{place}/kept"
    )
    address = server.wait_event("ready")["address"].removeprefix("tcp:")
    assert Path(secret).stat().st_mode & 0o777 == 0o600
    return ["--records", address, "--secret-file", secret]


def test_a_volume_on_two_nodes_is_made_served_moved_and_stopped(start: Start, common: list[str], place: Path) -> None:
    volume = f"nodes-{os.getpid()}"
    ports = free_ports(4)
    placed = [f"{node}=127.0.0.1:{port}" for node, port in zip("ab", ports, strict=False)]
    made = run_command("records", "create", volume, "--size", "128Mi", "--replica", *placed, *common)
    assert made.returncode == 0, made.stderr
    data = {node: ["--node", node, "--data-dir", str(place / node)] for node in "ab"}
    hosts = {node: start("replica", "serve", *data[node], *common) for node in "ab"}
    for host in hosts.values():
        host.wait_event("replica_started")
    shares = {}
    for node, port in zip("ab", ports[2:], strict=True):
        shares[node] = start("share", volume, "--standby", "--port", str(port), *data[node], *common)
        shares[node].wait_event("ready" if node == "a" else "standby")

    # without --standby there is nothing for a third process to do
    late = run_command("share", volume, "--node", "c", "--data-dir", str(place / "c"), "--port", str(ports[3]), *common)
    assert (late.returncode, "is served on node a" in late.stderr) == (4, True), late.stderr
    nobody = run_command("move", volume, "--to", "c", *common)
    assert (nobody.returncode, "does not stand by" in nobody.stderr) == (2, True), nobody.stderr

    moved = run_command("move", volume, "--to", "b", *common, "--output", "json")
    assert moved.returncode == 0, moved.stderr
    told = json.loads(moved.stdout.splitlines()[-1])
    taken = shares["b"].wait_event("took_over")
    assert (told["event"], told["failover"], taken["cause"]) == ("moved", taken["failover"], "move")
    status = json.loads(run_command("status", volume, "--data-dir", str(place / "b"), "--output", "json").stdout)
    assert (status["state"], status["kind"], status["epoch"]) == ("running", "share", 2)
    assert status["node"]["last_failover"]["id"] == told["failover"]
    assert {"attach", "mount", "export"} <= set(status["phases"])
    shown = json.loads(run_command("records", "show", volume, *common, "--output", "json").stdout)
    assert {one["node"]: one["status"]["state"] for one in shown["processes"]}.keys() >= {"a", "b"}
    served = run_command("records", "gone", volume, "--client", "worker-3", *common)
    assert (served.returncode, "is served on node b" in served.stderr) == (2, True)
    refused = run_command("records", "delete", volume, *common)
    assert (refused.returncode, "is served on node b" in refused.stderr) == (2, True)

    # one that is killed leaves its replicas running, and the next one finds them
    hosts["a"].stop(signal.SIGKILL)
    hosts["a"] = start("replica", "serve", *data["a"], *common)
    hosts["a"].wait_event("replica_found")

    for node in "ab":  # who stands by first
        assert shares[node].stop() == (0, "")
    for host in hosts.values():
        assert host.stop() == (0, "")
    assert runtime_directories(volume) == []
    # the one that was moved away from had shut its door
    tables = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout
    assert volume.replace("-", "_") not in tables
    stopped = run_command("status", volume, "--data-dir", str(place / "a"), "--output", "json")
    assert json.loads(stopped.stdout)["state"] == "stopped"
    assert run_command("records", "gone", volume, "--client", "worker-3", *common).returncode == 0
    assert run_command("records", "delete", volume, *common).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("records", "serve", "--listen", "nowhere", "--secret-file", "/x"), "--listen 'nowhere': write HOST:PORT"),
        (("records", "create", "v", "--replica", "a"), "--replica '': write HOST:PORT"),
        (("records", "create", "v", "--replica", "a=127.0.0.1:1", "a=127.0.0.1:2"), "lost together"),
        (("share", "v", "--node", "a", "--address", "192.0.2.1/24"), "--address needs --interface"),
        (("move", "v", "--to", "B"), "--to 'B'"),
        (("agent", "--volume", "v"), "write VOLUME=ADDRESS:PORT"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(arguments: tuple[str, ...], complaint: str) -> None:
    more = [] if "serve" in arguments else ["--records", "127.0.0.1:1", "--secret-file", "/nowhere"]
    done = run_command(*arguments, *more)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert complaint in done.stderr


def test_a_record_server_that_is_not_there_is_named(place: Path, common: list[str]) -> None:
    (port,) = free_ports(1)
    gone = ["--records", f"127.0.0.1:{port}", *common[2:]]
    done = run_command("records", "list", *gone)
    assert done.returncode == 1
    assert f"the record server tcp:127.0.0.1:{port} is away" in done.stderr
