"""Rows on one machine: a part of a share is killed, and its share manager mends that."""

from __future__ import annotations

import signal
import time
from functools import partial

from tests.failover.ground import Ground
from tests.failover.measure import Measured
from tests.failover.probes import probes
from tests.lab.share import Share
from tests.lab.stalls import Stalls
from tests.system.test_kills import is_another, under_fire

# a share that loses its server often waits longer and longer before the next one, which is not what is measured
_ROUNDS_OF_ONE = 3


def kill(ground: Ground, rounds: int, into: Measured, *, victim: str, dies: bool = False) -> None:
    """Raises AssertionError, GuestError."""
    for first in range(0, rounds, _ROUNDS_OF_ONE):
        share = Share(ground.lab, f"{into.row}-{first}", options=(*ground.options, "--network", "here"))
        stalls = Stalls()
        try:
            with under_fire(share, ground.clients, stalls, ground.progress, ("4.2", "4.1")) as fire:
                fire.asking = True
                for number in range(first, min(first + _ROUNDS_OF_ONE, rounds)):
                    dying = ground.three if dies else None
                    with probes(*ground.clients, fire.here, fire.there, dying=dying, export=share.export) as asked:
                        before = share.status().pids()[victim]
                        with fire.fault(f"{into.row} {number + 1}/{rounds}"):
                            asked.die()
                            began = time.time()
                            share.signal([victim], signal.SIGKILL)
                            asked.ask()
                            share.wait_status(f"with a new {victim}", partial(is_another, victim, before))
                        asked.collect(began, into)
        finally:
            into.stall += [seconds for values in stalls.seen.values() for seconds in values]
            share.close()
