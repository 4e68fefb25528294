from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.replica.barrier import Barrier, Era


@given(st.lists(st.one_of(st.just("write"), st.just("flush"), st.integers(0, 50)), max_size=60))
def test_a_flush_waits_for_exactly_the_writes_before_it(steps: list[str | int]) -> None:
    barrier: Barrier[int] = Barrier()
    writes: list[tuple[int, Era[int]]] = []
    waiting: dict[int, set[int]] = {}  # flush -> writes before it that are under way
    for number, step in enumerate(steps):
        if step == "write":
            barrier.current.count += 1
            writes.append((number, barrier.current))
        elif step == "flush":
            before = {write for write, _ in writes}
            assert barrier.park(number) is bool(before)
            if before:
                waiting[number] = before
        elif writes:
            done, era = writes.pop(int(step) % len(writes))
            released = barrier.done(era)
            for missing in waiting.values():
                missing.discard(done)
            assert released == [flush for flush, missing in waiting.items() if not missing]
            for flush in released:
                del waiting[flush]
        assert barrier.idle == (not writes)
    assert barrier.discard() == list(waiting)
    assert barrier.discard() == []
