"""Which of what lies on the nodes' disks may be taken for all of a volume."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest
from structlog.testing import CapturingLogger

from engine.store import Store, create_replica
from share_manager.controllers.actions import Create
from share_manager.controllers.volume import VolumeSeen, decide
from share_manager.errors import AdoptionError, VolumeExistsError
from share_manager.kube.client import Client
from share_manager.kube.meta import ObjectMeta
from share_manager.kube.resources import (
    FINALIZER,
    RecordedReplica,
    Replica,
    StorageNode,
    Volume,
    VolumeRecord,
    VolumeRecordSpec,
    VolumeSpec,
)
from share_manager.pods import orphans
from share_manager.pods.adopt import Found, adopt, plan, survey
from share_manager.pods.orphans import COPY, ObjectsCopy, find_orphans, keep

UUID = "6d1a1f4e-0000-4000-8000-000000000001"
OTHER = "6d1a1f4e-0000-4000-8000-000000000002"
SIZE = 16 << 20


def record(
    *, epoch: int = 3, version: int = 7, in_sync: tuple[str, ...] = ("r1", "r2"), uuid: str = UUID
) -> VolumeRecordSpec:
    replicas = tuple(
        RecordedReplica(
            name=f"r{n}", node=f"n{n}", address=f"tcp:10.0.0.{n}:750{n}", directory=f"replicas/v-6d1a1f4e/r{n}"
        )
        for n in (1, 2, 3)
    )
    return VolumeRecordSpec(
        uuid=uuid, size=SIZE, epoch=epoch, version=version, holder="abcde", replicas=replicas, in_sync=in_sync
    )


def copy(of: VolumeRecordSpec) -> ObjectsCopy:
    return ObjectsCopy(volume="v", spec=VolumeSpec(size=SIZE, filesystem="xfs"), record=of)


def lay_down(
    data: Path, name: str, of: VolumeRecordSpec, *, epoch: int = 3, rebuilding: bool = False, directory: str = ""
) -> Path:
    place = data / (directory or f"replicas/v-6d1a1f4e/{name}")
    create_replica(place, volume="v", uuid=of.uuid, replica=name, size=SIZE, rebuilding=rebuilding)
    store = Store.open(place, "buffered")
    store.set_token(epoch, 1)
    store.close()
    keep(place, copy(of))
    return place


def on(node: str, data: Path) -> list[Found]:
    return [Found(node=node, orphan=orphan) for orphan in find_orphans(data, ())]


ADDRESSES = {"n1": "10.0.0.1", "n2": "10.9.9.2", "n3": "10.0.0.3", "n4": "10.0.0.4"}


def test_all_of_it_is_there(tmp_path: Path) -> None:
    found = []
    for n, node in ((1, "n1"), (2, "n2")):
        lay_down(tmp_path / node, f"r{n}", record())
        found += on(node, tmp_path / node)
    # an older copy changes nothing, wherever it is
    lay_down(tmp_path / "n3", "r3", record(epoch=2, version=5, in_sync=("r1", "r2", "r3")), epoch=2)
    found += on("n3", tmp_path / "n3")
    adoption = plan(UUID, found, ADDRESSES)
    assert adoption.adoptable.doubts == ()
    assert adoption.adoptable.present == ("r1", "r2", "r3")
    made = adoption.record
    assert (made.in_sync, made.epoch, made.version, made.holder, made.uuid) == (("r1", "r2"), 4, 8, "", UUID)
    # a node that has another address now
    assert [one.address for one in made.replicas] == ["tcp:10.0.0.1:7501", "tcp:10.9.9.2:7502", "tcp:10.0.0.3:7503"]
    assert adoption.spec.filesystem == "xfs"


def test_what_is_away_may_have_been_the_last(tmp_path: Path) -> None:
    lay_down(tmp_path, "r1", record())
    adoption = plan(UUID, on("n1", tmp_path), ADDRESSES)
    assert adoption.adoptable.doubts == ("replica r2 on n2 is not there, and may have been the last one in sync",)
    # with somebody's word for it
    assert adoption.record.in_sync == ("r1",)


def test_a_copy_that_is_behind_is_known_by_the_replicas_epoch(tmp_path: Path) -> None:
    lay_down(tmp_path / "n1", "r1", record(epoch=3, in_sync=("r1",)), epoch=3)
    lay_down(tmp_path / "n2", "r2", record(epoch=3, in_sync=("r1",)), epoch=5)
    adoption = plan(UUID, [*on("n1", tmp_path / "n1"), *on("n2", tmp_path / "n2")], ADDRESSES)
    (doubt,) = adoption.adoptable.doubts
    assert "has seen epoch 5, the newest copy of the record is of epoch 3" in doubt
    assert adoption.record.epoch == 6


def test_a_replica_that_is_incomplete_is_none(tmp_path: Path) -> None:
    lay_down(tmp_path / "n1", "r1", record(), rebuilding=True)
    with pytest.raises(AdoptionError, match="none of its replicas that are there was in sync"):
        plan(UUID, on("n1", tmp_path / "n1"), ADDRESSES)
    lay_down(tmp_path / "n2", "r2", record())
    adoption = plan(UUID, [*on("n1", tmp_path / "n1"), *on("n2", tmp_path / "n2")], ADDRESSES)
    assert adoption.adoptable.doubts == ("replica r1 on n1 is incomplete",)
    assert adoption.record.in_sync == ("r2",)


def test_a_disk_that_is_in_another_machine_now(tmp_path: Path) -> None:
    of = record(in_sync=("r1",))
    lay_down(tmp_path, "r1", of, directory="replicas/moved/r1")
    adoption = plan(UUID, on("n4", tmp_path), ADDRESSES)
    (where,) = (one for one in adoption.record.replicas if one.name == "r1")
    assert (where.node, where.address, where.directory) == ("n4", "tcp:10.0.0.4:7501", "replicas/moved/r1")


def test_only_what_nobody_claims_and_can_be_read_is_an_orphan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # where a log goes to depends on the tests before
    said = CapturingLogger()
    monkeypatch.setattr(orphans, "log", said)
    place = lay_down(tmp_path, "r1", record())
    lay_down(tmp_path, "r2", record())
    assert [one.replica for one in find_orphans(tmp_path, {(UUID, "r1")})] == ["r2"]
    assert find_orphans(tmp_path, {(UUID, "r1"), (UUID, "r2")}) == ()
    assert len(find_orphans(tmp_path, {(OTHER, "r1")})) == 2
    (place / COPY).write_bytes(b"{")
    assert [one.replica for one in find_orphans(tmp_path, ())] == ["r2"]
    assert any("cannot be read" in call.args[0] for call in said.calls)
    shutil.rmtree(tmp_path / "replicas")
    assert find_orphans(tmp_path, ()) == ()


def test_one_of_a_newer_release_is_left(tmp_path: Path) -> None:
    place = lay_down(tmp_path, "r1", record())
    keep(place, msgspec.structs.replace(copy(record()), format=2))
    with pytest.raises(AdoptionError, match="written in format 2, this release knows up to 1"):
        plan(UUID, on("n1", tmp_path), ADDRESSES)


def test_its_replicas_get_their_objects_back() -> None:
    meta = ObjectMeta(name="v", namespace="s", uid=OTHER, finalizers=(FINALIZER,))
    seen = VolumeSeen(
        volume=Volume(metadata=meta, spec=VolumeSpec(size=SIZE, replicas=3)),
        record=VolumeRecord(metadata=ObjectMeta(name="v", namespace="s"), spec=record()),
        replicas=(),
        share=None,
        service=None,
        nodes=(),
        every=(),
        suspects=frozenset(),
        busy=False,
        now="2026-01-01T00:00:00Z",
    )
    made = [one.body["spec"] for one in decide(seen) if isinstance(one, Create) and one.kind is Replica]
    assert [(one["replica"], one["node"], one["port"], one["volumeUuid"]) for one in made] == [
        ("r1", "n1", 7501, UUID),
        ("r2", "n2", 7502, UUID),
        ("r3", "n3", 7503, UUID),
    ]


@pytest.mark.system
async def test_against_an_api_server(kube: Client, tmp_path: Path) -> None:
    for n in (1, 2):
        lay_down(tmp_path / f"n{n}", f"r{n}", record())
    lay_down(tmp_path / "n1", "r1", record(uuid=OTHER, in_sync=("r1",)), directory="replicas/v-other/r1")
    for n in (1, 2):
        node = await kube.create(StorageNode(metadata=ObjectMeta(name=f"n{n}")))
        orphans = find_orphans(tmp_path / f"n{n}", ())
        status = msgspec.structs.replace(node.status, replica_address=f"10.0.0.{n}", orphans=orphans)
        await kube.update_status(node, msgspec.structs.replace(node, status=status))
    assert [(one.volume, one.uuid, one.in_sync) for one in await survey(kube)] == [
        ("v", UUID, ("r1", "r2")),
        ("v", OTHER, ("r1",)),
    ]
    with pytest.raises(AdoptionError, match=f"choose with --uuid one of {UUID}, {OTHER}"):
        await adopt(kube, "v")
    with pytest.raises(AdoptionError, match="no node has a replica of it that nobody claims"):
        await adopt(kube, "w")
    await adopt(kube, "v", uuid=UUID)
    made = (await kube.get(VolumeRecord, "v")).spec
    assert (made.uuid, made.in_sync, made.epoch, made.holder) == (UUID, ("r1", "r2"), 4, "")
    assert (await kube.get(Volume, "v")).spec.filesystem == "xfs"
    with pytest.raises(VolumeExistsError):
        await adopt(kube, "v", uuid=UUID)
    (other,) = await survey(kube)
    assert (other.uuid, other.doubts) == (OTHER, ("there is another volume v now",))
    # the record alone is gone
    volume = await kube.get(Volume, "v")
    await kube.update_status(
        volume, msgspec.structs.replace(volume, status=msgspec.structs.replace(volume.status, size=SIZE))
    )
    await kube.patch(VolumeRecord, "v", {"metadata": {"finalizers": None}})
    await kube.delete(VolumeRecord, "v")
    assert [one.uuid for one in await survey(kube)] == [UUID, OTHER]
    await adopt(kube, "v", uuid=UUID)
    assert (await kube.get(VolumeRecord, "v")).spec.in_sync == ("r1", "r2")
