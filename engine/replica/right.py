"""When this replica last told an engine, by an answer, that it had seen no higher token. Pure: the caller has a clock.

An engine's right to serve lasts as long as all in-sync replicas have confirmed its epoch lately; so whoever comes
after it has to know when each of them did that last. OPEN, FLUSH and CONFIRM are such answers.
"""

from __future__ import annotations


class Confirmations:
    def __init__(self, now: float, epoch: int, *, closed: bool) -> None:
        """A process that has just started, of a replica that has seen `epoch`. What an earlier process confirmed is
        not known, but that was before `now`; `closed` when the last attachment ended in order, and needs no more."""
        self._epoch = epoch
        self._last: float | None = None
        self._older: float | None = None if closed else now

    def opened(self, epoch: int, now: float) -> None:
        """By an engine of `epoch`, which is not below any that was seen before."""
        if epoch > self._epoch and self._last is not None:
            self._older = self._last
        self._epoch, self._last = epoch, now

    def confirmed(self, now: float) -> None:
        """To the engine that opened last. Times may come in any order."""
        self._last = now if self._last is None else max(self._last, now)

    def closed(self) -> None:
        """That engine left in order: nobody serves by its epoch any more."""
        self._last = None

    def age(self, now: float) -> float | None:
        """Seconds since any epoch below the present one was confirmed, at least; None when all of them ended."""
        return None if self._older is None else now - self._older
