"""A volume's record as an object of the API: `engine.record.RecordStore`, by compare-and-swap of its resourceVersion.

Besides what the engine knows the object says whose attachment is meant to have the volume, `holder`. Only the
controller changes that, together with the epoch; whoever is not the holder any more cannot write, so a share that was
replaced can neither claim another epoch nor change who is in sync.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from engine.errors import RecordConflictError, RecordError, RecordMissingError
from engine.launch import EngineConfig
from engine.record import RECORD_FORMAT, PendingRevert, RecordStore, ReplicaRecord, bump_epoch
from engine.record import VolumeRecord as EngineRecord
from share_manager.kube.access import Access, find_access
from share_manager.kube.blocking import BlockingClient
from share_manager.kube.errors import ApiAwayError, ConflictError, KubeError, NotFoundError
from share_manager.kube.resources import (
    GROUP,
    RecordedReplica,
    RecordedRevert,
    VolumeRecord,
    VolumeRecordSpec,
)

ATTEMPT_ANNOTATION = f"{GROUP}/attempt"
"""A random name of the last change, so that whoever got no answer to it recognises it as its own."""


class LostHolderError(RecordError):
    """Another share was given the volume."""

    def __init__(self, volume: str, ours: str, holder: str) -> None:
        super().__init__(volume, ours, holder)
        self.volume = volume
        self.ours = ours
        self.holder = holder

    def __str__(self) -> str:
        return f"volume {self.volume!r} was given to {self.holder or 'nobody'}, this is {self.ours}"


def to_engine(found: VolumeRecord) -> EngineRecord:
    """Raises RecordError for a format that is newer than this release."""
    spec = found.spec
    if spec.format > RECORD_FORMAT:
        raise RecordError(
            f"the volume record {found.key} has format {spec.format}, this release knows {RECORD_FORMAT}: "
            "use the newer release"
        )
    pending = spec.pending
    return EngineRecord(
        format=spec.format,
        volume=found.metadata.name,
        uuid=spec.uuid,
        size=spec.size,
        version=spec.version,
        epoch=spec.epoch,
        replicas=tuple(
            ReplicaRecord(name=one.name, address=one.address, directory=one.directory, node=one.node)
            for one in spec.replicas
        ),
        in_sync=spec.in_sync,
        pending=None if pending is None else PendingRevert(revert=pending.revert, created=pending.created),
        reverted_without=spec.reverted_without,
    )


def with_engine(spec: VolumeRecordSpec, record: EngineRecord) -> VolumeRecordSpec:
    """`spec` with what the engine says. What only the controller knows stays."""
    pending = record.pending
    return msgspec.structs.replace(
        spec,
        format=record.format,
        size=record.size,
        version=record.version,
        epoch=record.epoch,
        replicas=tuple(
            RecordedReplica(name=one.name, node=one.node, address=one.address, directory=one.directory)
            for one in record.replicas
        ),
        in_sync=record.in_sync,
        pending=None if pending is None else RecordedRevert(revert=pending.revert, created=pending.created),
        reverted_without=record.reverted_without,
    )


class KubeRecordStore:
    """`engine.record.RecordStore` of one volume, for the share whose instance is `holder`."""

    def __init__(self, client: BlockingClient, volume: str, holder: str) -> None:
        self._client = client
        self._volume = volume
        self._holder = holder
        self._unanswered: tuple[int, EngineRecord, str] | None = None

    def close(self) -> None:
        """Ends the connection; another one is made when it is needed."""
        self._client.close()

    def read(self) -> EngineRecord:
        """Raises RecordMissingError, LostHolderError, RecordError."""
        return to_engine(self._get())

    def swap(self, expected_version: int, new: EngineRecord) -> None:
        """Raises RecordConflictError, LostHolderError, RecordError."""
        if not new.in_sync:
            raise RecordError("the in-sync set of a volume must never become empty")
        known = self._unanswered
        # the same change, asked for once more because its answer was lost, keeps its name
        again = known is not None and known[:2] == (expected_version, new)
        attempt = known[2] if known is not None and again else os.urandom(12).hex()
        found = self._get()
        if again and found.metadata.annotations.get(ATTEMPT_ANNOTATION) == attempt:
            self._unanswered = None
            return
        if found.spec.version != expected_version:
            self._unanswered = None
            raise RecordConflictError(expected_version, found.spec.version)
        meta = msgspec.structs.replace(
            found.metadata, annotations=found.metadata.annotations | {ATTEMPT_ANNOTATION: attempt}
        )
        changed = VolumeRecord(metadata=meta, spec=with_engine(found.spec, new))
        self._unanswered = expected_version, new, attempt
        try:
            self._client.replace(changed)
        except ConflictError:
            self._unanswered = None
            raise RecordConflictError(expected_version, self._get().spec.version) from None
        except ApiAwayError as error:
            raise RecordError(str(error)) from error
        except KubeError as error:
            self._unanswered = None
            raise RecordError(str(error)) from error
        self._unanswered = None

    def unformatted(self) -> bool:
        """No client was ever served. Raises RecordError."""
        return self._get().spec.unformatted

    def formatted(self) -> None:
        """A client may be served from now on. Raises RecordError, LostHolderError."""
        while True:
            found = self._get()
            if not found.spec.unformatted:
                return
            spec = msgspec.structs.replace(found.spec, unformatted=False)
            try:
                self._client.replace(msgspec.structs.replace(found, spec=spec))
            except ConflictError:
                continue
            except KubeError as error:
                raise RecordError(str(error)) from error
            return

    def _get(self) -> VolumeRecord:
        try:
            found = self._client.get(VolumeRecord, self._volume)
        except NotFoundError:
            raise RecordMissingError(Path(f"volumerecords/{self._client.namespace}/{self._volume}")) from None
        except KubeError as error:
            raise RecordError(str(error)) from error
        if found.spec.holder != self._holder:
            raise LostHolderError(self._volume, self._holder, found.spec.holder)
        return found


class StorePlace(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine needs to open the store: `kubeconfig` is empty in a pod."""

    namespace: str
    holder: str
    kubeconfig: str = ""

    def access(self) -> Access:
        """Raises AccessError."""
        return find_access(Path(self.kubeconfig) if self.kubeconfig else None)


class KubeRecords:
    """`share_manager.share.records.Records`. The engine asks with a connection of its own."""

    def __init__(self, volume: str, place: StorePlace) -> None:
        """Raises AccessError."""
        self._volume = volume
        self._place = place
        self.marks = KubeRecordStore(BlockingClient(place.access(), namespace=place.namespace), volume, place.holder)
        self.store: RecordStore = self.marks

    def claim(self) -> EngineRecord:
        return bump_epoch(self.store)

    def configure(self, config: EngineConfig) -> EngineConfig:
        return msgspec.structs.replace(
            config,
            module="share_manager.kube.engine",
            record=self._volume,
            records=msgspec.json.encode(self._place).decode(),
        )
