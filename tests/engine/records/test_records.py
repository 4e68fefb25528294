"""The record server and its client over a real socket, and what the server remembers after its end."""

from __future__ import annotations

import functools
import socket
import threading
import time
from pathlib import Path

import msgspec
import pytest
import trio

from engine.address import Address
from engine.errors import RecordConflictError, RecordError, RecordMissingError
from engine.record import ReplicaRecord, VolumeRecord, bump_epoch
from engine.records import (
    ORPHANED,
    Lease,
    Ledger,
    Presence,
    RecordsClient,
    RemoteRecordStore,
    release_lease,
    serve_records,
)
from engine.records import messages as asked
from engine.records.channel import Channel, new_hello
from tests.chaos.relay import Link, Route, relays
from tests.engine.cluster import free_ports
from tests.engine.records.served import SECRET, serving, use


def record(**changes: object) -> VolumeRecord:
    base = VolumeRecord(
        volume="vol1",
        uuid="0a1b",
        size=1 << 30,
        replicas=tuple(
            ReplicaRecord(name=name, address=f"tcp:127.0.0.1:{port}", directory=f"/d/{name}")
            for name, port in (("r1", 1), ("r2", 2))
        ),
        in_sync=("r1", "r2"),
    )
    return msgspec.structs.replace(base, **changes)


async def test_a_record_is_kept_and_changed_by_whoever_has_seen_its_newest_version(tmp_path: Path) -> None:
    def work(client: RecordsClient) -> None:
        store = RemoteRecordStore(client, "vol1")
        with pytest.raises(RecordMissingError):
            store.read()
        client.create_record(record())
        client.create_record(record())  # the answer was lost, say
        with pytest.raises(RecordError, match="already"):
            client.create_record(record(uuid="ffff"))
        first = store.read()
        store.swap(first.version, first.next(in_sync=("r2",)))
        with pytest.raises(RecordConflictError):
            store.swap(first.version, first.next(in_sync=("r1",)))
        with pytest.raises(RecordError, match="at least one"):
            store.swap(2, store.read().next(in_sync=()))
        with pytest.raises(RecordError, match="cannot follow"):
            store.swap(2, store.read().next(uuid="ffff"))
        assert store.read().in_sync == ("r2",)
        assert client.list_records() == (store.read(),)

    await use(work, tmp_path)

    def later(client: RecordsClient) -> None:
        assert client.read_record("vol1").in_sync == ("r2",)
        client.delete_record("vol1", 2)
        assert client.list_records() == ()

    await use(later, tmp_path)
    assert list(tmp_path.glob("*.json")) == []


async def test_who_is_heard_but_hears_nothing_changes_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as address:
        server = ("127.0.0.1", int(address.rpartition(":")[2]))
        (free_port,) = free_ports(1)
        async with relays({"way": Route(("127.0.0.1", free_port), server)}) as between:
            with RecordsClient(f"tcp:127.0.0.1:{free_port}", SECRET, timeout=1.0) as client:
                await trio.to_thread.run_sync(client.create_record, record())
                store = RemoteRecordStore(client, "vol1")
                await between.set(Link(name="way", back=False))
                with pytest.raises(RecordError, match="does not answer"):
                    await trio.to_thread.run_sync(store.swap, 1, record().next(in_sync=("r1",)))
        with RecordsClient(address, SECRET) as there:
            kept = await trio.to_thread.run_sync(there.read_record, "vol1")
            assert kept.in_sync == ("r1", "r2")


async def test_every_attachment_gets_an_epoch_of_its_own(tmp_path: Path) -> None:
    async with serving(tmp_path) as address:
        with RecordsClient(address, SECRET) as client:
            await trio.to_thread.run_sync(client.create_record, record())
        epochs: list[int] = []

        def claim() -> None:
            with RecordsClient(address, SECRET) as client:
                epochs.append(bump_epoch(RemoteRecordStore(client, "vol1"), attempts=200).epoch)

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(trio.to_thread.run_sync, claim)
    assert sorted(epochs) == list(range(1, 9))


def test_the_same_change_of_two_writers_is_made_once(tmp_path: Path) -> None:
    """Two that claim the same epoch write the same record: only the name of the change tells them apart."""
    ledger = Ledger(tmp_path)
    ledger.answer(asked.CreateRecord(record=record()))
    claimed = record().next(epoch=1)
    mine = asked.SwapRecord(expected=1, record=claimed, attempt="a")
    assert ledger.answer(mine).status == "ok"
    assert ledger.answer(msgspec.structs.replace(mine, attempt="b")).status == "conflict"
    # the answer was lost, even with the server
    assert Ledger(tmp_path).answer(mine).status == "ok"


def test_an_attempt_without_an_answer_keeps_its_name(tmp_path: Path) -> None:
    """The server carries it out and dies before it answers."""
    ledger = Ledger(tmp_path)
    ledger.answer(asked.CreateRecord(record=record()))
    names: list[str] = []
    client = RecordsClient("tcp:127.0.0.1:9", SECRET)
    claimed = record().next(epoch=1)

    def lost(request: asked.SwapRecord | asked.ReadRecord, patience: float = 0.0) -> asked.Answer:
        if isinstance(request, asked.ReadRecord):
            return ledger.answer(request)
        names.append(request.attempt)
        answer = ledger.answer(request)
        if len(names) == 1:
            raise RecordError("away")
        return answer

    client._exchange = lost  # type: ignore[method-assign,assignment]
    store = RemoteRecordStore(client, "vol1")
    with pytest.raises(RecordError):
        store.swap(1, claimed)
    store.swap(1, claimed)
    assert names[0] == names[1]
    with pytest.raises(RecordConflictError):
        store.swap(1, claimed)
    assert names[2] != names[0]


async def test_a_wrong_secret_learns_and_changes_nothing(tmp_path: Path) -> None:
    await use(lambda client: client.create_record(record()), tmp_path)

    def stranger(client: RecordsClient) -> None:
        with pytest.raises(RecordError, match="secret"):
            client.read_record("vol1")
        with pytest.raises(RecordError, match="secret"):
            client.delete_record("vol1", 1)

    await use(stranger, tmp_path, secret=b"x" * 32)
    await use(lambda client: client.delete_record("vol1", 1), tmp_path)


def test_what_was_said_cannot_be_said_again_or_sent_back() -> None:
    hello, answer = new_hello(), new_hello()
    client, server = Channel(SECRET, "client", hello, answer), Channel(SECRET, "server", hello, answer)
    said = client.seal(b"once")
    server.check(said[4:36], said[36:])
    with pytest.raises(Exception, match="secret"):
        server.check(said[4:36], said[36:])
    with pytest.raises(Exception, match="secret"):
        client.check(said[4:36], said[36:])


def test_a_server_that_is_silent_or_away_is_given_up_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        client = RecordsClient(f"tcp:127.0.0.1:{port}", SECRET, timeout=0.2)
        began = time.monotonic()
        with pytest.raises(RecordError, match="does not answer"):
            client.read_record("vol1")
        assert time.monotonic() - began < 2
    with pytest.raises(RecordError, match="is away"):
        client.read_record("vol1")
    client.close()


async def test_a_connection_that_broke_is_made_again(tmp_path: Path) -> None:
    async with serving(tmp_path) as address:
        client = RecordsClient(address, SECRET)
        await trio.to_thread.run_sync(client.create_record, record())
    port = int(address.rpartition(":")[2])
    async with trio.open_nursery() as nursery:
        await nursery.start(functools.partial(serve_records, tmp_path, SECRET, Address.parse(f"tcp:127.0.0.1:{port}")))
        assert await trio.to_thread.run_sync(client.read_record, "vol1") == record()
        nursery.cancel_scope.cancel()
    client.close()


async def test_a_lease_is_released_for_a_dead_holder_unless_it_is_anothers_by_then(tmp_path: Path) -> None:
    def work(client: RecordsClient) -> None:
        client.create_record(record())
        _, version = client.read_lease("vol1")
        held = Lease(holder="a", instance="1", phase="serving", epoch=1, renewals=7, wanted="b")
        version = client.swap_lease("vol1", version, held)[2]
        assert not release_lease(client, "vol1", "another")
        assert client.read_lease("vol1") == (held, version)
        assert release_lease(client, "vol1", "1")
        lease, _ = client.read_lease("vol1")
        assert (lease.phase, lease.cause, lease.wanted, lease.renewals) == ("released", ORPHANED, "b", 8)
        assert not release_lease(client, "vol1", "1")

    await use(work, tmp_path)


async def test_a_lease_is_changed_by_whoever_has_seen_it_and_watched_by_others(tmp_path: Path) -> None:
    def work(client: RecordsClient) -> None:
        client.create_record(record())
        lease, version = client.read_lease("vol1")
        assert lease == Lease()
        held = Lease(holder="a", instance="1", phase="serving", epoch=1)
        done, lease, version = client.swap_lease("vol1", version, held)
        assert (done, lease) == (True, held)
        assert client.swap_lease("vol1", "another", Lease(holder="b"))[0] is False
        seen: list[tuple[Lease, str]] = []
        with client.another() as watcher:
            thread = threading.Thread(target=lambda: seen.append(watcher.read_lease("vol1", version, 20.0)))
            thread.start()
            renewed = lease.renewed()
            assert client.swap_lease("vol1", version, renewed)[0]
            thread.join(5)
        assert seen[0][0] == renewed
        began = time.monotonic()
        assert client.read_lease("vol1", seen[0][1], 0.2)[0] == renewed
        assert time.monotonic() - began >= 0.2

    await use(work, tmp_path)

    def later(client: RecordsClient) -> None:
        lease, version = client.read_lease("vol1")
        # renewals are gone with the server; its versions are never those of an earlier start
        assert lease == Lease(holder="a", instance="1", phase="serving", epoch=1)
        assert client.swap_lease("vol1", version, lease.renewed())[0]

    await use(later, tmp_path)


async def test_who_is_present_is_forgotten(tmp_path: Path) -> None:
    now = 0.0
    ledger = Ledger(tmp_path, lambda: now)
    ledger.answer(asked.CreateRecord(record=record()))
    presence = Presence(node="a", instance="1", state="standby")
    ledger.answer(asked.Announce(volume="vol1", presence=presence))
    now = 3.0
    (found,) = ledger.answer(asked.ListPresences(volume="vol1")).presences
    assert (found.node, found.age) == ("a", 3.0)
    now = 200.0
    assert ledger.answer(asked.ListPresences(volume="vol1")).presences == ()


async def test_marks_outlast_the_server(tmp_path: Path) -> None:
    def work(client: RecordsClient) -> None:
        client.create_record(record())
        assert client.read_mark("vol1", "formatting") is None
        client.set_mark("vol1", "formatting", "ext4")

    await use(work, tmp_path)

    def later(client: RecordsClient) -> None:
        assert client.read_mark("vol1", "formatting") == "ext4"
        client.set_mark("vol1", "formatting", None)
        assert client.read_mark("vol1", "formatting") is None

    await use(later, tmp_path)


def test_a_disk_that_refuses_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(tmp_path)
    ledger.answer(asked.CreateRecord(record=record()))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engine.records.ledger.replace_file", refuse)
    answer = ledger.answer(asked.SwapRecord(expected=1, record=record().next(epoch=1), attempt="a"))
    assert (answer.status, ledger.answer(asked.ReadRecord(volume="vol1")).records) == ("failed", (record(),))


def test_a_damaged_file_is_told_by_its_name(tmp_path: Path) -> None:
    Ledger(tmp_path).answer(asked.CreateRecord(record=record()))
    (tmp_path / "vol1.json").write_text("{")
    with pytest.raises(RecordError, match=r"vol1\.json is damaged"):
        Ledger(tmp_path)
