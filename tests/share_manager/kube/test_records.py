"""The record of a volume at a real API server: what every record store has to do, and what is its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import msgspec
import pytest
import trio

from engine.errors import RecordConflictError, RecordError, RecordMissingError
from engine.launch import EngineConfig
from engine.record import VolumeRecord as EngineRecord
from engine.record import bump_epoch
from share_manager.kube.blocking import BlockingClient
from share_manager.kube.client import Client
from share_manager.kube.engine import open_store
from share_manager.kube.errors import ApiAwayError
from share_manager.kube.meta import ObjectMeta
from share_manager.kube.records import KubeRecords, KubeRecordStore, LostHolderError, StorePlace, to_engine, with_engine
from share_manager.kube.resources import RecordedReplica, VolumeRecord, VolumeRecordSpec
from tests.lab.control_plane import ControlPlane

T = TypeVar("T")
UUID = "6d1a1f4e-0000-4000-8000-000000000001"


def spec(**changes: object) -> VolumeRecordSpec:
    replicas = tuple(
        RecordedReplica(name=f"r{n}", node=f"n{n}", address=f"tcp:10.0.0.{n}:7500", directory=f"replicas/v/r{n}")
        for n in (1, 2)
    )
    made = VolumeRecordSpec(uuid=UUID, size=1 << 30, replicas=replicas, in_sync=("r1", "r2"), holder="one")
    return msgspec.structs.replace(made, **changes)


def test_nothing_is_lost_on_the_way() -> None:
    record = to_engine(VolumeRecord(metadata=ObjectMeta(name="v"), spec=spec(unformatted=True)))
    changed = record.next(epoch=7, in_sync=("r1",), reverted_without=("r2",))
    there = with_engine(spec(unformatted=True), changed)
    assert to_engine(VolumeRecord(metadata=ObjectMeta(name="v"), spec=there)) == changed
    assert (there.holder, there.unformatted) == ("one", True)


def test_a_newer_format_is_refused() -> None:
    with pytest.raises(RecordError, match="use the newer release"):
        to_engine(VolumeRecord(metadata=ObjectMeta(name="v"), spec=spec(format=99)))


async def blocking(call: Callable[[], T]) -> T:
    return await trio.to_thread.run_sync(call)


@pytest.fixture
async def record(kube: Client) -> VolumeRecord:
    return await kube.create(VolumeRecord(metadata=ObjectMeta(name="v"), spec=spec()))


class Stores:
    def __init__(self, plane: ControlPlane, namespace: str) -> None:
        self._plane = plane
        self._namespace = namespace
        self.opened: list[KubeRecordStore] = []

    def __call__(
        self, holder: str = "one", timeout: float = 3.0, client: type[BlockingClient] = BlockingClient
    ) -> KubeRecordStore:
        made = KubeRecordStore(client(self._plane.admin, namespace=self._namespace, timeout=timeout), "v", holder)
        self.opened.append(made)
        return made


@pytest.fixture
def store(control_plane: ControlPlane, kube_namespace: str) -> Iterator[Stores]:
    stores = Stores(control_plane, kube_namespace)
    yield stores
    for one in stores.opened:
        one.close()


@pytest.mark.system
async def test_it_is_a_record_store(kube: Client, record: VolumeRecord, store: Stores) -> None:
    mine, other = (store() for _ in range(2))
    first = await blocking(mine.read)
    assert first == to_engine(record)
    await blocking(lambda: mine.swap(1, first.next(in_sync=("r1",))))
    with pytest.raises(RecordConflictError) as caught:
        await blocking(lambda: other.swap(1, first.next(in_sync=("r2",))))
    assert (caught.value.expected, caught.value.found) == (1, 2)
    assert (await blocking(other.read)).in_sync == ("r1",)
    with pytest.raises(RecordError, match="never become empty"):
        await blocking(lambda: mine.swap(2, first.next(in_sync=())))
    await kube.delete(VolumeRecord, "v")
    with pytest.raises(RecordMissingError):
        await blocking(mine.read)


@pytest.mark.system
async def test_epochs_claimed_at_once_are_all_different(kube: Client, record: VolumeRecord, store: Stores) -> None:
    claimed: list[int] = []
    lock = threading.Lock()

    def claim() -> None:
        one = store()
        for _ in range(4):
            got = bump_epoch(one, attempts=100).epoch
            with lock:
                claimed.append(got)

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(trio.to_thread.run_sync, claim)
    assert sorted(claimed) == list(range(1, 17))
    assert (await kube.get(VolumeRecord, "v")).spec.epoch == 16


@pytest.mark.system
async def test_whoever_is_not_the_holder_any_more_writes_nothing(
    kube: Client, record: VolumeRecord, store: Stores
) -> None:
    old = store()
    known = await blocking(old.read)
    await kube.patch(VolumeRecord, "v", {"spec": {"holder": "two", "epoch": 5, "version": 2}})
    for call in (
        lambda: old.swap(1, known.next(in_sync=("r1",))),
        lambda: old.swap(2, known.next(epoch=6)),
        lambda: bump_epoch(old),
        old.formatted,
        old.read,
    ):
        with pytest.raises(LostHolderError, match="given to two, this is one"):
            await blocking(call)
    assert (await kube.get(VolumeRecord, "v")).spec == spec(holder="two", epoch=5, version=2)


class LosesAnswers(BlockingClient):
    """Does what it is asked for, and says that it did not."""

    def replace(self, item):  # type: ignore[no-untyped-def]
        super().replace(item)
        raise ApiAwayError("replace volumerecords/v", "the answer is lost")


@pytest.mark.system
async def test_a_change_whose_answer_was_lost_is_no_conflict_with_itself(
    kube: Client, record: VolumeRecord, store: Stores
) -> None:
    loses = store(client=LosesAnswers)
    other = store()
    known = await blocking(loses.read)
    change = known.next(in_sync=("r1",))
    with pytest.raises(RecordError, match="lost"):
        await blocking(lambda: loses.swap(1, change))
    # the very same change by somebody else is one
    with pytest.raises(RecordConflictError):
        await blocking(lambda: other.swap(1, change))
    await blocking(lambda: loses.swap(1, change))
    assert (await blocking(other.read)).in_sync == ("r1",)
    # and so it is once somebody else has changed it since
    following = change.next(in_sync=("r1", "r2"))
    with pytest.raises(RecordError):
        await blocking(lambda: loses.swap(2, following))
    await blocking(lambda: other.swap(3, following.next(epoch=9)))
    with pytest.raises(RecordConflictError):
        await blocking(lambda: loses.swap(2, following))


@pytest.mark.system
async def test_an_api_server_that_is_away_or_hangs_is_a_record_that_cannot_be_had(
    kube: Client, record: VolumeRecord, control_plane: ControlPlane, store: Stores
) -> None:
    mine = store(timeout=0.5)
    known = await blocking(mine.read)
    with control_plane.paused():
        for call in (mine.read, lambda: mine.swap(1, known.next(in_sync=("r1",)))):
            with trio.fail_after(5), pytest.raises(RecordError):
                await blocking(call)
    with control_plane.away(), pytest.raises(RecordError, match="refused"):
        await blocking(mine.read)
    await blocking(lambda: mine.swap(1, known.next(in_sync=("r1",))))
    assert (await blocking(mine.read)).in_sync == ("r1",)


@pytest.mark.system
async def test_the_engine_opens_the_same_store(
    kube: Client, record: VolumeRecord, control_plane: ControlPlane, store: Stores
) -> None:
    place = StorePlace(
        namespace=kube.namespace, holder="one", kubeconfig=str(control_plane.kubeconfig(namespace=kube.namespace))
    )
    records = KubeRecords("v", place)
    config = records.configure(EngineConfig(record="", secret_file="", epoch=1, control=""))
    assert config.module == "share_manager.kube.engine"
    opened = await blocking(lambda: open_store(config))
    store.opened += [opened, records.marks]
    assert await blocking(opened.read) == to_engine(record)
    lost = msgspec.structs.replace(place, kubeconfig="/nowhere")
    broken = msgspec.structs.replace(config, records=msgspec.json.encode(lost).decode())
    with pytest.raises(RecordError, match="no way to a Kubernetes API server"):
        open_store(broken)


@pytest.mark.system
async def test_formatted_once_is_formatted(kube: Client, store: Stores) -> None:
    await kube.create(VolumeRecord(metadata=ObjectMeta(name="v"), spec=spec(unformatted=True)))
    mine = store()
    assert await blocking(mine.unformatted)
    version = (await blocking(mine.read)).version
    await blocking(mine.formatted)
    await blocking(mine.formatted)
    assert not await blocking(mine.unformatted)
    # it is no change of what the engine knows
    found: EngineRecord = await blocking(mine.read)
    assert found.version == version
