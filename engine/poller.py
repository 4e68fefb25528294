"""The task that a `Readiness` runs in."""

from __future__ import annotations

from collections.abc import Callable

import trio

from engine.readiness import Readiness


class Poller(Readiness):
    async def run(self, after: Callable[[], None]) -> None:
        """Until cancelled. `after` is called when all that was readable at a moment has been handled."""
        while True:
            await trio.lowlevel.wait_readable(self.fileno())
            if self.turn(after):
                # a turn of its own, or trio could run this task first in the turn that the others get
                await trio.lowlevel.checkpoint()
