"""The right to serve: for how long the volume's clients may be answered from what this engine's users know.

Writes need no such right, for replicas refuse those of an engine that was replaced. But an answer from a cache, or a
lock that is granted, does not pass a replica. So the engine asks all replicas, again and again, to confirm its token;
`Right` says until when that makes it sure that nobody else serves. The one that comes next learns from the answers to
its OPEN how long ago an older epoch was confirmed (`engine.replica.right`), and waits until that cannot count any more.

Invariant: for every replica that the record may name, the last confirmation that it remembers is at most `lasts`
seconds before `until`. It holds for one that was just opened, because OPEN counts, and what was granted while that
was under way is covered by the FLUSH that ends every resynchronisation, which counts too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import trio

from engine.client import RightNews
from engine.errors import EngineError, FencedError

if TYPE_CHECKING:
    from engine.controller.connection import ReplicaConnection
    from engine.controller.driver import Controller


class Right:
    """Pure. Times are seconds of one monotonic clock; replicas are bits, as in the core.

    `until`: nobody else serves before. `older_at`: an older epoch was confirmed then, or earlier; None if none counts.
    """

    def __init__(self, lasts: float, patience: float) -> None:
        self.lasts = lasts
        self.until = -math.inf
        self.older_at: float | None = None
        self._patience = patience
        self._confirmed: dict[int, float] = {}
        self._met: dict[int, float] = {}

    def heard(self, age: float | None, now: float) -> None:
        """A member's answer to OPEN, which says how long ago it confirmed an older epoch."""
        if age is not None:
            self.older_at = max(now - age, -math.inf if self.older_at is None else self.older_at)

    def met(self, bit: int, now: float) -> None:
        """A connection to replica `bit` is new: it can be late from now on."""
        self._met[bit] = now

    def confirmed(self, bit: int, asked: float) -> None:
        """What replica `bit` was asked at `asked` it has confirmed."""
        self._confirmed[bit] = max(asked, self._confirmed.get(bit, -math.inf))

    def extend(self, required: int) -> bool:
        """Judge by what all replicas of the mask have confirmed; whether that made a difference."""
        confirmed = [self._confirmed.get(bit, -math.inf) for bit in _bits(required)]
        until = min(confirmed, default=-math.inf) + self.lasts
        if until <= self.until:
            return False
        self.until = until
        return True

    def laggards(self, connected: int, in_sync: int) -> list[tuple[int, float]]:
        """Who is so far behind a replica in sync that it would cost the right, and by how much: never all of these."""
        best = max((self._last(bit) for bit in _bits(connected & in_sync)), default=-math.inf)
        behind = [(bit, best - self._last(bit)) for bit in _bits(connected)]
        return [(bit, seconds) for bit, seconds in behind if seconds > self._patience]

    def _last(self, bit: int) -> float:
        return max(self._confirmed.get(bit, -math.inf), self._met.get(bit, -math.inf))


def _bits(mask: int) -> Iterator[int]:
    while mask:
        bit = mask & -mask
        yield bit
        mask &= ~bit


class RightKeeper:
    """Renews the right of one controller, and tells whoever watches."""

    def __init__(self, controller: Controller, lasts: float) -> None:
        """With `lasts` 0 nobody is asked and nothing is granted."""
        # who hangs is out, and that recorded, before the right would end: a half, two rounds, and time for the record
        self.right = Right(lasts, patience=lasts / 2)
        # the attachment ends with this engine, unless it makes way for a successor
        self.kept = False
        self._controller = controller
        self._asking: set[ReplicaConnection] = set()
        self._known: set[ReplicaConnection] = set()
        self.changed = trio.Event()

    @property
    def wanted(self) -> bool:
        return self.right.lasts > 0

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            while self.wanted:
                connected = self._controller.connected(-1)
                for connection in connected:
                    if connection not in self._known:
                        self.right.met(connection.bit, time.monotonic())
                    if connection not in self._asking:
                        self._asking.add(connection)
                        nursery.start_soon(self._ask, connection)
                self._known = set(connected)
                mask = sum(connection.bit for connection in connected)
                for bit, behind in self.right.laggards(mask, self._controller.core.in_sync):
                    self._drop(bit, behind)
                self._judge()
                await trio.sleep(self.right.lasts / 10)

    async def _ask(self, connection: ReplicaConnection) -> None:
        asked = time.monotonic()
        try:
            await connection.confirm()
        except FencedError as error:
            self._controller.fenced(error)
            return
        except EngineError as error:
            self._controller.lose(connection, str(error))
            return
        finally:
            self._asking.discard(connection)
        self.right.confirmed(connection.bit, asked)
        self._judge()

    def _judge(self) -> None:
        core = self._controller.core
        required = core.recorded_set | core.leaving
        for other in self._controller.connected(-1):
            required |= other.bit
        if self.right.extend(required):
            self.changed.set()
            self.changed = trio.Event()

    def _drop(self, bit: int, behind: float) -> None:
        for connection in self._controller.connected(bit):
            self._controller.lose(connection, f"did not confirm the right to serve for {behind:.1f} s")

    def news(self) -> RightNews:
        """What is known now; `changed` is set, and replaced, when that is not so any more."""
        return RightNews(until=max(0.0, self.right.until), older_at=self.right.older_at)
