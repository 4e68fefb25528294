"""A clone becomes independent while it is used: real replicas, in processes of their own, that share data."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import trio

from engine.controller import clone, purge, snapshots
from engine.controller.driver import Controller
from engine.controller.progress import Progress
from engine.errors import EngineError
from engine.operations import CloneFinish, SnapshotCreate, SnapshotDelete
from engine.store import Store, create_replica, link_replica, read_origin
from tests.engine.cluster import UUID, Cluster, cluster, until

MIB = 1 << 20
SIZE = 32 * MIB


class Clone:
    def __init__(self, base: Path) -> None:
        chance = random.Random(7)
        content = bytearray(SIZE)
        create_replica(base / "source", volume="src", uuid="other", replica="r1", size=SIZE)
        store = Store.open(base / "source")
        for name in ("old", "then"):
            for at in sorted(chance.sample(range(30), 12)):
                content[at * MIB : (at + 1) * MIB] = data = chance.randbytes(MIB)
                store.write(at * MIB, data)
            store.snapshot(name)
        store.close()
        self.content = bytes(content)
        self.cluster = Cluster(base, replicas=2, size=SIZE)
        for name in self.cluster.names:
            shutil.rmtree(base / name)
            link_replica(base / "source", "then", base / name, volume="vol", uuid=UUID, replica=name)
        self.cluster.start()

    def linked(self) -> list[bool]:
        return [read_origin(self.cluster.directory / name) is not None for name in self.cluster.names]


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Clone]:
    clone = Clone(tmp_path)
    yield clone
    clone.cluster.abandon()


async def check(controller: Controller, content: bytes) -> None:
    for at in range(0, SIZE, MIB):
        assert await controller.read(at, MIB) == content[at : at + MIB]


def copied(controller: Controller, least: int) -> bool:
    status = controller.puller.status
    return status is not None and status.done > least


async def test_a_clone_is_pulled_by_itself_while_it_is_written_to(made: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clone, "RATE", 16 * MIB)
    content = bytearray(made.content)
    async with made.cluster.attached() as controller:
        await check(controller, made.content)
        await until(partial(copied, controller, 0))
        status = controller.puller.status
        assert status is not None
        assert (status.origin, status.failure) == ("src@then", "")
        assert 0 < status.done <= status.total
        assert status == controller.status("none", "").clone
        await controller.write(5 * MIB + 10, b"new")
        content[5 * MIB + 10 : 5 * MIB + 13] = b"new"
        # snapshots are taken and deleted meanwhile
        await snapshots.create(controller, SnapshotCreate(name="own"), Progress())
        await snapshots.create(controller, SnapshotCreate(name="newer"), Progress())
        await snapshots.delete(controller, SnapshotDelete(name="own"), Progress())
        progress = Progress()
        done = await clone.finish(controller, CloneFinish(rate=0), progress)
        assert done.origin == "src@then"
        assert progress.latest is not None
        assert controller.puller.status is None
        assert (await clone.finish(controller, CloneFinish(), Progress())).origin == ""
        await check(controller, bytes(content))
        await controller.purger.finish()
        listing = (await controller.chains.listings())["r1"].snapshots
        assert [entry.name for entry in listing] == ["then", "newer"]
    assert made.linked() == [False, False]


async def test_a_replica_that_dies_in_the_middle_goes_on_later(made: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clone, "RATE", 8 * MIB)
    async with made.cluster.attached() as controller:
        await until(partial(copied, controller, 4 * MIB))
        made.cluster.kill("r2")
        await until(lambda: controller.core.members(controller.core.in_sync) == ("r1",))
        await controller.write(0, b"while it was away")
        await clone.finish(controller, CloneFinish(rate=0), Progress())
        assert made.linked() == [False, True]
        made.cluster.start("r2")
        await until(lambda: controller.core.members(controller.core.in_sync) == ("r1", "r2"))
        await clone.finish(controller, CloneFinish(rate=0), Progress())
        assert made.linked() == [False, False]
        content = b"while it was away" + made.content[17:]
        await check(controller, content)
        made.cluster.kill("r1")
        await check(controller, content)


async def test_an_engine_that_ends_leaves_the_rest_to_the_next(made: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clone, "RATE", 8 * MIB)
    for _ in range(2):
        async with made.cluster.attached() as controller:
            await until(partial(copied, controller, 4 * MIB))
            await check(controller, made.content)
    assert made.linked() == [True, True]
    async with made.cluster.attached() as controller:
        await clone.finish(controller, CloneFinish(rate=0), Progress())
        await check(controller, made.content)


async def test_why_it_does_not_get_on_is_said(made: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    (made.cluster.directory / "r1" / "origin.img").mkdir()
    async with made.cluster.attached() as controller:
        with trio.fail_after(20), pytest.raises(EngineError, match=r"vol still shares the data of src@then: "):
            await clone.finish(controller, CloneFinish(rate=0), Progress())
        # no harm is done, and it is tried again
        assert controller.core.members(controller.core.in_sync) == ("r1", "r2")
        await check(controller, made.content)


async def test_what_a_clone_shared_is_merged_away_when_it_is_independent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(purge, "RETRY_SECONDS", 0.3)
    with cluster(tmp_path, replicas=2, size=SIZE) as source:
        async with source.attached() as controller:
            for name in ("a", "b"):
                await controller.write(0, name.encode() * MIB)
                await snapshots.create(controller, SnapshotCreate(name=name), Progress())
            link_replica(tmp_path / "r1", "b", tmp_path / "copy", volume="vol2", uuid="u", replica="r1")
            await snapshots.delete(controller, SnapshotDelete(name="a"), Progress())
            await controller.purger.finish()
            found = await controller.chains.listings()
            assert {name: [one.name for one in reply.snapshots] for name, reply in found.items()} == {
                "r1": ["a", "b"],
                "r2": ["b"],
            }
            assert controller.purger.failure == ""
            copy = Store.open(tmp_path / "copy")
            copy.pull()
            assert copy.read(0, MIB) == b"b" * MIB
            copy.close()
            with trio.fail_after(20):
                while len((await controller.chains.listings())["r1"].snapshots) > 1:
                    await trio.sleep(0.05)
            assert await controller.read(0, MIB) == b"b" * MIB
