"""What a node's agent decides, and what it erases."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.errors import RecordError
from engine.store import create_replica
from share_manager.errors import DiskError
from share_manager.kube.informer import Informer
from share_manager.kube.meta import ObjectMeta
from share_manager.kube.resources import (
    RecordedReplica,
    Replica,
    ReplicaSpec,
    VolumeRecord,
    VolumeRecordSpec,
)
from share_manager.node.host import ReplicaState
from share_manager.pods.agent import RecordsOfTheNode, erase, look_at_disk, replica_status

UUID = "6d1a1f4e-0000-4000-8000-000000000001"
NOW = "2026-01-01T00:00:00Z"


def record() -> VolumeRecord:
    replicas = tuple(
        RecordedReplica(name=f"r{n}", node=f"n{n}", address=f"tcp:10.0.0.{n}:7500", directory=f"replicas/v/r{n}")
        for n in (1, 2)
    )
    spec = VolumeRecordSpec(uuid=UUID, size=1 << 30, replicas=replicas, in_sync=("r1", "r2"))
    return VolumeRecord(metadata=ObjectMeta(name="v", namespace="s"), spec=spec)


def replica(name: str = "r1", deleting: bool = False) -> Replica:
    meta = ObjectMeta(name=f"v-{name}", namespace="s", deletion_timestamp=NOW if deleting else None)
    spec = ReplicaSpec(volume="v", replica=name, node="n1", port=7500, size=1 << 30, volume_uuid=UUID)
    return Replica(metadata=meta, spec=spec)


@pytest.mark.parametrize(
    ("state", "said", "status"),
    [
        (None, "pending", "False"),
        (ReplicaState(), "pending", "False"),
        (ReplicaState(listening=True, restarts=3), "running", "True"),
        (ReplicaState(failure="its disk is not mounted"), "failed", "False"),
    ],
)
def test_a_replica_is_as_its_server_is(state: ReplicaState | None, said: str, status: str) -> None:
    told = replica_status(replica(), record(), state, now=NOW)
    assert told.state == said
    assert [one.status for one in told.conditions] == [status]
    assert (told.address, told.directory) == ("tcp:10.0.0.1:7500", "replicas/v/r1")
    assert told.restarts == (state.restarts if state else 0)
    # nothing is written when nothing changes
    again = replica_status(replica(), record(), state, now="2027-01-01T00:00:00Z")
    assert (again.state, again.address) == (told.state, told.address)


def test_one_that_is_deleted_is_served_no_more() -> None:
    records: Informer[VolumeRecord] = Informer(None, VolumeRecord)  # type: ignore[arg-type]
    replicas: Informer[Replica] = Informer(None, Replica)  # type: ignore[arg-type]
    source = RecordsOfTheNode(records, replicas)
    with pytest.raises(RecordError, match="not told yet"):
        source.list_records()
    records.synced.set()
    replicas.synced.set()
    records.store.put(record())
    replicas.store.put(replica("r1", deleting=True))
    replicas.store.put(replica("r2"))
    (found,) = source.list_records()
    assert [one.name for one in found.replicas] == ["r2"]


def test_a_disk(tmp_path: Path) -> None:
    found = look_at_disk(tmp_path / "data")
    assert found.problem == ""
    assert found.uuid
    assert found == look_at_disk(tmp_path / "data")
    (tmp_path / "file").touch()
    assert look_at_disk(tmp_path / "file").problem


def test_only_the_replica_itself_is_erased(tmp_path: Path) -> None:
    data = tmp_path / "data"
    mine, other = data / "replicas/v/r1", data / "replicas/w/r1"
    for place, uuid in ((mine, UUID), (other, UUID.replace("1", "2"))):
        create_replica(place, volume="v", uuid=uuid, replica="r1", size=1 << 20, rebuilding=False)
    with pytest.raises(DiskError, match="another volume"):
        erase(other, data, UUID)
    with pytest.raises(DiskError, match="not below"):
        erase(tmp_path, data, UUID)
    with pytest.raises(DiskError, match="not below"):
        erase(data / "replicas/../..", data, UUID)
    erase(mine, data, UUID)
    erase(mine, data, UUID)
    assert not mine.parent.exists()
    assert other.exists()
