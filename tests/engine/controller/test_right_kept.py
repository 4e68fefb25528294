"""The right to serve with real replica processes."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import trio

from engine.controller.driver import Controller, attach
from engine.errors import FencedError
from engine.record import bump_epoch
from engine.secret import read_secret
from tests.engine.cluster import Cluster, cluster, until

LASTS = 1.5


@contextlib.asynccontextmanager
async def serving(made: Cluster) -> AsyncIterator[Controller]:
    record = bump_epoch(made.store)
    key = read_secret(made.secret)
    controller = attach(
        made.store, key, epoch=record.epoch, open_timeout=5.0, reconnect_interval=0.05, right_lasts=LASTS
    )
    async with controller.running():
        yield controller


def held(controller: Controller) -> bool:
    return controller.right.news().until > time.monotonic()


async def test_it_is_renewed_as_long_as_all_confirm(tmp_path: Path) -> None:
    with cluster(tmp_path) as made:
        async with serving(made) as controller:
            await until(lambda: held(controller))
            first = controller.right.news().until
            await until(lambda: controller.right.news().until > first + 0.4)
            assert controller.right.news().until <= time.monotonic() + LASTS
            assert controller.right.news().older_at is None
            # the record store has no part in it
            made.store.path.rename(made.store.path.with_suffix(".away"))
            first = controller.right.news().until
            await until(lambda: controller.right.news().until > first + LASTS)
            made.store.path.with_suffix(".away").rename(made.store.path)


async def test_a_replica_that_hangs_leaves_before_the_right_does(tmp_path: Path) -> None:
    with cluster(tmp_path) as made:
        async with serving(made) as controller:
            await until(lambda: held(controller))
            made.processes["r2"].send_signal(signal.SIGSTOP)
            try:
                lapsed = False
                with trio.move_on_after(2 * LASTS):
                    while True:
                        lapsed |= not held(controller)
                        await trio.sleep(0.02)
                assert not lapsed
                assert "right to serve" in controller.core.reason("r2")
                assert controller.record.in_sync == ("r1", "r3")
            finally:
                made.processes["r2"].send_signal(signal.SIGCONT)


async def test_it_ends_when_the_last_replica_hangs_and_comes_back_with_it(tmp_path: Path) -> None:
    with cluster(tmp_path, replicas=1) as made:
        async with serving(made) as controller:
            await until(lambda: held(controller))
            made.processes["r1"].send_signal(signal.SIGSTOP)
            try:
                await until(lambda: not held(controller))
            finally:
                made.processes["r1"].send_signal(signal.SIGCONT)
            await until(lambda: held(controller))


async def test_who_comes_next_is_told_and_who_was_before_ends(tmp_path: Path) -> None:
    with cluster(tmp_path, replicas=2) as made:
        async with serving(made) as old:
            await until(lambda: held(old))
            async with serving(made) as new:
                await until(lambda: held(new))
                older = new.right.news().older_at
                assert older is not None
                # every right that the old one has ends before the new one may take this for old enough
                assert old.right.news().until <= older + LASTS + 0.1
                await until(old.failed.is_set)
            assert isinstance(old.failure, FencedError)


async def test_one_that_left_in_order_is_not_waited_for(tmp_path: Path) -> None:
    with cluster(tmp_path, replicas=2) as made:
        for kept in (False, True):
            async with serving(made) as controller:
                await until(lambda: held(controller))
                assert controller.right.news().older_at is None
                controller.right.kept = kept
        async with serving(made) as controller:
            assert controller.right.news().older_at is not None
