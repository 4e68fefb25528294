"""Both ways to sync the head off the loop behave alike."""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.replica.syncer import AioSyncer, Syncer, ThreadSyncer
from engine.store import Store, create_replica


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    create_replica(tmp_path / "r1", volume="v", uuid="u", replica="r1", size=4 << 20)
    store = Store.open(tmp_path / "r1")
    yield store
    store.close()


@pytest.fixture(params=["aio", "thread"])
def syncer(request: pytest.FixtureRequest, store: Store) -> Iterator[Syncer]:
    syncer: Syncer = AioSyncer(store) if request.param == "aio" else ThreadSyncer(store.sync)
    yield syncer
    syncer.close()


def wait(syncer: Syncer) -> None:
    assert select.select([syncer.eventfd], [], [], 20)[0]


def test_the_end_of_each_sync_is_told_once(store: Store, syncer: Syncer) -> None:
    assert not syncer.finished()
    for number in range(3):
        store.write(number << 12, os.urandom(4096))
        syncer.start()
        wait(syncer)
        assert syncer.finished()
        assert not syncer.finished()


def test_a_head_that_was_switched_is_the_one_that_is_synced(store: Store) -> None:
    syncer = AioSyncer(store)
    before = store.head
    store.snapshot("s1")
    assert store.head != before
    store.write(0, os.urandom(4096))
    syncer.start()
    wait(syncer)
    assert syncer.finished()
    syncer.close()


@pytest.mark.parametrize("kind", ["aio", "thread"])
def test_a_failed_sync_raises_its_error(store: Store, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    # no pipe can be synced

    def fail() -> None:
        os.fdatasync(writing)

    if kind == "aio":
        monkeypatch.setattr(store, "head", writing)
    syncer: Syncer = AioSyncer(store) if kind == "aio" else ThreadSyncer(fail)
    try:
        syncer.start()
        wait(syncer)
        with pytest.raises(OSError, match="Invalid argument") as caught:
            syncer.finished()
        assert caught.value.errno == errno.EINVAL
    finally:
        monkeypatch.undo()
        syncer.close()
        os.close(reading)
        os.close(writing)
