from __future__ import annotations

import trio
import trio.testing

from share_manager.kube.queue import WorkQueue


async def test_a_name_is_in_it_once(autojump_clock: trio.testing.MockClock) -> None:
    queue = WorkQueue()
    queue.add("a")
    queue.add("a")
    queue.add("b")
    assert await queue.take() == "a"
    assert await queue.take() == "b"
    assert len(queue) == 0


async def test_nobody_works_on_a_name_twice_at_a_time(autojump_clock: trio.testing.MockClock) -> None:
    queue = WorkQueue()
    queue.add("a")
    assert await queue.take() == "a"
    queue.add("a")
    with trio.move_on_after(5) as waited:
        await queue.take()
    assert waited.cancelled_caught
    queue.done("a")
    assert await queue.take() == "a"


async def test_failures_wait_longer_each_time(autojump_clock: trio.testing.MockClock) -> None:
    queue = WorkQueue(least=1.0, most=3.0)
    queue.add("a")
    assert await queue.take() == "a"
    for waits in (1.0, 2.0, 3.0, 3.0):
        began = trio.current_time()
        queue.done("a", failed=True)
        assert await queue.take() == "a"
        assert trio.current_time() - began == waits
    queue.done("a")
    queue.add("a")
    assert await queue.take() == "a"
    began = trio.current_time()
    queue.done("a", failed=True)
    assert await queue.take() == "a"
    assert trio.current_time() - began == 1.0


async def test_later_is_later(autojump_clock: trio.testing.MockClock) -> None:
    queue = WorkQueue()
    queue.add_after("late", 10)
    queue.add_after("soon", 1)
    began = trio.current_time()
    assert [await queue.take(), await queue.take()] == ["soon", "late"]
    assert trio.current_time() - began == 10
