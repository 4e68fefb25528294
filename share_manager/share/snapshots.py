"""A snapshot of a share that is being served: the filesystem is at rest while the engine takes it."""

from __future__ import annotations

import trio

from engine.operations import SnapshotCreate, SnapshotCreated
from share_manager.errors import TimeoutProblem
from share_manager.share.attachment import Attachment
from share_manager.share.filesystem import Mounted
from share_manager.share.freeze import frozen

# clients' writes wait meanwhile
FROZEN_AT_MOST = 30.0


async def take_snapshot(attachment: Attachment, on: Mounted, name: str, labels: dict[str, str]) -> SnapshotCreated:
    """Raises FilesystemError, TimeoutProblem, EngineError."""
    # what can be refused or waited for is so before anybody has to wait for us
    await attachment.client.run(SnapshotCreate(name=name, labels=labels, check=True), SnapshotCreated)
    async with frozen(on.root):
        with trio.move_on_after(FROZEN_AT_MOST):
            return await attachment.client.run(SnapshotCreate(name=name, labels=labels, patience=1.0), SnapshotCreated)
    raise TimeoutProblem("the snapshot, with the filesystem frozen,", FROZEN_AT_MOST)
