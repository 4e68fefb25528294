"""Several clients of one block file who collide on a few blocks, and write down what they saw.

A process of its own: `python -m tests.linearizability.clients FILE SEED FIRST`. It works until its standard input ends,
then prints what it did, a JSON object a line. Values are unique, from FIRST on; 0 is what an unmapped block reads as,
-1 a block that holds no value wholly.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import threading
import time
from random import Random
from typing import Literal

import msgspec

BLOCK = 4096
CLIENTS = 6
# some side by side, in one region of the intent log, and some in others
BLOCKS = (0, 1, 2, 3, 300, 301, 2600, 2601)
_PAUSE = (0.001, 0.02)
_PUNCH_HOLE = 3
_libc = ctypes.CDLL(None, use_errno=True)


Kind = Literal["read", "write", "unmap", "flush"]
KINDS: tuple[Kind, ...] = ("read", "write", "unmap", "flush")


class Act(msgspec.Struct, kw_only=True):
    """What one client did: `blocks` from the first on. `end` is None while it is not known to have been done."""

    kind: Kind
    first: int
    start: int
    end: int | None = None
    values: list[int]


def _pattern(value: int) -> bytes:
    return value.to_bytes(8, "little") * (BLOCK // 8)


def _value(content: bytes) -> int:
    value = int.from_bytes(content[:8], "little")
    return value if content == _pattern(value) else -1


class Client:
    def __init__(self, path: str, rng: Random, values: range) -> None:
        self.acts: list[Act] = []
        self.error = ""
        self._fd = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        self._rng = rng
        self._values = iter(values)
        # page-aligned, as O_DIRECT wants it
        self._buffer = mmap.mmap(-1, 4 * BLOCK)

    def run(self, stop: threading.Event) -> None:
        try:
            while not stop.is_set():
                self._act()
                time.sleep(self._rng.uniform(*_PAUSE))
        except OSError as error:
            self.error = str(error)
        finally:
            # close sends a request, too
            with contextlib.suppress(OSError):
                os.close(self._fd)

    def _act(self) -> None:
        rng = self._rng
        (kind,) = rng.choices(KINDS, [45, 35, 8, 12])
        first = rng.choice(BLOCKS)
        count = 1
        while count < 4 and first + count in BLOCKS and rng.random() < 0.3:
            count += 1
        view = memoryview(self._buffer)[: count * BLOCK]
        values = [0] * count
        if kind == "write":
            values = [next(self._values) for _ in range(count)]
            view[:] = b"".join(_pattern(value) for value in values)
        act = Act(kind=kind, first=first, start=time.monotonic_ns(), values=values)
        self.acts.append(act)
        match kind:
            case "read":
                if os.preadv(self._fd, [view], first * BLOCK) != len(view):
                    raise OSError("short read")
                act.values = [_value(bytes(view[i * BLOCK : (i + 1) * BLOCK])) for i in range(count)]
            case "write":
                if os.pwritev(self._fd, [view], first * BLOCK) != len(view):
                    raise OSError("short write")
            case "unmap":
                offset, length = ctypes.c_int64(first * BLOCK), ctypes.c_int64(len(view))
                if _libc.fallocate(self._fd, _PUNCH_HOLE, offset, length):
                    raise OSError(ctypes.get_errno(), "fallocate")
            case "flush":
                os.fsync(self._fd)
        act.end = time.monotonic_ns()


def main(path: str, seed: str, first: int) -> None:
    stop = threading.Event()
    clients = [Client(path, Random(f"{seed} {i}"), range(first + i, 1 << 63, CLIENTS)) for i in range(CLIENTS)]
    threads = [threading.Thread(target=client.run, args=(stop,)) for client in clients]
    for thread in threads:
        thread.start()
    sys.stdin.buffer.read()
    stop.set()
    for thread in threads:
        thread.join()
    for client in clients:
        for act in client.acts:
            sys.stdout.buffer.write(msgspec.json.encode(act) + b"\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
