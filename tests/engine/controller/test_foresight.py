"""A journal's pattern is learnt, and the core answers a flush that was sent ahead, or that has nothing to do."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.controller.core import IO_ERROR, OK, Core
from engine.controller.foresight import Foresight
from engine.ops import FLUSH, READ, WRITE

R1, R2 = 1, 2
KIB = 1 << 10
# data, the journal's blocks, a flush, the commit record, a flush
COMMIT: tuple[int, ...] = (4 * KIB, 16 * KIB, 0, 4 * KIB, 0)


def follow(foresight: Foresight, pattern: tuple[int, ...]) -> list[bool]:
    guesses = []
    for length in pattern:
        if length:
            guesses.append(foresight.write(length))
        else:
            foresight.flush()
    return guesses


def test_the_pattern_of_a_journal_is_known_after_a_few_commits() -> None:
    foresight = Foresight()
    for _ in range(4):
        follow(foresight, COMMIT)
    for _ in range(10):
        assert follow(foresight, COMMIT) == [False, True, True]


def test_one_commit_of_another_size_does_not_change_its_mind() -> None:
    foresight = Foresight()
    for _ in range(8):
        follow(foresight, COMMIT)
    follow(foresight, (4 * KIB, 4 * KIB, 4 * KIB))
    follow(foresight, COMMIT)
    assert follow(foresight, COMMIT) == [False, True, True]


def test_nothing_is_foreseen_where_nobody_flushes_nor_behind_large_writes() -> None:
    foresight = Foresight()
    assert not any(follow(foresight, (4 * KIB,) * 100))
    assert not any(follow(foresight, (1 << 20, 0) * 100))


@given(st.lists(st.integers(0, 1 << 20), max_size=200))
def test_any_sequence_is_taken(lengths: list[int]) -> None:
    follow(Foresight(), tuple(lengths))


class Always(Foresight):
    def write(self, length: int) -> bool:
        return True


def opened(foresight: Foresight | None = None) -> Core:
    core = Core(size=8 << 20, replicas=("r1", "r2"), in_sync=("r1", "r2"), foresight=foresight or Always())
    core.begin(())
    return core


def sent(core: Core) -> list[tuple[int, int, int]]:
    """(op, seq, length) of the frames on their way since the last call."""
    frames, core.outbox = core.outbox, []
    return [(op, seq, length) for _, op, seq, _, length, _ in frames]


def replied(core: Core) -> list[tuple[object, int]]:
    replies, core.replies = core.replies, []
    return [(token, error) for token, error, _ in replies]


def everywhere(core: Core, seq: int) -> None:
    for bit in (R1, R2):
        core.answered(bit, seq, OK)


def test_a_flush_that_was_sent_ahead_is_answered_at_once() -> None:
    core = opened()
    core.submit(WRITE, 0, 4096, b"x" * 4096, "write")
    (_, write, _), (op, flush, length) = sent(core)
    assert (op, length) == (FLUSH, 1)
    everywhere(core, write)
    everywhere(core, flush)
    assert replied(core) == [("write", 0)]
    core.submit(FLUSH, 0, 0, b"", "flush")
    assert replied(core) == [("flush", 0)]
    assert not sent(core)
    assert core.settled > write


def test_who_asks_before_it_is_done_gets_its_answer() -> None:
    core = opened()
    core.submit(WRITE, 0, 4096, b"x" * 4096, "write")
    (_, write, _), (_, flush, _) = sent(core)
    everywhere(core, write)
    core.submit(FLUSH, 0, 0, b"", "one")
    core.submit(FLUSH, 0, 0, b"", "two")
    assert not sent(core)
    core.answered(R1, flush, OK)
    assert replied(core) == [("write", 0)]
    core.answered(R2, flush, OK)
    assert replied(core) == [("one", 0), ("two", 0)]


def test_a_write_in_between_needs_a_flush_of_its_own() -> None:
    core = opened()
    core.submit(WRITE, 0, 4096, b"x" * 4096, "write")
    (_, write, _), (_, flush, _) = sent(core)
    core.submit(WRITE, 4096, 4096, b"y" * 4096, "later")
    ((_, later, _),) = sent(core)
    for seq in (write, flush, later):
        everywhere(core, seq)
    replied(core)
    core.submit(FLUSH, 0, 0, b"", "flush")
    assert [op for op, _, _ in sent(core)] == [FLUSH]
    assert not replied(core)


def test_a_replica_that_fails_the_flush_leaves_before_anybody_is_answered() -> None:
    core = opened()
    core.submit(WRITE, 0, 4096, b"x" * 4096, "write")
    (_, write, _), (_, flush, _) = sent(core)
    everywhere(core, write)
    core.submit(FLUSH, 0, 0, b"", "flush")
    core.answered(R1, flush, OK)
    core.answered(R2, flush, IO_ERROR, b"no")
    assert replied(core) == [("write", 0)]
    for _, seq, _ in sent(core):
        core.answered(R1, seq, OK)  # it keeps a map of what the other misses now
    core.recorded(("r1",))
    assert replied(core) == [("flush", 0)]


def test_reads_do_not_matter_and_what_an_engine_before_left_is_flushed() -> None:
    core = opened(Foresight())
    core.submit(FLUSH, 0, 0, b"", "first")
    ((op, first, length),) = sent(core)
    assert (op, length) == (FLUSH, 0)
    everywhere(core, first)
    core.submit(READ, 0, 4096, b"", "read")
    sent(core)
    assert replied(core) == [("first", 0)]
    core.submit(FLUSH, 0, 0, b"", "second")
    assert replied(core) == [("second", 0)]
