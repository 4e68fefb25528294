"""What can be asked about snapshots: create, list, delete, revert, purge."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING

import trio

from engine.controller.progress import Progress
from engine.errors import (
    EngineError,
    InUseError,
    NoReplicaError,
    NoSuchSnapshotError,
    ReplicasRefuseError,
    SnapshotReadError,
    SnapshotTakenError,
    TooManySnapshotsError,
)
from engine.operations import (
    SnapshotCreate,
    SnapshotCreated,
    SnapshotDelete,
    SnapshotDeleted,
    SnapshotList,
    SnapshotPurge,
    SnapshotPurged,
    SnapshotRevert,
    SnapshotReverted,
    SnapshotsListed,
)
from engine.store.layout import MAX_SNAPSHOTS
from engine.store.snapshots import fault
from engine.wire import messages
from engine.wire.frame import FrameType

if TYPE_CHECKING:
    from engine.controller.driver import Controller

_PROGRESS_EVERY = 0.2


class PurgeError(EngineError):
    """Some of it could not be merged away; the engine tries again by itself."""

    def __init__(self, volume: str, reason: str) -> None:
        super().__init__(volume, reason)
        self.volume = volume
        self.reason = reason

    def __str__(self) -> str:
        return f"not everything that is removed from volume {self.volume!r} could be merged away: {self.reason}"


class FlushError(EngineError):
    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"what was written before cannot be brought to the disks: {self.reason}"


def now() -> str:
    """RFC 3339, UTC, exact enough to tell two snapshots of one name apart."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


async def create(controller: Controller, request: SnapshotCreate, progress: Progress) -> SnapshotCreated:
    async with controller.exclusive(f"snapshot {request.name}"):
        if reason := fault(request.name, request.labels):
            raise ReplicasRefuseError(controller.record.volume, reason)
        await controller.chains.equal(request.patience)
        await _check_free(controller, request.name)
        if request.check:
            return SnapshotCreated(name=request.name)
        created = await _take(
            controller, request.name, user_created=True, labels=request.labels, patience=request.patience
        )
    return SnapshotCreated(name=request.name, created=created, held=controller.chains.held)


async def _take(
    controller: Controller, name: str, *, user_created: bool, labels: dict[str, str], patience: float
) -> str:
    """Returns the time that the snapshot bears."""
    try:
        # most of what the replicas would have to sync while everybody waits
        with trio.fail_after(controller.core.flush_timeout + controller.request_timeout):
            await controller.flush()
    except OSError as error:
        raise FlushError(error.strerror or str(error)) from error
    except trio.TooSlowError:
        raise FlushError("it takes too long") from None
    created = now()
    message = messages.Snapshot(name=name, created=created, user_created=user_created, labels=labels)
    await controller.chains.switch(FrameType.SNAPSHOT, message, patience)
    return created


async def _check_free(controller: Controller, name: str) -> None:
    """See that no replica would refuse what the others accept. Raises SnapshotTakenError, TooManySnapshotsError."""
    volume = controller.record.volume
    for reply in (await controller.chains.listings()).values():
        for entry in reply.snapshots:
            if entry.name == name:
                controller.purger.kick()
                raise SnapshotTakenError(volume, name, entry.removed)
        if len(reply.snapshots) >= MAX_SNAPSHOTS:
            controller.purger.kick()
            raise TooManySnapshotsError(volume, len(reply.snapshots), sum(entry.removed for entry in reply.snapshots))


async def list_snapshots(controller: Controller, request: SnapshotList, progress: Progress) -> SnapshotsListed:
    found = await controller.chains.listings()
    for name in controller.core.members(controller.core.in_sync):
        if name in found:
            return SnapshotsListed(
                volume=controller.record.volume,
                size=controller.size,
                replica=name,
                snapshots=found[name].snapshots,
                head_allocated=found[name].head_allocated,
                purge=controller.purger.status,
            )
    raise NoReplicaError(controller.record.volume, {"engine": "no member tells its snapshots"})


async def _existing(controller: Controller, name: str) -> messages.SnapshotEntry:
    """Raises NoSuchSnapshotError."""
    found = [reply.snapshots for reply in (await controller.chains.listings()).values()]
    entries = [entry for listing in found for entry in listing if entry.name == name and not entry.removed]
    if not entries or len(entries) < len(found):
        raise NoSuchSnapshotError(controller.record.volume, name)
    return entries[0]


async def delete(controller: Controller, request: SnapshotDelete, progress: Progress) -> SnapshotDeleted:
    async with controller.exclusive(f"the deletion of snapshot {request.name}"):
        await _existing(controller, request.name)
        if controller.browser.reads(request.name):
            raise SnapshotReadError(controller.record.volume, request.name)
        await controller.chains.remove(request.name)
    controller.purger.kick()
    return SnapshotDeleted(name=request.name)


async def revert(controller: Controller, request: SnapshotRevert, progress: Progress) -> SnapshotReverted:
    if controller.has_file:
        raise InUseError(controller.record.volume, "reverted")
    async with controller.exclusive(f"a revert to snapshot {request.name}"):
        await _existing(controller, request.name)
        await controller.chains.revert(request.name, now())
    return SnapshotReverted(name=request.name)


async def purge(controller: Controller, request: SnapshotPurge, progress: Progress) -> SnapshotPurged:
    purger = controller.purger
    before, failure = purger.account, None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_tell, controller, progress)
        try:
            await _purge(controller)
        except EngineError as error:
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    after = purger.account
    merged = after.merged[len(before.merged) :]
    copied = max((after.copied[name] - before.copied.get(name, 0) for name in after.copied), default=0)
    return SnapshotPurged(merged=tuple(sorted(set(merged))), copied=copied)


async def _purge(controller: Controller) -> None:
    # first what needs nothing: it also makes room among the 254
    async with controller.exclusive("a purge of snapshots"):
        await _drop_system_snapshots(controller)
    await controller.purger.finish()
    async with controller.exclusive("a purge of snapshots"):
        again = await _free_the_newest(controller)
    if again:
        await controller.purger.finish()
    if controller.purger.failure:
        raise PurgeError(controller.record.volume, controller.purger.failure)


async def _free_the_newest(controller: Controller) -> bool:
    """Where the head builds on a removed snapshot of a person's, take one between, or its room never comes back."""
    listings = [reply.snapshots for reply in (await controller.chains.listings()).values()]
    below = [live[-1] for listing in listings if (live := [entry for entry in listing if entry.live])]
    if not any(entry.removed and entry.user_created for entry in below):
        return False
    await controller.chains.equal()
    name = "system-" + datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S-%f")
    await _check_free(controller, name)
    await _take(controller, name, user_created=False, labels={}, patience=10.0)
    await controller.chains.remove(name)
    return True


async def _drop_system_snapshots(controller: Controller) -> None:
    """Nobody asked for them. The one that the head builds on stays until there is another on top."""
    listings = [reply.snapshots for reply in (await controller.chains.listings()).values()]
    names = dict.fromkeys(
        entry.name for listing in listings for entry in listing if not entry.user_created and not entry.removed
    )
    for name in names:
        if not controller.browser.reads(name):
            await controller.chains.remove(name)


async def _tell(controller: Controller, progress: Progress) -> None:
    while True:
        status = controller.purger.status
        if status.active:
            progress.advance(status.done, status.total, "merging removed snapshots")
        await trio.sleep(_PROGRESS_EVERY)
