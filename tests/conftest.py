"""The lab of the system tests: one network namespace and two clients for the whole session.

What a test or the session leaves behind on the machine is listed, removed, and makes the run fail.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

from share_manager.kube.client import Client
from tests.lab import leftovers
from tests.lab.control_plane import ControlPlane
from tests.lab.guest import Guest
from tests.lab.mounts import drop
from tests.lab.network import Lab
from tests.lab.stalls import Stalls

PROGRAMS = {
    "linux.uml": "user-mode-linux",
    "modprobe": "kmod",
    "mount.nfs": "nfs-common",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
    "ganesha.nfsd": "nfs-ganesha",
    "mkfs.ext4": "e2fsprogs",
    "debugfs": "e2fsprogs",
    "mkfs.xfs": "xfsprogs",
    "losetup": "mount",
}

# how long an example takes says how busy the machine is
settings.register_profile("shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared machine")

# long files whose tests share nothing but the session's lab: the workers may share them
SINGLY = frozenset(
    f"tests/system/test_{name}.py" for name in ("failovers", "gate", "kills", "nodes", "options", "shares")
)

STALLS = pytest.StashKey[Stalls]()
STARTED = time.monotonic()

Progress = Callable[[str], None]


def outdated() -> list[str]:
    """Modules whose compiled form (see setup.py) is older than their source."""
    return [
        str(source)
        for binary in Path("engine").rglob("*.so")
        if (source := binary.with_name(binary.name.split(".")[0] + ".py")).exists()
        and source.stat().st_mtime > binary.stat().st_mtime
    ]


def pytest_configure(config: pytest.Config) -> None:
    old = outdated()
    if old:
        pytest.exit(f"compiled before it was changed: {', '.join(old)}; run make setup-test", returncode=4)
    config.stash[STALLS] = Stalls()
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Workers(config.stash[STALLS]))


class _Workers:
    """Collects what the workers saw."""

    def __init__(self, stalls: Stalls) -> None:
        self._stalls = stalls

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        for kind, values in getattr(node, "workeroutput", {}).get("stalls", {}).items():
            for seconds in values:
                self._stalls.add(kind, seconds)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # a run that is ended from outside prints no summary
        if report.failed:
            print(f"\n{time.monotonic() - STARTED:7.1f}s  {report.when} failed: {report.nodeid}", flush=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["stalls"] = session.config.stash[STALLS].seen


class _FromBothEnds(LoadFileScheduling):  # type: ignore[misc]
    """One worker takes what is first, the others what is last: two workers with guests starve each other on two cores,
    and what takes longest is not left to the end."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return nodeid if file in SINGLY else file

    def _assign_work_unit(self, node: WorkerController) -> None:
        if self.workqueue and node is not self.nodes[0]:
            self.workqueue.move_to_end(next(reversed(self.workqueue)), last=False)
        super()._assign_work_unit(node)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> _FromBothEnds | None:
    if config.getoption("dist") != "loadfile":
        return None
    config.option.loadscopereorder = False
    return _FromBothEnds(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # the tests with guests first
    items.sort(key=lambda item: "lab" not in getattr(item, "fixturenames", ()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    stalls = config.stash[STALLS]
    if stalls.seen:
        terminalreporter.section("stalls at the client")
        for row in stalls.table():
            terminalreporter.write_line(row)


@pytest.fixture(scope="session")
def progress(pytestconfig: pytest.Config) -> Progress:
    """Prints a line that shows even when output is captured. A worker's are shown with what fails."""
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    alone = not hasattr(pytestconfig, "workerinput")

    def write(line: str) -> None:
        with capture.global_and_fixture_disabled() if alone else contextlib.nullcontext():
            print(f"\n{time.monotonic() - STARTED:7.1f}s  {line}", end="", flush=True)

    return write


@pytest.fixture(scope="session")
def stalls(pytestconfig: pytest.Config) -> Stalls:
    return pytestconfig.stash[STALLS]


@pytest.fixture(scope="session")
def lab(progress: Progress) -> Iterator[Lab]:
    if os.geteuid() != 0:
        pytest.skip("system tests need root")
    missing = {
        f"{program} (package {package})" for program, package in PROGRAMS.items() if shutil.which(program) is None
    }
    if missing:
        pytest.fail(f"system tests need {', '.join(sorted(missing))}")
    leftovers.remove_abandoned(progress)
    before = signal.signal(signal.SIGTERM, _interrupt)
    lab = Lab()
    try:
        with lab:
            yield lab
        left = lab.left()
    finally:
        lab.discard()
        signal.signal(signal.SIGTERM, before)
    if left:
        pytest.fail("the session left behind:\n" + "\n".join(map(str, left)))


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(f"signal {number}")


@pytest.fixture(scope="session")
def control_plane() -> Iterator[ControlPlane]:
    """A real Kubernetes API server, with our custom resources, for the whole session."""
    with ControlPlane() as plane:
        yield plane


@pytest.fixture
def kube_namespace(control_plane: ControlPlane) -> str:
    """A namespace that no other test uses. It is left as it is: all goes with the control plane."""
    return control_plane.new_namespace()


@pytest.fixture
async def kube(control_plane: ControlPlane, kube_namespace: str) -> AsyncIterator[Client]:
    """The administrator's client, in a namespace of its own."""
    async with Client(control_plane.admin, namespace=kube_namespace) as client:
        yield client


@pytest.fixture(scope="session")
def clients(lab: Lab, progress: Progress) -> Iterator[tuple[Guest, Guest]]:
    """Two clients, booted side by side."""
    guests = Guest(lab, "one"), Guest(lab, "two")
    began = time.monotonic()
    try:
        for guest in guests:
            guest.boot()
        for guest in guests:
            guest.wait_up()
        progress(f"lab: two clients up after {time.monotonic() - began:.1f} s")
        yield guests
    finally:
        for guest in guests:
            guest.close()


@pytest.fixture
def one(clients: tuple[Guest, Guest]) -> Iterator[Guest]:
    yield from _ready(clients[0])


@pytest.fixture
def two(clients: tuple[Guest, Guest]) -> Iterator[Guest]:
    yield from _ready(clients[1])


def _ready(guest: Guest) -> Iterator[Guest]:
    """A guest that runs, and runs nothing of the test any more when the test is over."""
    if not guest.alive:
        guest.start()
    guest.kernel_log()
    jobs, places = set(guest.jobs), set(guest.mounts)
    yield guest
    # shown with what fails
    print(f"{guest.name} at {time.time():.1f}: {guest.last_words()}")
    for job in guest.jobs - jobs:
        job.kill()
    for place in guest.mounts - places:
        drop(guest, place)
