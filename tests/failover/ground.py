"""What rows are run on: a lab, its clients, and the options of the shares."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.conftest import Progress
from tests.failover.measure import Measured
from tests.lab import leftovers
from tests.lab.guest import Guest
from tests.lab.network import Lab


@dataclass
class Ground:
    """`one` and `two` run; `three` is booted by whoever needs it."""

    lab: Lab
    one: Guest
    two: Guest
    three: Guest
    options: tuple[str, ...]
    progress: Progress

    @property
    def clients(self) -> tuple[Guest, Guest]:
        return self.one, self.two


def count_refused(errors: list[dict[str, Any]], into: Measured) -> None:
    into.refused = dict(Counter(into.refused) + Counter(str(error["operation"]) for error in errors))


@contextlib.contextmanager
def ground(options: tuple[str, ...], progress: Progress) -> Iterator[Ground]:
    """Raises AssertionError when something of it is left on the machine afterwards."""
    leftovers.remove_abandoned()
    lab = Lab()
    try:
        with lab:
            made = Ground(lab, Guest(lab, "one"), Guest(lab, "two"), Guest(lab, "three"), options, progress)
            try:
                for guest in made.clients:
                    guest.boot()
                for guest in made.clients:
                    guest.wait_up()
                yield made
            finally:
                for guest in (made.one, made.two, made.three):
                    guest.close()
        left = lab.left()
    finally:
        lab.discard()
    assert not left, "left behind: " + ", ".join(map(str, left))
