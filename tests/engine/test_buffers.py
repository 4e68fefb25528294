from __future__ import annotations

from engine.buffers import BufferPool


def test_a_buffer_is_used_again_when_no_view_of_it_is_left_and_not_before() -> None:
    pool = BufferPool(4096)
    first = pool.take()
    first[:4] = b"mine"
    tail = first[2:]
    del first
    second = pool.take()
    second[:4] = b"else"
    assert bytes(tail[:2]) == b"ne"
    del tail
    assert bytes(pool.take()[:4]) == b"mine"


def test_what_a_burst_took_is_not_kept() -> None:
    pool = BufferPool(4096, keep=2)
    views = [pool.take() for _ in range(10)]
    assert len({id(view.obj) for view in views}) == 10
    kept = {id(view.obj) for view in views[:2]}
    views.clear()
    assert {id(view.obj) for view in [pool.take(), pool.take()]} == kept
