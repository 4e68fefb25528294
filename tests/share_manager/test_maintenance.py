"""The engine of a volume that nobody serves, and of one that somebody does."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.client import EngineOperationError
from engine.operations import Operation
from engine.record import FileRecordStore
from share_manager.errors import VolumeBusyError
from share_manager.events import ListSink, Reporter
from share_manager.maintenance import engine_of
from share_manager.paths import VolumePaths
from share_manager.volumes import create_volume, make_data_dir, volume_lock

pytestmark = pytest.mark.system


class Unheard(Operation, frozen=True, tag="unheard"):
    pass


@pytest.fixture
def paths(root: None, tmp_path: Path) -> VolumePaths:
    paths = VolumePaths(make_data_dir(tmp_path), "idle")
    with volume_lock(paths, "first"):
        create_volume(paths, size=64 << 20, replicas=2)
    return paths


async def test_a_volume_that_nobody_uses_gets_an_engine_without_a_file(paths: VolumePaths) -> None:
    async with engine_of(paths, Reporter(ListSink()), "first") as client:
        status = await client.status()
        assert (status.frontend, status.block_file, status.epoch) == ("none", "", 1)
        # whoever comes second gets the same engine
        async with engine_of(paths, Reporter(ListSink()), "first") as second:
            assert (await second.status()).pid == status.pid
        with pytest.raises(EngineOperationError, match="does not know the operation 'unheard'"):
            await client.run(Unheard(), Operation)
    assert not paths.run.exists()
    record = FileRecordStore(paths.record).read()
    assert (record.epoch, record.in_sync) == (1, ("r1", "r2"))


async def test_a_volume_that_is_being_changed_is_busy(paths: VolumePaths) -> None:
    with volume_lock(paths, "first"), pytest.raises(VolumeBusyError):
        async with engine_of(paths, Reporter(ListSink()), "before it is looked at"):
            pass
