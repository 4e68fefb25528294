"""How far an operation is, for whoever asked for it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from engine.operations import OperationProgress

_WINDOW = 10.0


class Progress:
    """Handlers call `advance`; a reporter looks at `latest` when it likes."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.latest: OperationProgress | None = None
        self._clock = clock
        # (time, bytes done) of the last seconds, for a rate that follows what happens now
        self._recent: deque[tuple[float, int]] = deque()

    def advance(self, done: int, total: int, message: str = "") -> None:
        """`done` of `total` bytes are done."""
        now = self._clock()
        if self._recent and done < self._recent[-1][1]:
            self._recent.clear()
        self._recent.append((now, done))
        while len(self._recent) > 2 and self._recent[0][0] < now - _WINDOW:
            self._recent.popleft()
        then, before = self._recent[0]
        rate = (done - before) / (now - then) if now > then else 0.0
        left = (total - done) / rate if rate > 0 else None
        self.latest = OperationProgress(done=done, total=total, rate=rate, left=left, message=message)
