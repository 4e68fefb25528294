"""Fills a replica that is empty, or whose snapshots are others: its images from an in-sync replica, then its head.

It gets every write in its head from the beginning. Snapshots do not change, so they are copied beside the foreground
without a lock; the head is the core's to copy, region by region. What is done is noted on the replica's disk now and
then, and a rebuild that was interrupted goes on from there.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import structlog
import trio

from engine.controller.actions import ReplicaState
from engine.controller.chains import chain_of
from engine.controller.connection import ReplicaConnection, ReplicaRefusedError, ReplicaUnreachableError
from engine.controller.core import Resync
from engine.wire import messages
from engine.wire.frame import FrameType
from engine.wire.layers import MAX_RANGE, layer_bytes

if TYPE_CHECKING:
    from engine.controller.driver import Controller

log = structlog.get_logger()

SNAPSHOTS = "snapshots"
HEAD = "head"
CHANGES = "changes"

SAVE_EVERY = 1.0
# dropping what a replica held before may take long
BEGIN_TIMEOUT = 120.0
# while clients are busy: rests this many times as long as the copy took, so that it has a third of the time
REST = 2.0
SHORTEST_REST = 0.005
LONGEST_REST = 0.2


def rest_after(took: float) -> float:
    """How long to leave clients alone after a copy that took so long, in seconds."""
    return min(max(took * REST, SHORTEST_REST), LONGEST_REST)


class Filling:
    """How far the rebuild of one replica is, in bytes of data."""

    def __init__(self) -> None:
        self.phase = SNAPSHOTS
        self.layers_done = 0
        self.layers_total = 0
        self.head_total = 0
        self.head_before = 0.0

    def figures(self, resync: Resync) -> tuple[int, int]:
        """Done and total."""
        part = self.head_before
        if resync.regions is not None:
            part += (1 - part) * resync.copied / max(resync.total, 1)
        return self.layers_done + int(self.head_total * part), self.layers_total + self.head_total


def figures(filling: Filling | None, resync: Resync, region_size: int) -> tuple[int, int, str]:
    """Bytes done, bytes in all, and the phase of a replica that is brought up to date."""
    if filling is None:
        return resync.copied * region_size, resync.total * region_size, CHANGES
    done, total = filling.figures(resync)
    return done, total, filling.phase


class Rebuild:
    """One attempt; `run` ends when the replica is complete, or raises and leaves it out."""

    def __init__(self, controller: Controller, target: ReplicaConnection) -> None:
        self._controller = controller
        self._core = controller.core
        self._target = target
        self.filling = Filling()
        self._filled: dict[str, messages.Filled] = {}
        self._chain: tuple[messages.SnapshotEntry, ...] = ()
        self._head = 0
        self._saved = trio.current_time()
        self._took = 0.0
        self._useless: set[str] = set()

    def describe(self) -> str:
        """For whoever has to wait until it is done."""
        resync = self._core.resyncs.get(self._target.bit)
        done, total = self.filling.figures(resync) if resync is not None else (1, 1)
        return f"the rebuild of replica {self._target.name} ({100 * done // max(total, 1)} % done)"

    async def run(self) -> None:
        """The target is open at our epoch and marked as rebuilding. Raises EngineError, TooSlowError."""
        controller, core, bit = self._controller, self._core, self._target.bit
        while core.untracked:  # noqa: ASYNC110 - the answers come in batches, and nobody is told of each
            await trio.sleep(0.02)
        while True:
            source = self._choose()
            try:
                layers = await self._begin(source)
                if not core.resyncing & bit:
                    await controller.follow(self._target)
                await self._fill(source, layers)
                break
            except (ReplicaUnreachableError, ReplicaRefusedError) as error:
                if error.replica != source.name:
                    raise
                self._useless.add(source.name)
                log.warning("taking another source", replica=self._target.name, reason=str(error))
        self.filling.phase = HEAD
        regions = await controller.missed(self._target) if self._head else set()
        first, count = self._head // core.region_size, -(-controller.size // core.region_size)
        regions |= set(range(first, count))
        core.resync(bit, regions)
        controller.kick()
        while core.state(self._target.name) is ReplicaState.RESYNCING:
            with trio.move_on_after(SAVE_EVERY):
                await controller.wait_until(lambda: core.state(self._target.name) is not ReplicaState.RESYNCING)
                return
            await self._save()

    def _choose(self) -> ReplicaConnection:
        """The core copies the head from the first in-sync replica: the snapshots come from the last."""
        core = self._core
        for name in reversed(core.members(core.in_sync)):
            source = self._controller.connection(name)
            if source is not None and not source.closed and name not in self._useless:
                return source
        raise ReplicaUnreachableError(self._target.name, "there is no in-sync replica to fill it from")

    async def _begin(self, source: ReplicaConnection) -> list[messages.SnapshotEntry]:
        controller, filling = self._controller, self.filling
        chain = self._chain = await chain_of(source)
        status = messages.decode((await source.call(FrameType.STATUS))[5], messages.StatusReply)
        with trio.fail_after(BEGIN_TIMEOUT):
            answer = await self._target.call(FrameType.BEGIN_REBUILD, messages.BeginRebuild(snapshots=chain))
        state = messages.decode(answer[5], messages.RebuildState)
        self._filled, self._head = dict(state.snapshots), state.head
        filling.layers_total = sum(entry.allocated for entry in chain)
        filling.head_total = max(0, status.allocated - sum(entry.allocated for entry in chain if entry.live))
        filling.head_before = state.head / controller.size
        self._count()
        log.info(
            "rebuilding",
            replica=self._target.name,
            source=source.name,
            snapshots=len(chain),
            bytes=filling.layers_total + filling.head_total,
            done=filling.layers_done,
            head=state.head,
        )
        return [entry for entry in chain if self._cursor(entry) < entry.size]

    def _cursor(self, entry: messages.SnapshotEntry) -> int:
        return self._filled[entry.name].cursor

    def _count(self) -> None:
        done = 0
        for entry in self._chain:
            filled = self._filled[entry.name]
            done += entry.allocated if filled.cursor >= entry.size else min(entry.allocated, filled.copied)
        self.filling.layers_done = done

    async def _fill(self, source: ReplicaConnection, layers: Sequence[messages.SnapshotEntry]) -> None:
        for entry in layers:
            while (cursor := self._cursor(entry)) < entry.size:
                await self._pace()
                started = time.perf_counter()
                length = min(MAX_RANGE, entry.size - cursor)
                answer = await source.call(
                    FrameType.READ_LAYER, messages.ReadLayer(name=entry.name), offset=cursor, length=length
                )
                covered, payload = answer[4], answer[5]
                await self._target.call(FrameType.WRITE_LAYER, body=payload, offset=cursor, length=covered)
                copied = layer_bytes(payload)
                self._core.copying(copied)
                self._filled[entry.name] = messages.Filled(
                    cursor=cursor + covered, copied=self._filled[entry.name].copied + copied
                )
                self._count()
                self._took = time.perf_counter() - started
                if trio.current_time() > self._saved + SAVE_EVERY:
                    await self._save()
        await self._save()

    async def _pace(self) -> None:
        """Wait for the rate limit, and for as long as the last copy took when clients have requests under way."""
        while not self._core.may_copy():  # noqa: ASYNC110 - the clock allows it
            await trio.sleep(0.02)
        if self._core.busy:
            await trio.sleep(rest_after(self._took))

    async def _save(self) -> None:
        """Have what is filled synced and noted. Raises ReplicaUnreachableError."""
        core, bit = self._core, self._target.bit
        resync = core.resyncs.get(bit)
        head = self._head
        if resync is not None and resync.regions is not None:
            # what was missed below the old cursor is noted elsewhere until this replica is in sync
            frontier = resync.frontier
            head = max(head, self._controller.size if frontier is None else frontier * core.region_size)
        await self._target.call(
            FrameType.REBUILD_STATE, messages.RebuildState(snapshots=self._filled, head=min(head, core.size))
        )
        self._saved = trio.current_time()
