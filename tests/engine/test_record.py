from __future__ import annotations

import threading
from pathlib import Path

import msgspec
import pytest

from engine.errors import RecordConflictError, RecordError, RecordMissingError
from engine.record import FileRecordStore, ReplicaRecord, VolumeRecord, bump_epoch, decode_record, encode_record


def record(**changes: object) -> VolumeRecord:
    base = VolumeRecord(
        volume="vol1",
        uuid="0a1b",
        size=1 << 30,
        replicas=(
            ReplicaRecord(name="r1", address="unix:/r1", directory="/d/r1"),
            ReplicaRecord(name="r2", address="unix:/r2", directory="/d/r2"),
        ),
        in_sync=("r1", "r2"),
    )
    return msgspec.structs.replace(base, **changes)


@pytest.fixture
def store(tmp_path: Path) -> FileRecordStore:
    store = FileRecordStore(tmp_path / "record.json")
    store.create(record())
    return store


def test_golden_record_file(store: FileRecordStore) -> None:
    assert store.path.read_text() == (
        "{\n"
        '  "format": 1,\n'
        '  "volume": "vol1",\n'
        '  "uuid": "0a1b",\n'
        '  "size": 1073741824,\n'
        '  "version": 1,\n'
        '  "epoch": 0,\n'
        '  "replicas": [\n'
        '    {\n      "name": "r1",\n      "address": "unix:/r1",\n      "directory": "/d/r1"\n    },\n'
        '    {\n      "name": "r2",\n      "address": "unix:/r2",\n      "directory": "/d/r2"\n    }\n'
        "  ],\n"
        '  "in_sync": [\n    "r1",\n    "r2"\n  ],\n'
        '  "pending": null,\n'
        '  "reverted_without": []\n'
        "}\n"
    )
    assert store.path.stat().st_mode & 0o777 == 0o600


def test_a_swap_needs_the_newest_version(store: FileRecordStore) -> None:
    first = store.read()
    store.swap(first.version, first.next(in_sync=("r2",)))
    with pytest.raises(RecordConflictError):
        store.swap(first.version, first.next(in_sync=("r1",)))
    assert store.read().in_sync == ("r2",)


def test_the_in_sync_set_is_never_recorded_empty(store: FileRecordStore) -> None:
    first = store.read()
    with pytest.raises(RecordError, match="never become empty"):
        store.swap(first.version, first.next(in_sync=()))
    assert store.read() == first


def test_every_attachment_gets_an_epoch_of_its_own(store: FileRecordStore) -> None:
    epochs: list[int] = []
    threads = [threading.Thread(target=lambda: epochs.append(bump_epoch(store, attempts=200).epoch)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(epochs) == list(range(1, 9))


def test_creating_twice_is_refused(store: FileRecordStore) -> None:
    with pytest.raises(RecordError, match="already"):
        store.create(record())


def test_missing_damaged_and_newer_records_are_told_apart(tmp_path: Path) -> None:
    store = FileRecordStore(tmp_path / "record.json")
    with pytest.raises(RecordMissingError):
        store.read()
    store.path.write_bytes(encode_record(record())[:-20])
    with pytest.raises(RecordError, match="damaged"):
        store.read()
    with pytest.raises(RecordError, match="newer release"):
        decode_record(encode_record(record(format=2)), "here")
