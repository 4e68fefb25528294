"""fdatasync of the head off the event loop, one at a time, its end told by an eventfd."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Protocol

import structlog

from engine.replica.aio import FDSYNC, Patience, Ring
from engine.store import Store

log = structlog.get_logger()


# a disk's flush takes a tenth of it, mostly
WAIT_NS = 1_000_000


class Syncer(Protocol):
    """`start` begins one; when `eventfd` is readable, `finished` tells whether it has ended, and raises its OSError.

    `may_block`: `start` may do all of it, and `finished` is to be called then whatever `eventfd` says.
    `worth_waiting`: nobody else needs this thread, so `finished` may wait a moment for the end.
    """

    eventfd: int

    def start(self, *, may_block: bool = False) -> None: ...
    def finished(self, *, worth_waiting: bool = False) -> bool: ...
    def close(self) -> None: ...


class AioSyncer:
    """The kernel does it in a worker of its own: no thread of ours has to get the interpreter's lock for the answer."""

    def __init__(self, store: Store) -> None:
        """Raises OSError: no AIO."""
        self._store = store
        self._ring = Ring(1, WAIT_NS)
        self.eventfd = self._ring.eventfd
        self._patience = Patience()
        # a sync that `start` has done, and what it ended with
        self._at_once = False
        self._error: OSError | None = None

    def start(self, *, may_block: bool = False) -> None:
        if may_block and self._patience.worth():
            began = time.monotonic_ns()
            try:
                os.fdatasync(self._store.head)
            except OSError as error:
                self._error = error
            self._at_once = True
            self._patience.found(time.monotonic_ns() - began < WAIT_NS)
            return
        self._ring.prepare(0, FDSYNC, self._store.head, 0, 0, 0, 0)
        self._ring.submit()

    def finished(self, *, worth_waiting: bool = False) -> bool:
        if self._at_once:
            self._at_once = False
            if self._error is not None:
                raise self._error
            return True
        if worth_waiting and not self._patience.worth():
            return False
        done = self._ring.completions(wait=worth_waiting)
        if worth_waiting:
            self._patience.found(bool(done))
        for _, result in done:
            if result:
                raise OSError(-result, os.strerror(-result))
            return True
        return False

    def close(self) -> None:
        self._ring.close()


class ThreadSyncer:
    def __init__(self, sync: Callable[[], None]) -> None:
        self._sync = sync
        self._wanted: SimpleQueue[bool] = SimpleQueue()
        self._results: SimpleQueue[OSError | None] = SimpleQueue()
        self.eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._worker = threading.Thread(target=self._run, name="sync", daemon=True)
        self._worker.start()

    def _run(self) -> None:
        while self._wanted.get():
            error: OSError | None = None
            try:
                self._sync()
            except OSError as caught:
                error = caught
            self._results.put(error)
            os.eventfd_write(self.eventfd, 1)

    def start(self, *, may_block: bool = False) -> None:
        self._wanted.put(True)

    def finished(self, *, worth_waiting: bool = False) -> bool:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.eventfd)
        if self._results.empty():
            return False
        error = self._results.get()
        if error is not None:
            raise error
        return True

    def close(self) -> None:
        """Does not wait for a sync that hangs; its thread then keeps the descriptor that it will write to."""
        self._wanted.put(False)
        self._worker.join(timeout=1.0)
        if not self._worker.is_alive():
            os.close(self.eventfd)


def make_syncer(store: Store) -> Syncer:
    try:
        return AioSyncer(store)
    except OSError as error:
        log.warning("no asynchronous syncs, using a thread", reason=str(error))
        return ThreadSyncer(store.sync)
