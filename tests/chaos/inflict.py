"""Faults on a field for a time, in two lanes, so that some meet what others have just broken."""

from __future__ import annotations

import time
from collections.abc import Sequence
from random import Random

import trio

from tests.chaos.faults import Fault, Kind, schedule
from tests.chaos.field import Field, Tell
from tests.chaos.report import Happened

_CALM = 30.0


class Inflictor:
    """`faults` so far; `missed` were aimed at what was not there."""

    def __init__(self, field: Field, seed: int, kinds: Sequence[Kind], tell: Tell, pace: float = 1.0) -> None:
        """`pace` divides the pauses between faults."""
        self.faults: list[Happened] = []
        self.missed = 0
        self._field = field
        self._seed = seed
        self._kinds = kinds
        self._tell = tell
        self._pace = pace

    async def run(self, seconds: float) -> None:
        """Returns when everything that was done is undone; what it broke may still be broken."""
        with trio.move_on_after(seconds):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._lane, "main", 0.3, 3.0, 0.5)
                nursery.start_soon(self._lane, "beside", 8.0, 20.0, 0.0)

    async def _lane(self, name: str, least: float, most: float, calm: float) -> None:
        """One fault after the other, `least` to `most` seconds apart; before a `calm` share of them all is mended."""
        seed = f"{self._seed} {name}"
        rng = Random(seed)
        for kind, fault in schedule(seed, self._kinds, self._field.names):
            await trio.sleep(rng.uniform(least, most) / self._pace)
            if rng.random() < calm:
                await self._field.wait_whole(_CALM)
            await self._inject(kind, fault)

    async def _inject(self, kind: Kind, fault: Fault) -> None:
        length = f" for {fault.seconds:.1f} s" if fault.seconds else ""
        self._tell(f"FAULT {fault.kind} {' '.join(fault.targets)}".rstrip() + length)
        happened = Happened(kind=fault.kind, targets=fault.targets, start=time.monotonic(), end=0.0)
        hit = True
        try:
            hit = await kind.inject(self._field, fault)
        finally:
            happened.end = time.monotonic()
            if hit:
                self.faults.append(happened)
            else:
                self.missed += 1
