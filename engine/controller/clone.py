"""Making a clone independent: its replicas copy, each for itself, what they share with another volume's.

It goes on whenever the clone is attached, one step on all replicas at a time, and yields to clients. Nothing of it is
remembered here: a replica knows how far it is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import structlog
import trio

from engine.client import CloneStatus
from engine.controller.connection import ReplicaConnection
from engine.controller.progress import Progress
from engine.controller.purge import pause
from engine.errors import EngineError
from engine.operations import CloneFinish, CloneFinished
from engine.wire import messages
from engine.wire.frame import FrameType

if TYPE_CHECKING:
    from engine.controller.driver import Controller

log = structlog.get_logger()

# bytes a second and replica, when nobody else wants the disk
RATE = 64 << 20
IDLE_BUDGET = 4 << 20
BUSY_BUDGET = 1 << 20
STEP_TIMEOUT = 60.0
RETRY_SECONDS = 5.0
_IDLE_SECONDS = 1.0
_LOOK_EVERY = 0.1


class CloneUnfinishedError(EngineError):
    def __init__(self, volume: str, origin: str, reason: str) -> None:
        super().__init__(volume, origin, reason)
        self.volume = volume
        self.origin = origin
        self.reason = reason

    def __str__(self) -> str:
        return f"volume {self.volume} still shares the data of {self.origin}: {self.reason}"


class Puller:
    """`status` is None for a volume that is no clone, or is independent."""

    def __init__(self, controller: Controller, tell: Callable[..., None]) -> None:
        self._controller = controller
        self._tell = tell
        self._progress = Progress()
        self._replies: dict[str, messages.PullReply] = {}
        self._origin = ""
        self.failure = ""
        self.rate: float = RATE

    @property
    def status(self) -> CloneStatus | None:
        if not self._linked():
            return None
        latest = self._progress.latest
        return CloneStatus(
            origin=self._origin,
            done=latest.done if latest else 0,
            total=latest.total if latest else 0,
            rate=latest.rate if latest else 0.0,
            left=latest.left if latest else None,
            failure=self.failure,
        )

    def _linked(self) -> list[ReplicaConnection]:
        found = [connection for connection in self._members() if connection.origin]
        if found:
            self._origin = found[0].origin
        return found

    def _members(self) -> tuple[ReplicaConnection, ...]:
        return self._controller.connected(self._controller.core.in_sync)

    async def run(self) -> None:
        """Until cancelled."""
        was = False
        while True:
            linked = self._linked()
            if not linked:
                if was:
                    self._tell("clone_independent", message=f"shares nothing with {self._origin} any more")
                    self._controller.purger.kick()
                was = False
                await trio.sleep(_IDLE_SECONDS)
                continue
            was = True
            failed = await self._round(linked)
            await trio.sleep(RETRY_SECONDS if failed else 0)

    async def _round(self, linked: list[ReplicaConnection]) -> bool:
        """One step on each of these replicas, and the pause after it; whether none got on."""
        controller = self._controller
        while controller.busy:  # noqa: ASYNC110 - whoever changes the chain or the replicas goes first
            await trio.sleep(_LOOK_EVERY)
        ending = any(reply.complete for reply in self._replies.values())
        copied: list[int] = []
        # the end drops images from the chain, and nobody should be looking at that
        async with controller.exclusive("the end of a clone's copying") if ending else controller.background_step:
            if controller.busy and not ending:
                return False
            began, requests, busy = time.monotonic(), controller.answered_requests, bool(controller.core.inflight)
            async with trio.open_nursery() as nursery:
                for connection in linked:
                    nursery.start_soon(self._step, connection, BUSY_BUDGET if busy else IDLE_BUDGET, copied)
            took = time.monotonic() - began
        replies = [self._replies[connection.name] for connection in linked if connection.name in self._replies]
        if replies:
            # they are shown as one; the one that has most to do says how far it is
            slowest = max(replies, key=lambda reply: reply.total - reply.passed)
            self._progress.advance(slowest.passed, max(slowest.total, slowest.passed), f"copying from {self._origin}")
        busy = busy or controller.answered_requests != requests
        await trio.sleep(pause(max(copied, default=0), took, busy, self.rate))
        return not copied

    async def _step(self, connection: ReplicaConnection, budget: int, copied: list[int]) -> None:
        name = connection.name
        known = self._replies.get(name)
        message = messages.Pull(budget=budget, finish=known is not None and known.complete)
        try:
            with trio.fail_after(STEP_TIMEOUT):
                answer = await connection.call(FrameType.PULL, message)
            reply = messages.decode(answer[5], messages.PullReply)
        except trio.TooSlowError:
            self.failure = f"replica {name} takes longer than {STEP_TIMEOUT:g} s for a step"
            log.warning("a clone is not pulled", replica=name, reason=self.failure)
        except EngineError as error:
            self.failure = str(error)
            self._replies.pop(name, None)
            log.warning("a clone is not pulled", replica=name, reason=self.failure)
        else:
            self.failure = ""
            self._replies[name] = reply
            copied.append(reply.copied)
            if reply.done:
                connection.origin = ""
                del self._replies[name]
                log.info("replica shares nothing any more", replica=name)


async def finish(controller: Controller, request: CloneFinish, progress: Progress) -> CloneFinished:
    """Wait until the volume is independent."""
    puller = controller.puller
    origin = puller.status.origin if puller.status else ""
    if request.rate is not None:
        puller.rate = request.rate or math.inf
    try:
        while (status := puller.status) is not None:
            if status.failure:
                raise CloneUnfinishedError(controller.record.volume, status.origin, status.failure)
            progress.advance(status.done, status.total, f"copying from {status.origin}")
            await trio.sleep(0.05)
    finally:
        puller.rate = RATE
    return CloneFinished(origin=origin)
