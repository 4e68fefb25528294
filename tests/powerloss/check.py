"""After a loss of power: the replicas' disks as they were left, the real servers and the real engine on them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import msgspec
import trio

from engine.controller.driver import Controller, attach
from engine.errors import EngineError
from engine.record import FileRecordStore, VolumeRecord, bump_epoch
from tests.engine.inprocess import served
from tests.lab import images
from tests.powerloss import workload
from tests.powerloss.disks import PowerLossError, mounted

PIECE = 1 << 20
PATIENCE = 60.0


class Verdict(msgspec.Struct):
    files: int = 0
    dirty_regions: int = 0
    resynced: int = 0


async def revive(directories: dict[str, Path], record: VolumeRecord, key: bytes, place: Path, first: int) -> Verdict:
    """Attach, make everything equal, read all of it, detach. `first` turns the order: the source is another then.

    Raises PowerLossError, EngineError.
    """
    names = list(directories)
    names = names[first:] + names[:first]
    addresses = {name: f"unix:{place}/{name}.sock" for name in names}
    replicas = tuple(
        msgspec.structs.replace(replica, address=addresses[replica.name])
        for name in names
        for replica in record.replicas
        if replica.name == name
    )
    path = place / "record.json"
    path.unlink(missing_ok=True)
    store = FileRecordStore(path)
    store.create(msgspec.structs.replace(record, replicas=replicas))
    verdict = Verdict()
    async with contextlib.AsyncExitStack() as stack:
        for name in names:
            await stack.enter_async_context(served(directories[name], addresses[name], key))
        volume = attach(store, key, epoch=bump_epoch(store).epoch, open_timeout=10.0, reconnect_interval=0.01)
        async with volume.running():
            verdict.dirty_regions = len(volume.core.dirty)
            verdict.resynced = len(names) - len(record.in_sync)
            seen = [await volume.read(at, PIECE) for at in range(0, volume.size, PIECE)]
            await _settle(volume)
            for index, piece in enumerate(seen):
                if await volume.read(index * PIECE, PIECE) != piece:
                    raise PowerLossError(f"region {index} read otherwise the second time")
    return verdict


def _reasons(error: BaseException) -> list[str]:
    if isinstance(error, BaseExceptionGroup):
        return [reason for inner in error.exceptions for reason in _reasons(inner)]
    return [str(error)]


async def _settle(volume: Controller) -> None:
    with trio.move_on_after(PATIENCE):
        while True:
            replicas = volume.status("", "").replicas
            if volume.state == "ready" and all(replica.state == "in_sync" for replica in replicas):
                return
            await trio.sleep(0.002)
    raise PowerLossError(f"not all in sync after {PATIENCE:g} s: {volume.status('', '')}")


def check(
    disks: dict[str, Path],
    record: VolumeRecord,
    key: bytes,
    place: Path,
    states: Sequence[workload.State],
    acknowledged: int,
    first: int,
) -> Verdict:
    """`disks` as they were left, which this changes. Raises PowerLossError."""
    with contextlib.ExitStack() as stack:
        directories = {
            name: stack.enter_context(mounted(image, place / f"{name}.mnt")) / "replica"
            for name, image in disks.items()
        }
        try:
            verdict = trio.run(revive, directories, record, key, place, first)
        except* (EngineError, PowerLossError) as group:
            raise PowerLossError("; ".join(_reasons(group))) from group
        if found := images.differences(list(directories.values())):
            raise PowerLossError("; ".join(found))
        head = images.head(next(iter(directories.values())))
        with mounted(head, place / "volume.mnt") as root:
            after = states[min(acknowledged + 1, len(states) - 1)]
            if wrong := workload.complaints(root, states[acknowledged], after):
                raise PowerLossError("; ".join(wrong[:5]))
            verdict.files = len(states[acknowledged])
        try:
            images.check_ext4(head)
        except AssertionError as error:
            raise PowerLossError(str(error)) from error
    return verdict
