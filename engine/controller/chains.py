"""The snapshot chains of an attachment's replicas: compared, made equal, and changed on all of them at one point.

A new head is a barrier between requests: nothing new is admitted, everything admitted is complete on all replicas,
they switch, and then the clients' requests go on. So the snapshot is the same on all of them, whatever each had queued.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import msgspec
import structlog
import trio

from engine.controller import lineage
from engine.controller.connection import ReplicaConnection, ReplicaRefusedError
from engine.errors import NeedsRebuildError, NotEqualError, ProtocolError, ReplicasRefuseError, UnfinishedRevertError
from engine.record import PendingRevert, VolumeRecord
from engine.wire import messages
from engine.wire.frame import FrameType

if TYPE_CHECKING:
    from engine.controller.driver import Controller

log = structlog.get_logger()

# how long a change waits for replicas that are almost up to date, in seconds
PATIENCE = 10.0
_LOOK_EVERY = 0.05


async def chain_of(connection: ReplicaConnection) -> tuple[messages.SnapshotEntry, ...]:
    """All snapshots of a replica that we own: the live ones first, the oldest first, then those left aside.

    Raises ReplicaUnreachableError, ReplicaRefusedError, FencedError, ProtocolError.
    """
    return _entries((await connection.call(FrameType.SNAPSHOTS))[5])


class Answers(msgspec.Struct, frozen=True):
    """Payloads of those who did it, refusals of the others. Whoever is in neither was lost."""

    done: dict[str, bytes]
    refused: dict[str, ReplicaRefusedError]


class Chains:
    """`version` counts changes of the chain, `held` is how long clients were last held up for one, in seconds."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self.version = 0
        self.held = 0.0
        self._removing = False

    @property
    def changing(self) -> bool:
        """No replica may come back now: it would miss the change."""
        return self._removing or self._controller.core.holding or self._controller.record.pending is not None

    # looking

    async def listings(self) -> dict[str, messages.SnapshotsReply]:
        """What each replica that is written to has; one that answers with nonsense is lost. Raises FencedError."""
        answers = await self._controller.call_all(self._controller.core.fanout, FrameType.SNAPSHOTS)
        found = {}
        for name, body in answers.done.items():
            try:
                found[name] = messages.decode(body, messages.SnapshotsReply)
            except ProtocolError as error:
                self._lose(name, str(error))
        return found

    async def match(self, name: str, connection: ReplicaConnection) -> None:
        """See that copying what changed will make a returning replica equal to the members.

        What it has and no member knows is marked as removed. Raises NeedsRebuildError, EngineError.
        """
        controller, core = self._controller, self._controller.core
        while self.changing:  # noqa: ASYNC110 - a change takes milliseconds, and the caller has a deadline
            await trio.sleep(_LOOK_EVERY)
        answers = await controller.call_all(core.in_sync & -core.in_sync, FrameType.SNAPSHOTS)
        if not answers.done:
            raise NotEqualError(controller.record.volume, "no member tells its snapshots")
        (member,) = answers.done.values()
        extra = lineage.returning(_entries(member), await chain_of(connection))
        if extra is None:
            raise NeedsRebuildError(name, lineage.DIFFERS)
        for one in extra:
            log.warning("a snapshot that no member knows is removed", replica=name, snapshot=one)
            await connection.call(FrameType.REMOVE_SNAPSHOT, messages.RemoveSnapshot(name=one))

    # at the attach

    async def make_equal(self) -> None:
        """Finish what the last engine began: a revert, a snapshot, a removal. Members that cannot follow are lost."""
        controller, core = self._controller, self._controller.core
        pending = controller.record.pending
        if pending is not None:
            answers = await controller.call_all(
                core.in_sync, FrameType.REVERT, messages.Revert(name=pending.revert, created=pending.created)
            )
            if answers.refused and not answers.done:
                raise UnfinishedRevertError(controller.record.volume, pending.revert, _why(answers))
            self._part_with(answers)
        found = await self.listings()
        for name in core.members(core.in_sync):
            if name not in found:
                self._lose(name, "it does not tell its snapshots")
        verdict = lineage.reconcile({name: reply.snapshots for name, reply in found.items()})
        for name, snapshots in verdict.remove.items():
            for one in snapshots:
                log.warning("an unfinished change of the snapshots is settled", replica=name, removed=one)
                message = messages.RemoveSnapshot(name=one)
                self._part_with(await controller.call_all(core.bit(name), FrameType.REMOVE_SNAPSHOT, message))
        for name in verdict.leave:
            self._lose(name, lineage.DIFFERS)

    async def revert_is_finished(self) -> None:
        """The record names none but those that have done it."""
        controller = self._controller
        if controller.record.pending is not None:
            await controller.change_record(_reverted)

    # changing

    async def equal(self, patience: float = PATIENCE) -> None:
        """Wait until all members read the same and nobody is being brought up to date.

        Raises NotEqualError after `patience` seconds.
        """
        controller = self._controller
        deadline = trio.current_time() + patience
        while reason := self._unequal():
            if trio.current_time() >= deadline:
                raise NotEqualError(controller.record.volume, reason)
            await trio.sleep(_LOOK_EVERY)
            if controller.failure is not None:
                raise controller.failure

    def _unequal(self) -> str:
        core = self._controller.core
        if core.leaving:
            return f"the record does not know yet that {', '.join(core.members(core.leaving))} is lost"
        if core.dirty:
            left = len(core.dirty) * core.region_size >> 20
            return f"the replicas are being made equal after a crash, {left} MiB to go"
        for bit, resync in core.resyncs.items():
            (name,) = core.members(bit)
            if not resync.total:
                return f"replica {name} is being opened again"
            percent = 100 * resync.copied // resync.total
            total = resync.total * core.region_size >> 20
            return f"replica {name} is being brought up to date, {percent} % of {total} MiB are done"
        return ""

    @asynccontextmanager
    async def _barrier(self, patience: float) -> AsyncIterator[None]:
        """Clients wait inside the block; all replicas written to have applied the same. Raises NotEqualError."""
        controller, core = self._controller, self._controller.core
        deadline = trio.current_time() + patience
        while True:
            await self.equal(deadline - trio.current_time())
            began = time.perf_counter()
            core.hold()
            try:
                with trio.move_on_after(controller.request_timeout) as waited:
                    await controller.wait_until(lambda: core.quiet or controller.failure is not None)
                if controller.failure is not None:
                    raise controller.failure
                if waited.cancelled_caught:
                    raise NotEqualError(controller.record.volume, "requests under way are not answered")
                # a replica may have begun to come back, just before; then what is missing is waited for once more
                if not self._unequal():
                    yield
                    return
            finally:
                core.release()
                self.held = time.perf_counter() - began
                controller.kick()

    async def switch(self, kind: FrameType, message: messages.Message, patience: float = PATIENCE) -> None:
        """A new head on all replicas, for SNAPSHOT or REVERT; returns when the record names none but those that did it.

        Raises NotEqualError, ReplicasRefuseError (nothing has changed), EngineError.
        """
        async with self._barrier(patience):
            with trio.CancelScope(shield=True):
                # nobody may leave between the request and what becomes of it
                self.version += 1
                answers = await self._controller.call_all(self._controller.core.fanout, kind, message)
                self._part_with(answers)
        log.info("head switched", kind=kind.name, held_ms=round(self.held * 1000, 2), replicas=list(answers.done))
        await self._agreed(answers)

    async def remove(self, name: str) -> None:
        """Mark a snapshot as removed everywhere. Raises ReplicasRefuseError, EngineError."""
        with trio.CancelScope(shield=True):
            self.version += 1
            self._removing = True
            try:
                message = messages.RemoveSnapshot(name=name)
                answers = await self._controller.call_all(
                    self._controller.core.fanout, FrameType.REMOVE_SNAPSHOT, message
                )
                self._part_with(answers)
            finally:
                self._removing = False
        await self._agreed(answers)

    async def _agreed(self, answers: Answers) -> None:
        await self._controller.members_recorded()
        if not answers.done:
            raise ReplicasRefuseError(self._controller.record.volume, _why(answers))

    def _lose(self, name: str, reason: str) -> None:
        """It is not what its peers are."""
        core = self._controller.core
        core.lost(core.bit(name), reason)
        self._controller.kick()

    def _part_with(self, answers: Answers) -> None:
        """Those who refused what others did are not equal to them any more."""
        if answers.done:
            for name, refusal in answers.refused.items():
                self._lose(name, str(refusal))

    async def revert(self, name: str, created: str) -> None:
        """Throw away what was written since snapshot `name`, everywhere. Raises as `switch` does."""
        controller = self._controller
        await self.equal()
        pending = PendingRevert(revert=name, created=created)
        # once it is recorded it ends here, or at the next attach
        with trio.CancelScope(shield=True):
            await controller.change_record(lambda record: msgspec.structs.replace(record, pending=pending))
            try:
                await self.switch(FrameType.REVERT, messages.Revert(name=name, created=created))
            except NotEqualError:
                # nobody was told
                await controller.change_record(lambda record: msgspec.structs.replace(record, pending=None))
                raise
            except ReplicasRefuseError:
                # of those that did not even answer nobody knows
                await controller.change_record(_reverted)
                raise
            await controller.change_record(_reverted)


def _entries(body: bytes) -> tuple[messages.SnapshotEntry, ...]:
    return messages.decode(body, messages.SnapshotsReply).snapshots


def _why(answers: Answers) -> str:
    """What they say, once where they say the same."""
    return "; ".join(dict.fromkeys(refusal.detail.decode(errors="replace") for refusal in answers.refused.values()))


def _reverted(record: VolumeRecord) -> VolumeRecord:
    """Members have done it; what the others hold is not told by any map."""
    away = (replica.name for replica in record.replicas if replica.name not in record.in_sync)
    return msgspec.structs.replace(record, pending=None, reverted_without=tuple(away))
