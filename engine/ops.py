"""What a client of a volume can ask for. The numbers are those of the data connection's frames (engine.wire)."""

from __future__ import annotations

import time
from typing import Final

from mypy_extensions import mypyc_attr

READ: Final = 4
WRITE: Final = 5
FLUSH: Final = 6
UNMAP: Final = 7

# of a read or write; a view is of memory that is used for nothing else while the view is there
Data = bytes | memoryview


@mypyc_attr(allow_interpreted_subclasses=True)
class BlockRequest:
    """A request whose range lies within the volume. `payload` is that of a write, `started` of time.perf_counter."""

    __slots__ = ("length", "offset", "op", "payload", "started")

    def __init__(self, op: int, offset: int, length: int, payload: Data = b"") -> None:
        self.op = op
        self.offset = offset
        self.length = length
        self.payload = payload
        self.started = time.perf_counter()

    def finish(self, error: int, data: Data) -> None:
        """Called once, with an errno or 0, and the data of a read. Must not raise or block."""
        raise NotImplementedError
