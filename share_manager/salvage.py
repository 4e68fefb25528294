"""Take up a volume whose in-sync replicas are lost, from a replica that is behind. Only a person can decide that."""

from __future__ import annotations

from pathlib import Path

import msgspec

from engine.durable import replace_file
from engine.errors import StoreError
from engine.record import FileRecordStore, VolumeRecord
from engine.store import REGION_SIZE
from engine.store.salvage import ReplicaSurvey, call_complete, survey_replica, take_as_source
from share_manager.errors import SalvageRefusedError, UsageError
from share_manager.paths import VolumePaths
from share_manager.volumes import read_record, readdress


class ReplicaFinding(msgspec.Struct, frozen=True, kw_only=True):
    """`in_sync`: what the record says. `survey` is None, with `problem`, for a directory that cannot be used."""

    name: str
    directory: str
    in_sync: bool
    survey: ReplicaSurvey | None = None
    problem: str = ""

    @property
    def sound(self) -> bool:
        return self.survey is not None and not self.survey.info.rebuilding


class SalvagePlan(msgspec.Struct, frozen=True, kw_only=True):
    """`missing_regions`: how many regions of 1 MiB have changed without the source, by each member of the record that
    can still be read; members that cannot be read, and those that kept no map of it, are in `unknown`."""

    volume: str
    source: str
    epoch: int
    replicas: tuple[ReplicaFinding, ...]
    missing_regions: dict[str, int]
    unknown: tuple[str, ...]

    def losses(self) -> str:
        """What may be lost, in words."""
        known = [
            f"replica {name} has noted {count} regions of {REGION_SIZE >> 20} MiB that changed while {self.source} was "
            "away"
            for name, count in sorted(self.missing_regions.items())
        ]
        if self.unknown:
            known.append(
                f"what changed while {self.source} was away is not known: no map of {', '.join(self.unknown)} tells"
            )
        return "; ".join(known)


def examine(paths: VolumePaths, source: str, *, force: bool) -> SalvagePlan:
    """What would come of it; changes nothing. The caller holds the volume's lock.

    Raises UsageError, SalvageRefusedError (when nothing needs it, or `source` cannot be used), RecordError.
    """
    record = read_record(paths)
    names = [replica.name for replica in record.replicas]
    if source not in names:
        raise UsageError(f"volume {record.volume} has no replica {source!r}; it has {', '.join(names)}")
    found = tuple(_look(paths.replica(name), name, name in record.in_sync) for name in names)
    healthy = [finding.name for finding in found if finding.in_sync and finding.sound]
    if healthy:
        raise SalvageRefusedError(
            record.volume,
            f"{', '.join(healthy)} {'is' if len(healthy) == 1 else 'are'} in sync and in order, so nothing needs to be "
            f"salvaged: `share-manager serve {record.volume}`. If the data there is not what you want, set the "
            "directory aside first",
        )
    chosen = next(finding for finding in found if finding.name == source)
    if chosen.survey is None:
        raise SalvageRefusedError(record.volume, f"replica {source} cannot be used: {chosen.problem}")
    if chosen.survey.info.uuid != record.uuid:
        raise SalvageRefusedError(record.volume, f"the directory of {source} belongs to another volume")
    if chosen.survey.info.rebuilding and not force:
        raise SalvageRefusedError(
            record.volume,
            f"replica {source} was being filled when that was cut off, so it is a mixture of old, new and nothing: "
            "take another one, or add --force",
        )
    members = [finding for finding in found if finding.in_sync and finding.name != source]
    missing = {
        member.name: member.survey.changes[source]
        for member in members
        if member.survey is not None and source in member.survey.changes
    }
    return SalvagePlan(
        volume=record.volume,
        source=source,
        epoch=_next_epoch(record, found),
        replicas=found,
        missing_regions=missing,
        unknown=tuple(member.name for member in members if member.name not in missing),
    )


def _look(directory: Path, name: str, in_sync: bool) -> ReplicaFinding:
    survey, problem = None, ""
    try:
        survey = survey_replica(directory)
    except StoreError as error:
        problem = error.reason
    return ReplicaFinding(name=name, directory=str(directory), in_sync=in_sync, survey=survey, problem=problem)


def _next_epoch(record: VolumeRecord, found: tuple[ReplicaFinding, ...]) -> int:
    # a record that was restored from a copy may know less than the replicas, which would refuse it for ever
    return max([record.epoch, *(one.survey.info.epoch for one in found if one.survey is not None)]) + 1


def salvage(paths: VolumePaths, plan: SalvagePlan) -> VolumeRecord:
    """Make the record name the source alone. The caller holds the volume's lock.

    Cut off anywhere, the volume is as before or as after, and the same command can be given again.
    Raises StoreError, RecordError, OSError.
    """
    record = readdress(paths, read_record(paths))
    directory = paths.replica(plan.source)
    others = [replica.name for replica in record.replicas if replica.name != plan.source]
    take_as_source(directory, size=record.size, others=others)
    # clients' locks are those of another past
    replace_file(paths.drop_recovery, b"", mode=0o600)
    salvaged = record.next(epoch=plan.epoch, in_sync=(plan.source,))
    FileRecordStore(paths.record).swap(record.version, salvaged)
    # last: with the mark a member is no sound one, and this command can be given again
    call_complete(directory)
    return salvaged
