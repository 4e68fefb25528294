"""Where a volume's record is, for the share manager and for the engine that it starts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec
import trio

from engine.errors import RecordError, RecordMissingError
from engine.launch import EngineConfig
from engine.record import FileRecordStore, RecordStore, VolumeRecord, bump_epoch
from engine.records import Lease, RecordsClient, RemoteRecordStore
from share_manager.errors import FencedOffError
from share_manager.events import Reporter
from share_manager.paths import VolumePaths
from share_manager.share.lifeline import Lifeline

_ASK_AGAIN = 1.0
_T = TypeVar("_T")


class Records(Protocol):
    """A volume's record, for the share manager and for its engine."""

    @property
    def store(self) -> RecordStore: ...

    def claim(self) -> VolumeRecord:
        """The record with the next epoch, for a new attachment. Blocks. Raises RecordError, FencedOffError."""

    def configure(self, config: EngineConfig) -> EngineConfig:
        """Tell an engine where the record is."""


async def once_there(ask: Callable[[], Awaitable[_T]], report: Reporter) -> _T:
    """What `ask` returns, as soon as it raises no RecordError but a RecordMissingError."""
    told = False
    while True:
        try:
            return await ask()
        except RecordMissingError:
            raise
        except RecordError as error:
            if not told:
                report.warn("records_away", f"{error}; waiting for it", reason=str(error))
            told = True
            await trio.sleep(_ASK_AGAIN)


class FileRecords:
    """In the volume's directory."""

    def __init__(self, paths: VolumePaths) -> None:
        self._path = paths.record

    @property
    def store(self) -> FileRecordStore:
        return FileRecordStore(self._path)

    def claim(self) -> VolumeRecord:
        return bump_epoch(self.store)

    def configure(self, config: EngineConfig) -> EngineConfig:
        return msgspec.structs.replace(config, record=str(self._path))


class ServedRecords:
    """On a record server, which an engine asks with a connection of its own.

    `ours` says whether a lease is: a holder that attaches anew, after it was cut off, must not take the volume from
    whoever has the lease since. `lifeline`: of its engines.
    """

    def __init__(
        self, client: RecordsClient, volume: str, secret_file: Path, ours: Callable[[Lease], bool] = lambda _: True
    ) -> None:
        self.store: RecordStore = RemoteRecordStore(client, volume)
        self._client = client
        self._ours = ours
        self._address = client.address
        self._volume = volume
        self._secret_file = secret_file
        self.lifeline: Lifeline | None = None

    def claim(self) -> VolumeRecord:
        return bump_epoch(self.store, check=self._check)

    def _check(self) -> None:
        lease, _ = self._client.read_lease(self._volume)
        if not self._ours(lease):
            raise FencedOffError(self._volume, f"{lease.holder or 'nobody'} has the lease")

    def configure(self, config: EngineConfig) -> EngineConfig:
        config = msgspec.structs.replace(
            config, record=self._volume, records=self._address, records_secret_file=str(self._secret_file)
        )
        if self.lifeline is None:
            return config
        return msgspec.structs.replace(config, lifeline_fd=self.lifeline.engine, lease_instance=self.lifeline.instance)
