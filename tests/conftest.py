"""The lab of the system tests: one network namespace and two clients for the whole session.

What a test or the session leaves behind on the machine is listed, removed, and makes the run fail.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType

import pytest

from tests.lab import leftovers
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

STALLS = pytest.StashKey[Stalls]()
STARTED = time.monotonic()

Progress = Callable[[str], None]


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STALLS] = Stalls()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    stalls = config.stash[STALLS]
    if stalls.seen:
        terminalreporter.section("stalls at the client")
        for row in stalls.table():
            terminalreporter.write_line(row)


@pytest.fixture(scope="session")
def progress(pytestconfig: pytest.Config) -> Progress:
    """Prints a line that shows even when output is captured."""
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")

    def write(line: str) -> None:
        with capture.global_and_fixture_disabled():
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
    for directory in leftovers.abandoned():
        progress(f"lab: removing {directory}, whose session was killed")
        leftovers.remove(directory, leftovers.mark_of(directory))
        shutil.rmtree(directory, ignore_errors=True)
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
    for job in guest.jobs - jobs:
        job.kill()
    for place in guest.mounts - places:
        drop(guest, place)
