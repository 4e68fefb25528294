"""Which replicas a node has to host, and what becomes of the directory of each: decided without I/O."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from pathlib import Path

import msgspec

from engine.record import ReplicaRecord, VolumeRecord


class Hosted(msgspec.Struct, frozen=True, kw_only=True):
    """One replica of this node. `directory` is absolute. `fresh`: nobody has ever attached the volume. `member`: the
    record says that it holds every acknowledged write."""

    volume: str
    uuid: str
    size: int
    name: str
    address: str
    directory: str
    fresh: bool
    member: bool

    @property
    def key(self) -> str:
        """The volume's uuid, because a volume of the same name may be another one."""
        return f"{self.uuid}/{self.name}"

    @property
    def place(self) -> tuple[str, str]:
        """With another one it is another process."""
        return self.address, self.directory

    @property
    def replica(self) -> ReplicaRecord:
        return ReplicaRecord(name=self.name, address=self.address, directory=self.directory)


def hosted_by(node: str, records: Iterable[VolumeRecord], data_dir: Path) -> dict[str, Hosted]:
    """By their keys, the replicas that these records place on a node."""
    found = [
        Hosted(
            volume=record.volume,
            uuid=record.uuid,
            size=record.size,
            name=replica.name,
            address=replica.address,
            directory=str(data_dir / replica.directory),
            fresh=record.epoch == 0,
            member=replica.name in record.in_sync,
        )
        for record in records
        for replica in record.replicas
        if replica.node == node
    ]
    return {one.key: one for one in found}


class Directory(enum.Enum):
    """What is found where a replica should be."""

    ABSENT = "absent"
    OURS = "ours"
    FOREIGN = "foreign"


class Preparation(enum.Enum):
    SERVE = "serve what is there"
    CREATE = "make an empty replica"
    CREATE_REBUILDING = "make one that is to be filled"
    REFUSE = "leave it alone"


def prepare(one: Hosted, found: Directory) -> Preparation:
    """An absent directory of a member may be a disk that is not mounted: an empty one in its place would pass for
    complete, since the record says that it is."""
    if found is Directory.OURS:
        return Preparation.SERVE
    if found is Directory.FOREIGN:
        return Preparation.REFUSE
    if one.fresh:
        return Preparation.CREATE
    return Preparation.REFUSE if one.member else Preparation.CREATE_REBUILDING


def changes(wanted: dict[str, Hosted], running: dict[str, Hosted]) -> tuple[list[str], list[str]]:
    """Keys of what to stop, then of what to start."""
    stop = [key for key, one in running.items() if key not in wanted or wanted[key].place != one.place]
    return stop, [key for key in wanted if key not in running or key in stop]
