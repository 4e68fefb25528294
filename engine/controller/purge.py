"""Merging removed snapshots away: step by step, on all replicas at once, when clients leave room for it.

Each step copies a budget, so neither memory nor the time for which anything else waits grows with a snapshot's size.
Nothing of it is remembered: what is left to do is read off the replicas, after a restart of anything as well.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import msgspec
import structlog
import trio

from engine.controller import lineage
from engine.controller.chains import chain_of
from engine.controller.connection import ReplicaConnection
from engine.errors import EngineError
from engine.operations import PurgeStatus
from engine.wire import messages
from engine.wire.frame import FrameType

if TYPE_CHECKING:
    from engine.controller.driver import Controller

log = structlog.get_logger()

IDLE_BUDGET = 8 << 20
BUSY_BUDGET = 1 << 20
# bytes a second and replica, when nobody else wants the disk
RATE = 128 << 20
# with clients at work, steps take this part of the time
BUSY_SHARE = 0.2
STEP_TIMEOUT = 60.0
RETRY_SECONDS = 60.0
_LOOK_EVERY = 0.1


class Account(msgspec.Struct, frozen=True):
    """What was done since the engine started: snapshots merged away, once for each replica, and bytes by replica."""

    merged: tuple[str, ...] = ()
    copied: dict[str, int] = {}


class _Work:
    """What one replica has left to do. `target` is being merged away."""

    def __init__(self, connection: ReplicaConnection) -> None:
        self.connection = connection
        self.target = ""
        self.refused: set[str] = set()
        self.copied = 0
        self.left = 0
        self.finished = False


class Purger:
    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._wanted = trio.Event()
        # whatever the engine before this one left
        self._wanted.set()
        self._works: list[_Work] = []
        self._ended = trio.Event()
        self._sweeping = False
        self._sweeps = 0
        self.account = Account()
        self.failure = ""
        # something waits for a clone, which does not tell when it is independent
        self._pinned = False

    def kick(self) -> None:
        """There may be something to do."""
        self._wanted.set()

    @property
    def status(self) -> PurgeStatus:
        if not self._works:
            return PurgeStatus()
        most = max(self._works, key=lambda work: work.copied + work.left)
        return PurgeStatus(active=True, done=most.copied, total=most.copied + most.left)

    async def finish(self) -> None:
        """Wait until a sweep that began after now is done."""
        wanted = self._sweeps + (2 if self._sweeping else 1)
        self.kick()
        while self._sweeps < wanted:
            await self._ended.wait()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            with trio.move_on_after(RETRY_SECONDS if self.failure or self._pinned else math.inf):
                await self._wanted.wait()
            self._wanted = trio.Event()
            self._sweeping, self.failure, self._pinned = True, "", False
            try:
                await self._sweep()
            except EngineError as error:
                self.failure = str(error)
                log.warning("merging of removed snapshots stopped", reason=str(error))
            self._works = []
            self._sweeping = False
            self._sweeps += 1
            ended, self._ended = self._ended, trio.Event()
            ended.set()

    async def _sweep(self) -> None:
        controller = self._controller
        core = controller.core
        works = [_Work(connection) for connection in controller.connected(core.in_sync | core.joining)]
        while any(not work.finished for work in works):
            while controller.busy:  # noqa: ASYNC110 - whoever changes the chain or the replicas goes first
                await trio.sleep(_LOOK_EVERY)
            async with controller.background_step:
                if controller.busy:
                    continue
                if core.draining:
                    return
                answered, busy = controller.answered_requests, bool(controller.core.inflight)
                began = time.monotonic()
                before = sum(work.copied for work in works)
                async with trio.open_nursery() as nursery:
                    for work in works:
                        if not work.finished:
                            nursery.start_soon(self._step, work, BUSY_BUDGET if busy else IDLE_BUDGET)
                took = time.monotonic() - began
            if any(work.target for work in works):
                self._works = works
            copied = sum(work.copied for work in works) - before
            busy = busy or controller.answered_requests != answered
            await trio.sleep(pause(copied // max(len(works), 1), took, busy))

    async def _step(self, work: _Work, budget: int) -> None:
        """One step on one replica. Whatever it refuses is left for the next sweep."""
        name = work.connection.name
        try:
            with trio.fail_after(STEP_TIMEOUT):
                if not work.target:
                    listing = await chain_of(work.connection)
                    todo = [one for one in lineage.mergeable(listing) if one not in work.refused]
                    if not todo:
                        self._pinned |= any(one.removed and one.pinned for one in listing)
                        work.finished = True
                        return
                    work.target = todo[0]
                    work.left = lineage.merge_cost(listing)
                message = messages.Coalesce(name=work.target, budget=budget)
                body = (await work.connection.call(FrameType.COALESCE, message))[5]
                reply = messages.decode(body, messages.CoalesceReply)
        except trio.TooSlowError:
            log.warning("a step of merging takes too long", replica=name, snapshot=work.target)
            work.finished = True
        except EngineError as error:
            log.warning("a snapshot is not merged away", replica=name, snapshot=work.target, reason=str(error))
            self.failure = str(error)
            work.refused.add(work.target)
            work.finished = work.connection.closed
            work.target = ""
        else:
            work.copied += reply.copied
            copied, merged = self.account.copied, self.account.merged
            copied = {**copied, name: copied.get(name, 0) + reply.copied}
            work.left = max(0, work.left - reply.copied)
            if reply.done:
                merged = (*merged, work.target)
                log.info("snapshot merged away", replica=name, snapshot=work.target)
                work.target = ""
            self.account = Account(merged=merged, copied=copied)


def pause(copied: int, took: float, busy: bool, rate: float = RATE) -> float:
    """Seconds to wait after a step that copied `copied` bytes in `took` seconds; `rate` is in bytes a second."""
    rest = copied / rate - took
    return max(rest, took * (1 / BUSY_SHARE - 1) if busy else 0.0, 0.0)
