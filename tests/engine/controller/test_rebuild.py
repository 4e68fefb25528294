from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random

import msgspec
import pytest
import trio

from engine.controller import rebuild, replicas
from engine.controller.chains import chain_of
from engine.controller.driver import Controller
from engine.controller.progress import Progress
from engine.errors import BusyError, LastReplicaError, ReplicaNameError
from engine.operations import ReplicaAdd, ReplicaRemove, ReplicaWait, ResyncLimit
from engine.store.chain import extents
from engine.store.layout import SNAPSHOT_IMAGE, read_volume_meta
from engine.store.rebuild import read_rebuild
from engine.wire import messages
from engine.wire.frame import FrameType
from tests.engine.cluster import Cluster, cluster, until

BLOCK = 4096
MIB = 1 << 20
WHEN = "2024-05-06T07:08:09Z"


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Cluster]:
    with cluster(tmp_path, replicas=2, size=32 * MIB) as made:
        yield made


def state(volume: Controller, name: str) -> str:
    return next(replica.state for replica in volume.status("", "").replicas if replica.name == name)


async def in_sync(volume: Controller, name: str) -> None:
    await until(lambda: state(volume, name) == "in_sync", what=f"{name} in sync")


async def snapshot(volume: Controller, name: str) -> None:
    await volume.flush()
    for connection in list(volume._connections.values()):
        await connection.call(FrameType.SNAPSHOT, messages.Snapshot(name=name, created=WHEN, labels={"of": name}))


async def scatter(volume: Controller, rng: Random, count: int) -> None:
    """Write some blocks here and there, so that every layer has holes."""
    for _ in range(count):
        await volume.write(rng.randrange(volume.size // BLOCK) * BLOCK, rng.randbytes(BLOCK))


async def history(volume: Controller, rng: Random) -> None:
    """Three snapshots, one of them marked as removed, and a head."""
    for name in ("a", "b", "c"):
        await scatter(volume, rng, 120)
        await volume.unmap(rng.randrange(16) * MIB, MIB)
        await snapshot(volume, name)
    for connection in list(volume._connections.values()):
        await connection.call(FrameType.REMOVE_SNAPSHOT, messages.RemoveSnapshot(name="b"))
    await scatter(volume, rng, 120)


async def merged(volume: Controller) -> None:
    """Removed snapshots are gone, each replica at its own pace."""
    volume.purger.kick()
    with trio.fail_after(20):
        for connection in list(volume._connections.values()):
            while any(entry.removed for entry in await chain_of(connection)):
                await trio.sleep(0.02)


def layers(directory: Path) -> dict[str, tuple[str, list[tuple[int, int, bytes]]]]:
    """Metadata, and extents with their data, of each image; the head's under the name of "head"."""
    head = read_volume_meta(directory).head
    found = {}
    for path in directory.iterdir():
        if path.name == head or SNAPSHOT_IMAGE.fullmatch(path.name):
            meta = path.with_name(f"{path.name}.meta").read_text()
            with path.open("rb") as image:
                size = os.fstat(image.fileno()).st_size
                data = [
                    (start, end, os.pread(image.fileno(), end - start, start))
                    for start, end in extents(image.fileno(), 0, size)
                ]
            if path.name == head:
                found["head"] = str(msgspec.json.decode(meta)["Parent"]), data
            else:
                found[path.name] = meta, data
    return found


def assert_same_layers(three: Cluster) -> None:
    expected = layers(three.directory / three.names[0])
    for name in three.names[1:]:
        found = layers(three.directory / name)
        assert found.keys() == expected.keys()
        for image, (meta, data) in expected.items():
            assert found[image][0] == meta, f"{image} of {name}"
            assert [extent[:2] for extent in found[image][1]] == [extent[:2] for extent in data], f"{image} of {name}"
            assert found[image][1] == data, f"{image} of {name}"


async def add(volume: Controller, two: Cluster, name: str) -> None:
    record = two.new_replica(name)
    await replicas.add(volume, ReplicaAdd(name=name, address=record.address, directory=record.directory), Progress())


async def tracked(two: Cluster, names: tuple[str, ...]) -> None:
    """The record is changed first, the replicas hear of it afterwards."""
    with trio.fail_after(5):
        while (await two.status("r1")).tracked != names:
            await trio.sleep(0.01)


async def test_a_new_replica_is_filled_with_every_layer_while_clients_write(two: Cluster) -> None:
    rng = Random(1)
    async with two.attached() as volume:
        await history(volume, rng)
        with volume.events() as receive:
            async with trio.open_nursery() as nursery:

                async def write() -> None:
                    while True:
                        await scatter(volume, rng, 1)

                nursery.start_soon(write)
                await add(volume, two, "r3")
                await in_sync(volume, "r3")
                nursery.cancel_scope.cancel()
            told = [receive.receive_nowait().event for _ in range(receive.statistics().current_buffer_used)]
        assert [event for event in told if event != "resync_progress"] == ["replica_resyncing", "replica_in_sync"]
        assert two.store.read().in_sync == ("r1", "r2", "r3")
        assert [replica.name for replica in two.store.read().replicas] == ["r1", "r2", "r3"]
        await volume.flush()
        await merged(volume)
        for connection in volume._connections.values():
            assert [entry.name for entry in await chain_of(connection)] == ["a", "c"]
    two.stop()
    assert_same_layers(two)
    assert not (two.directory / "r3" / "rebuild.json").exists()
    assert not read_volume_meta(two.directory / "r3").rebuilding
    allocated = [sum(path.stat().st_blocks for path in (two.directory / name).iterdir()) for name in two.names]
    assert allocated[2] <= allocated[0] * 1.02


async def test_progress_says_percent_rate_and_time_left(two: Cluster) -> None:
    async with two.attached() as volume:
        await volume.write(0, os.urandom(MIB))
        for offset in range(2, 26, 2):
            await volume.write(offset * MIB, os.urandom(MIB))
        await snapshot(volume, "a")
        await replicas.limit(volume, ResyncLimit(rate=8 * MIB), Progress())
        await add(volume, two, "r3")
        seen = []

        def look() -> bool:
            found = volume.status("", "").replicas[2]
            seen.append((found.phase, found.resync_done, found.resync_total, found.resync_rate, found.resync_left))
            return found.resync_done > 3 * MIB and found.resync_rate > 0

        await until(look)
        phase, done, total, rate, left = seen[-1]
        assert phase == "snapshots"
        # with what the file system needs for its own extents
        assert 13 * MIB <= total < 13.1 * MIB
        assert 2 * MIB < rate < 24 * MIB
        assert left == pytest.approx((total - done) / rate, rel=0.5)
        with pytest.raises(BusyError, match=r"the rebuild of replica r3 \(\d+ % done\)"):
            async with volume.exclusive("a snapshot"):
                pass
        await replicas.limit(volume, ResyncLimit(rate=0), Progress())
        await replicas.wait(volume, ReplicaWait(name="r3"), Progress())
        assert volume.status("", "").replicas[2].resync_total == 0


@pytest.mark.parametrize("phase", [rebuild.SNAPSHOTS, rebuild.HEAD])
@pytest.mark.parametrize("victim", ["target", "source", "engine", "connection"])
async def test_interrupted_in_any_phase_it_goes_on_where_it_was(
    two: Cluster, phase: str, victim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebuild, "SAVE_EVERY", 0.05)
    rng = Random(2)
    size = 16 * MIB
    async with two.attached() as volume:
        for offset in range(0, size, MIB):
            await volume.write(offset, rng.randbytes(MIB))
        if phase == rebuild.SNAPSHOTS:
            await snapshot(volume, "a")
    # a new attachment, for what was written in the last seconds before is taken to be missing
    async with two.attached() as volume:
        volume.limit_resync(24 * MIB)
        await add(volume, two, "r3")
        directory = two.directory / "r3"

        def half() -> bool:
            known = read_rebuild(directory)
            if known is None:
                return False
            done = known.head if phase == rebuild.HEAD else sum(layer.filled for layer in known.layers)
            return done >= size // 2

        await until(half, what="half of the rebuild")
        before = (await two.status("r3")).written_bytes
        if victim == "target":
            two.kill("r3")
            two.start("r3")
            before = 0
        elif victim == "source":
            source = {rebuild.SNAPSHOTS: "r2", rebuild.HEAD: "r1"}[phase]
            two.kill(source)
            two.start(source)
        elif victim == "connection":
            connection = volume.connection("r3")
            assert connection is not None
            connection.sock.shutdown(2)
        if victim != "engine":
            volume.limit_resync(0)
            await in_sync(volume, "r3")
    if victim == "engine":
        async with two.attached() as volume:
            await in_sync(volume, "r3")
    copied = (await two.status("r3")).written_bytes - before
    # a little of what was copied last was not noted yet
    assert copied < size // 2 + 6 * MIB
    async with two.attached() as volume:
        for name in two.names:
            await in_sync(volume, name)
    two.stop()
    assert_same_layers(two)


async def test_a_replica_that_was_away_when_a_snapshot_was_made_keeps_those_that_it_has(two: Cluster) -> None:
    rng = Random(3)
    async with two.attached() as volume:
        for offset in range(8):
            await volume.write(offset * MIB, rng.randbytes(MIB))
        await snapshot(volume, "a")
        await scatter(volume, rng, 20)
        two.kill("r2")
        await scatter(volume, rng, 20)
        assert two.store.read().in_sync == ("r1",)
        await snapshot(volume, "b")
        await scatter(volume, rng, 20)
        two.start("r2")
        await in_sync(volume, "r2")
        assert (await two.status("r2")).written_bytes < MIB
    two.stop()
    assert_same_layers(two)


async def test_merging_while_it_was_interrupted_costs_nothing_but_a_second_copy(
    two: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebuild, "SAVE_EVERY", 0.05)
    rng = Random(4)
    async with two.attached() as volume:
        await history(volume, rng)
        volume.limit_resync(MIB)
        await add(volume, two, "r3")

        def begun() -> bool:
            known = read_rebuild(two.directory / "r3")
            return known is not None and any(layer.filled for layer in known.layers)

        await until(begun)
        two.kill("r3")
        await until(lambda: state(volume, "r3") == "out")
        # which goes on now that nothing is rebuilt
        await merged(volume)
        volume.limit_resync(0)
        two.start("r3")
        await in_sync(volume, "r3")
    two.stop()
    assert_same_layers(two)


async def test_a_lost_directory_is_replaced_by_an_empty_one(two: Cluster) -> None:
    rng = Random(5)
    async with two.attached() as volume:
        await history(volume, rng)
        two.kill("r2")
        await scatter(volume, rng, 10)
        shutil.rmtree(two.directory / "r2")
        two.new_replica("r2")
        await in_sync(volume, "r2")
        await merged(volume)
    two.stop()
    assert_same_layers(two)


async def test_replicas_are_added_and_removed_but_never_the_last_in_sync_one(two: Cluster) -> None:
    async with two.attached() as volume:

        async def remove(name: str) -> tuple[str, ...]:
            return (await replicas.remove(volume, ReplicaRemove(name=name), Progress())).replicas

        await volume.write(0, os.urandom(MIB))
        with pytest.raises(ReplicaNameError, match="has a replica r1 already"):
            await replicas.add(volume, ReplicaAdd(name="r1", address="unix:/x", directory="/x"), Progress())
        with pytest.raises(ReplicaNameError, match="no replica r9; there are r1, r2"):
            await remove("r9")
        two.kill("r2")
        await volume.write(MIB, os.urandom(MIB))
        with pytest.raises(LastReplicaError, match="only one of volume 'vol' that is in sync"):
            await remove("r1")
        # beside one that is gone, another one; then the dead one goes, then one that works
        await add(volume, two, "r3")
        await in_sync(volume, "r3")
        await tracked(two, ("r2",))
        assert await remove("r2") == ("r1", "r3")
        await tracked(two, ())
        assert await remove("r1") == ("r3",)
        record = two.store.read()
        assert ([replica.name for replica in record.replicas], record.in_sync) == (["r3"], ("r3",))
        await volume.write(2 * MIB, os.urandom(MIB))
        data = await volume.read(0, MIB)
        # a name that was used before is a new replica
        shutil.rmtree(two.directory / "r2")
        await add(volume, two, "r2")
        await in_sync(volume, "r2")
        two.kill("r3")
        assert await volume.read(0, MIB) == data
    two.names.remove("r1")


async def test_a_replica_is_removed_in_the_middle_of_its_rebuild(two: Cluster) -> None:
    async with two.attached() as volume:
        for offset in range(8):
            await volume.write(offset * MIB, os.urandom(MIB))
        volume.limit_resync(2 * MIB)
        await add(volume, two, "r3")
        await until(lambda: state(volume, "r3") == "resyncing")
        await replicas.remove(volume, ReplicaRemove(name="r3"), Progress())
        assert [replica.name for replica in volume.status("", "").replicas] == ["r1", "r2"]
        async with volume.exclusive("something else"):
            await volume.write(0, os.urandom(MIB))
