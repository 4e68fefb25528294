"""The volume under fire: replicas on disks of their own behind relays, and one attachment of it after the other.

Replicas and engine are started, watched and replaced by the product's own supervision (`share_manager.share`). What
`share-manager serve` has above them, ganesha, is a workload here (see `tests.chaos.files`).
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import trio

from engine.record import FileRecordStore, ReplicaRecord, VolumeRecord
from engine.secret import create_secret
from engine.store import Store, create_replica
from share_manager.errors import FencedOffError
from share_manager.events import Level, Reporter
from share_manager.paths import VolumePaths
from share_manager.share.attachment import Attachment, attach
from share_manager.share.daemon import REPAIRABLE
from share_manager.share.replicas import ReplicaServer, run_replicas
from share_manager.share.session import runtime
from share_manager.share.state import StateFile
from share_manager.share.supervise import Policy
from share_manager.volumes import make_data_dir
from tests.chaos.disk import Disk, disks
from tests.chaos.relay import Relays, Route, relays
from tests.lab import leftovers

# shorter than the product's, so that a short campaign sees hung engines replaced, too
POLICY = Policy(engine_silence=12.0)
_PORT = 9500
Tell = Callable[[str], None]


class Events:
    """Counts what the product reports, and passes it on."""

    def __init__(self, tell: Tell) -> None:
        self.counts: Counter[str] = Counter()
        self._tell = tell

    def emit(self, event: str, message: str, level: Level, fields: dict[str, Any]) -> None:
        self.counts[event] += 1
        if event != "resync_progress":
            self._tell(f"{level} {event}: {message}" if level != "info" else f"{event}: {message}")


class Field:
    """`attachment` is the present one, None while there is none. `differences` of replicas are known at the end."""

    def __init__(
        self,
        paths: VolumePaths,
        record: VolumeRecord,
        state: StateFile,
        relayed: Relays,
        disks: dict[str, Disk],
        servers: tuple[ReplicaServer, ...],
        events: Events,
    ) -> None:
        self.paths = paths
        self.record = record
        self.names = [replica.name for replica in record.replicas]
        self.relays = relayed
        self.disks = disks
        self.events = events
        self.report = Reporter(events)
        self.attachment: Attachment | None = None
        self.attachments = 0
        self.differences: list[str] = []
        self._state = state
        self._servers = {server.name: server for server in servers}

    def replica_pid(self, name: str) -> int | None:
        return self._servers[name].pid

    @property
    def engine_pid(self) -> int | None:
        attachment = self.attachment
        return attachment.engine.pid if attachment is not None and attachment.engine.returncode is None else None

    @property
    def whole(self) -> bool:
        """All replicas are in sync, as far as the last look at the engine says."""
        attachment = self.attachment
        return (
            attachment is not None
            and attachment.status is not None
            and trio.current_time() - attachment.last_answer < 3
            and attachment.engine.returncode is None
            and attachment.status.pid == attachment.engine.pid
            and attachment.status.state == "ready"
            and all(replica.state == "in_sync" for replica in attachment.status.replicas)
        )

    async def wait_whole(self, timeout: float) -> bool:
        with trio.move_on_after(timeout):
            while not self.whole:
                await trio.sleep(0.1)
            return True
        return False

    async def attached(self, use: Callable[[Attachment], Awaitable[bool]], *, with_loop: bool) -> None:
        """One attachment after the other until `use` of one returns True. An attachment that breaks off cancels it.

        Raises FencedOffError: nobody else attaches this volume.
        """
        pause = 0.0
        while True:
            finished = False
            self.attachments += 1
            began = trio.current_time()
            try:
                async with attach(self.paths, self.report, self._state, POLICY, with_loop=with_loop) as attachment:
                    self.attachment = attachment
                    finished = await use(attachment)
                if attachment.fenced is not None:
                    raise attachment.fenced
                reason = attachment.broken or "the attachment ended"
            except* REPAIRABLE as caught:
                if finished or caught.subgroup(FencedOffError) is not None:
                    raise
                reason = str(_first(caught))
            finally:
                self.attachment = None
            if finished:
                return
            pause = 0.0 if trio.current_time() - began > 15 else min(pause * 2 + 0.25, 2.0)
            self.report.warn("repairing", f"{reason}; attaching again in {pause:.2f} s")
            await trio.sleep(pause)


def _first(group: BaseException) -> BaseException:
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group


@contextlib.contextmanager
def workplace() -> Iterator[tuple[Path, str]]:
    """A directory and the mark of everything that belongs to it; what is left on the machine is removed, and an error.

    Raises AssertionError.
    """
    leftovers.remove_abandoned()
    directory = Path(tempfile.mkdtemp(prefix=f"{leftovers.PREFIX}{os.getpid()}-", dir="/tmp"))
    mark = leftovers.mark_of(directory)
    before = os.environ.get(leftovers.TOKEN)
    os.environ[leftovers.TOKEN] = str(directory)
    try:
        yield directory, mark
    finally:
        left = leftovers.find(directory, mark)
        leftovers.remove(directory, mark)
        if before is None:
            del os.environ[leftovers.TOKEN]
        else:
            os.environ[leftovers.TOKEN] = before
        _remove_tree(directory)
    assert not left, "left behind: " + ", ".join(map(str, left))


def _remove_tree(directory: Path) -> None:
    """Never a file below a mount that would not go: then it raises OSError."""
    for path in sorted(directory.rglob("*"), key=lambda path: len(path.parts), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    directory.rmdir()


@contextlib.asynccontextmanager
async def field(directory: Path, mark: str, *, replicas: int, size: int, tell: Tell) -> AsyncIterator[Field]:
    """A new volume of `size` bytes, its replicas running. Afterwards they are stopped and compared, and all is gone."""
    names = [f"r{i + 1}" for i in range(replicas)]
    paths = VolumePaths(make_data_dir(directory / "data"), f"chaos{mark}")
    paths.directory.mkdir()
    create_secret(paths.secret)
    uuid = str(uuid4())
    # addresses of the loopback network that no other session uses, and no outgoing connection either
    pid = os.getpid()
    network = f"127.{1 + (pid >> 8) % 254}.{pid % 256}"
    engine_side = {name: (f"{network}.{i + 101}", _PORT) for i, name in enumerate(names)}
    replica_side = {name: (f"{network}.{i + 1}", _PORT) for i, name in enumerate(names)}
    events = Events(tell)
    async with disks(directory, names, size + size // 2) as made:
        for name, disk in made.items():
            create_replica(disk.place / "replica", volume=paths.volume, uuid=uuid, replica=name, size=size)
        record = VolumeRecord(
            volume=paths.volume,
            uuid=uuid,
            size=size,
            replicas=tuple(_replica(name, engine_side[name], made[name]) for name in names),
            in_sync=tuple(names),
        )
        FileRecordStore(paths.record).create(record)
        routes = {name: Route(engine_side[name], replica_side[name]) for name in names}
        listening = tuple(_replica(name, replica_side[name], made[name]) for name in names)
        async with (
            relays(routes) as relayed,
            runtime(paths, "attach") as state,
            run_replicas(listening, paths, Reporter(events), state) as servers,
        ):
            result = Field(paths, record, state, relayed, made, tuple(servers), events)
            yield result
        result.differences = await trio.to_thread.run_sync(differences, made, size)


def _replica(name: str, address: tuple[str, int], disk: Disk) -> ReplicaRecord:
    return ReplicaRecord(name=name, address=f"tcp:{address[0]}:{address[1]}", directory=str(disk.place / "replica"))


def differences(disks: dict[str, Disk], size: int) -> list[str]:
    """Where the contents of the replicas, which are stopped, differ, block for block."""
    stores: dict[str, Store] = {}
    found = []
    step = 1 << 20
    with contextlib.ExitStack() as stack:
        for name, disk in disks.items():
            stores[name] = Store.open(disk.place / "replica")
            stack.callback(stores[name].close)
        (first, reference), *others = stores.items()
        for offset in range(0, size, step):
            wanted = reference.read(offset, min(step, size - offset))
            for name, store in others:
                content = store.read(offset, len(wanted))
                if content != wanted:
                    at = offset + next(i for i in range(len(wanted)) if content[i] != wanted[i])
                    found.append(f"{name} differs from {first} at byte {at}")
    return found
