"""Descriptors that are handled without a turn of trio's event loop as long as there is traffic on them.

A turn of trio costs about as much as all else that a small request needs. So one task waits, through trio, for any of
its descriptors; when one is readable it goes on by itself with epoll(7), and waits `LINGER` seconds for more. It gives
way to the other tasks as soon as a handler says that it woke one (`give_way`), and otherwise every `BUDGET` seconds: so
long may pass before a task is run that something else woke, such as the clock or a thread.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable

from mypy_extensions import mypyc_attr

LINGER = 0.003
BUDGET = 0.02


@mypyc_attr(allow_interpreted_subclasses=True)
class Readiness:
    """The half of a `Poller` that does not await.

    Handlers are called when their descriptor is readable; they must not block, raise or await.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._linger = 0.0
        self._until = 0.0

    def fileno(self) -> int:
        """Readable when one of the descriptors is."""
        return self._epoll.fileno()

    def add(self, fd: int, handler: Callable[[], None], *, linger: bool = False) -> None:
        """With `linger` more is expected soon after something came, so that it is worth waiting for it here."""
        self._handlers[fd] = handler
        self._epoll.register(fd, select.EPOLLIN)
        if linger:
            self._linger = LINGER

    def remove(self, fd: int) -> None:
        """Before `fd` is closed. Harmless when it is not here."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def give_way(self) -> None:
        """A handler has woken a task."""
        self._until = 0.0

    def turn(self, after: Callable[[], None]) -> bool:
        """Handle what is readable, and what becomes so within `LINGER`; `after` is called behind all of one moment.

        True: the other tasks are to get a turn now. False: nothing came any more.
        """
        poll, handlers, clock = self._epoll.poll, self._handlers, time.monotonic
        self._until = clock() + BUDGET
        while events := poll(self._linger):
            for fd, _ in events:
                handler = handlers.get(fd)
                if handler is not None:
                    handler()
            after()
            if clock() > self._until:
                return True
        return False
