"""What clients ask of a server that has just started, besides going on with what they have."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

from tests.failover.measure import Measured
from tests.lab.guest import Guest, Job
from tests.lab.mounts import Export, mount
from tests.lab.workloads import grants, locks

PATIENCE = 200.0

_numbers = itertools.count(1)


class Probes:
    """Of one round: `ask` right after the fault, `collect` when it is mended."""

    def __init__(self, holder: Guest, asking: Guest, here: str, there: str, *, dies: bool) -> None:
        self._number = next(_numbers)
        self._holder = holder
        self._asking = asking
        self._there = there
        self._dies = dies
        self._held: Job[float] | None = holder.spawn(locks.hold, path=f"{here}/contended-{self._number}")
        self._held.wait_event("held", 60)
        self._jobs: tuple[Job[float], Job[float]] | None = None

    def die(self) -> None:
        """The holder's machine, when it is to."""
        if self._dies:
            self._holder.power_cut()
            self._held = None

    def ask(self) -> None:
        if self._held is not None:
            # given back while there is no server
            self._held.stop()
        self._jobs = (
            self._asking.spawn(grants.opened, path=f"{self._there}/new-{self._number}"),
            self._asking.spawn(grants.locked, path=f"{self._there}/contended-{self._number}"),
        )

    def collect(self, began: float, into: Measured) -> None:
        assert self._jobs is not None
        opened, locked = (job.result(PATIENCE) for job in self._jobs)
        into.opened.append(opened - began)
        into.locked.append(locked - began)
        if self._held is not None:
            self._held.result()


@contextlib.contextmanager
def probes(
    one: Guest, two: Guest, here: str, there: str, *, dying: Guest | None = None, export: Export | None = None
) -> Iterator[Probes]:
    """`dying` is a third client, which mounts `export`, holds the lock and dies with the fault; else `one` holds it."""
    if dying is None:
        yield Probes(one, two, here, there, dies=False)
        return
    assert export is not None
    dying.start()
    try:
        yield Probes(dying, two, mount(dying, export), there, dies=True)
    finally:
        dying.close()
