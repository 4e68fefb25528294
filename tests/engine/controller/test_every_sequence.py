"""Every sequence of membership events of a small volume, from every interrupted step (see `exhaustive`)."""

from __future__ import annotations

import pytest

from tests.conftest import Progress
from tests.engine.controller.exhaustive import (
    AFTER_A_CRASH,
    COMING_BACK,
    BrokenPromiseError,
    Budget,
    Event,
    explore,
    happen,
    start,
    subsets,
)

NOTHING = Budget(writes=0, flushes=0, reads=0, settles=0, returns=0, faults=0)
SETS = {replicas: [s for s in subsets([f"r{i + 1}" for i in range(replicas)]) if s] for replicas in (2, 3)}


@pytest.mark.parametrize("in_sync", SETS[2], ids="-".join)
def test_two_replicas_with_a_write_a_read_and_a_fault(in_sync: tuple[str, ...], progress: Progress) -> None:
    report = explore(start(2, in_sync), NOTHING._replace(writes=1, reads=1, faults=1), longest=12)
    progress(f"two replicas, {'-'.join(in_sync)} in sync, read: {report}")
    assert report.sequences > 40_000


@pytest.mark.parametrize("in_sync", SETS[2], ids="-".join)
def test_two_replicas_with_a_write_a_flush_and_a_fault(in_sync: tuple[str, ...], progress: Progress) -> None:
    report = explore(start(2, in_sync), NOTHING._replace(writes=1, flushes=1, faults=1), longest=10)
    progress(f"two replicas, {'-'.join(in_sync)} in sync, flush: {report}")
    assert report.sequences > 40_000


def test_a_flush_that_was_sent_with_the_write_before_it(progress: Progress) -> None:
    """Whoever asks for it is answered with that one, or at once: what it promises is the same."""
    report = explore(start(2, ["r1", "r2"], ahead=True), NOTHING._replace(writes=1, flushes=1, faults=1), longest=8)
    progress(f"a flush ahead: {report}")
    assert report.sequences > 10_000


@pytest.mark.parametrize("in_sync", SETS[3], ids="-".join)
def test_three_replicas_with_a_write_and_a_fault(in_sync: tuple[str, ...], progress: Progress) -> None:
    report = explore(start(3, in_sync), NOTHING._replace(writes=1, faults=1), longest=8)
    progress(f"three replicas, {'-'.join(in_sync)} in sync: {report}")
    assert report.sequences > 1_000


def test_a_replica_that_comes_back_is_swapped_in_and_everything_loses_power(progress: Progress) -> None:
    """Nothing may be taken for settled because the returning replica alone was flushed."""
    report = explore(start(2, ["r1"], COMING_BACK), NOTHING._replace(settles=1, faults=1), longest=8)
    progress(f"coming back: {report}")
    assert report.sequences > 2_000


def test_regions_are_made_equal_while_members_leave_and_engines_are_replaced(progress: Progress) -> None:
    """A region that is copied stays closed until the record has let go of a member that left meanwhile."""
    report = explore(start(2, ["r1", "r2"], AFTER_A_CRASH), NOTHING._replace(faults=2), longest=7)
    progress(f"after a crash: {report}")
    assert report.sequences > 40_000


def test_a_broken_promise_is_told_with_the_way_there() -> None:
    world = start(2, ["r1", "r2"])
    both: list[Event] = [(what, 0, name) for what in ("frame", "answer") for name in ("r1", "r2")]
    for event in (("write",), *both, ("flush",)):
        happen(world, event)
    # as if the second replica answered a flush before its disk had it
    world.replicas["r2"].handle = lambda *_: b""  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="older than a flush"):
        for event in both:
            happen(world, event)
    assert "write frame-0-r1" in str(BrokenPromiseError([("write",), ("frame", 0, "r1")], "lost"))
