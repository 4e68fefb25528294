"""A write that fails on the last in-sync replica leaves no other one with something else there."""

from __future__ import annotations

import errno

import pytest

from engine.controller.actions import ReplicaState
from engine.controller.core import NO_SPACE, OK, Core
from engine.ops import READ, WRITE

MIB = 1 << 20
IO_ERROR = 3


def degraded() -> tuple[Core, int, int]:
    """r1 alone is in sync; r2 is back, gets every write, and is not told yet what it missed."""
    core = Core(size=8 * MIB, replicas=["r1", "r2"], in_sync=["r1"])
    core.begin(())
    core.opened(core.bit("r2"))
    core.outbox.clear()
    return core, core.bit("r1"), core.bit("r2")


@pytest.mark.parametrize("returning_first", [True, False])
def test_a_returning_replica_that_took_it_starts_over(returning_first: bool) -> None:
    core, first, second = degraded()
    core.submit(WRITE, 0, 4096, b"x" * 4096, "write")
    ((mask, _, seq, *_),) = core.outbox
    assert mask == first | second
    if returning_first:
        core.answered(second, seq, OK)
    core.answered(first, seq, NO_SPACE, b"disk full")
    if not returning_first:
        core.answered(second, seq, OK)
    assert core.replies == [("write", errno.ENOSPC, b"")]
    assert core.state("r2") is ReplicaState.OUT
    assert "failed on r1" in core.reason("r2")
    assert core.state("r1") is ReplicaState.IN_SYNC
    # and the volume goes on
    core.outbox.clear()
    core.submit(READ, 0, 4096, b"", "read")
    assert [send[0] for send in core.outbox] == [first]


def test_a_read_that_fails_there_says_nothing_of_the_returning_one() -> None:
    core, first, _ = degraded()
    core.submit(READ, 0, 4096, b"", "read")
    core.answered(first, core.outbox[-1][2], IO_ERROR, b"broken")
    assert core.replies == [("read", errno.EIO, b"")]
    assert core.state("r2") is ReplicaState.RESYNCING
