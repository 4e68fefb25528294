"""A range of which no replica can read all is put together from what each can."""

from __future__ import annotations

from engine.controller.core import IO_ERROR, OK, Core
from engine.ops import READ

BLOCK = 4096
LENGTH = 256 << 10


def test_large_parts_are_views_of_what_was_received() -> None:
    core = Core(size=8 << 20, replicas=["r1", "r2"], in_sync=["r1", "r2"])
    core.begin(())
    core.submit(READ, 0, LENGTH, b"", "read")
    content = bytes(range(256)) * (LENGTH // 256)
    broken = {1: 0, 2: LENGTH - BLOCK}
    while not core.replies:
        sends, core.outbox = core.outbox, []
        assert sends
        for mask, op, seq, offset, length, _ in sends:
            if op != READ:
                continue
            if offset <= broken[mask] < offset + length:
                core.answered(mask, seq, IO_ERROR, b"cannot be read")
            else:
                core.answered(mask, seq, OK, memoryview(content)[offset : offset + length])
    ((token, error, data),) = core.replies
    assert (token, error, bytes(data)) == ("read", 0, content)
