"""The core held: what is admitted ends, what is submitted waits, and membership goes on."""

from __future__ import annotations

from engine.controller import actions
from engine.controller import core as decide
from engine.controller.core import OK, Core
from engine.ops import FLUSH, READ, WRITE

R1, R2 = 1, 2


def opened() -> Core:
    core = Core(size=8 << 20, replicas=("r1", "r2"), in_sync=("r1", "r2"))
    core.begin(())
    return core


def sent(core: Core) -> list[tuple[int, int, int]]:
    """(op, seq, offset) of the frames on their way since the last call."""
    frames, core.outbox = core.outbox, []
    return [(op, seq, offset) for _, op, seq, offset, _, _ in frames]


def replied(core: Core) -> list[object]:
    replies, core.replies = core.replies, []
    return [token for token, _, _ in replies]


def test_what_was_admitted_ends_and_what_comes_later_waits_in_its_order() -> None:
    core = opened()
    core.submit(WRITE, 0, 4096, b"x" * 4096, "first")
    core.submit(WRITE, 0, 4096, b"y" * 4096, "behind the first")
    ((_, seq, _),) = sent(core)
    core.hold()
    for number, op in enumerate((WRITE, FLUSH, READ)):
        core.submit(op, 4096 * number, 0 if op == FLUSH else 4096, b"", number)
    assert sent(core) == []
    assert not core.quiet
    for bit in (R1, R2):
        core.answered(bit, seq, OK)
    ((_, seq, _),) = sent(core)
    assert not core.quiet
    for bit in (R1, R2):
        core.answered(bit, seq, OK)
    assert replied(core) == ["first", "behind the first"]
    assert core.quiet
    core.release()
    assert [op for op, _, _ in sent(core)] == [WRITE, FLUSH, READ]
    assert not core.quiet


def test_a_replica_may_leave_meanwhile() -> None:
    core = opened()
    core.submit(WRITE, 0, 4096, b"x" * 4096, "w")
    ((_, seq, _),) = sent(core)
    core.hold()
    core.answered(R1, seq, OK)
    core.lost(R2, "it broke")
    ((_, track, _),) = sent(core)
    core.answered(R1, track, OK)
    assert actions.WriteRecord(("r1",)) in core.actions
    # the record still names it, so the write is not whole
    assert not core.quiet
    core.recorded(("r1",))
    assert replied(core) == ["w"]
    core.tick(0.1)
    assert core.quiet


def test_pings_go_on_and_count_for_nothing() -> None:
    core = opened()
    core.hold()
    for _ in range(4):
        core.tick(1.0)
    assert decide.PING in [op for op, _, _ in sent(core)]
    assert core.quiet


def test_no_copy_begins_and_nobody_comes_back() -> None:
    core = Core(size=8 << 20, replicas=("r1", "r2", "r3"), in_sync=("r1", "r2"))
    core.hold()
    core.begin({3})
    core.opened(4)
    assert [op for op, _, _ in sent(core)] == [decide.TRACK]
    assert core.quiet
    assert not core.resyncing
    core.release()
    assert (decide.READ_LAYER, 3 << 20) in [(op, offset) for op, _, offset in sent(core)]
    core.opened(4)
    assert "r3" in core.members(core.resyncing)


def test_an_engine_that_stopped_answers_nothing_of_what_waited() -> None:
    core = opened()
    core.hold()
    core.submit(READ, 0, 4096, b"", "r")
    core.stopped = True
    core.release()
    assert sent(core) == []
    assert replied(core) == []
