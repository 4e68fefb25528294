"""Names of what has to be looked at: each is in it once, nobody works on one twice at a time, failures wait longer."""

from __future__ import annotations

import heapq

import trio


class WorkQueue:
    """`take`, then `done` with what came of it."""

    def __init__(self, *, least: float = 0.1, most: float = 30.0) -> None:
        """Seconds that a name waits after its first failure, doubling, and at most."""
        self._least = least
        self._most = most
        self._ready: list[str] = []
        self._waiting: set[str] = set()
        self._working: set[str] = set()
        self._again: set[str] = set()
        self._later: list[tuple[float, str]] = []
        self._failures: dict[str, int] = {}
        self._news = trio.Event()

    def __len__(self) -> int:
        return len(self._ready)

    def add(self, name: str) -> None:
        """Have it looked at soon; when somebody does at present, once more afterwards."""
        if name in self._working:
            self._again.add(name)
        elif name not in self._waiting:
            self._waiting.add(name)
            self._ready.append(name)
            self._wake()

    def add_after(self, name: str, seconds: float) -> None:
        heapq.heappush(self._later, (trio.current_time() + seconds, name))
        self._wake()

    async def take(self) -> str:
        while True:
            now = trio.current_time()
            while self._later and self._later[0][0] <= now:
                self.add(heapq.heappop(self._later)[1])
            if self._ready:
                name = self._ready.pop(0)
                self._waiting.discard(name)
                self._working.add(name)
                return name
            news = self._news
            with trio.move_on_at(self._later[0][0] if self._later else float("inf")):
                await news.wait()

    def done(self, name: str, *, failed: bool = False) -> None:
        self._working.discard(name)
        if failed:
            failures = self._failures[name] = self._failures.get(name, 0) + 1
            self._again.discard(name)
            self.add_after(name, min(self._least * 2 ** (failures - 1), self._most))
            return
        self._failures.pop(name, None)
        if name in self._again:
            self._again.discard(name)
            self.add(name)

    def _wake(self) -> None:
        self._news.set()
        self._news = trio.Event()
