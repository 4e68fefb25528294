"""What is written in the guest, and what must be there afterwards: one list of operations, the same on both sides.

An operation counts when its fsync has returned, or, for what changes a name, the call itself: the filesystem is mounted
`dirsync`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

SLOTS = 24
SLOT = 4096
LIVE_FILES = 20
JUNK = "junk"
JUNK_SIZE = 4 << 20

State = dict[str, bytes]


class Operation(NamedTuple):
    kind: str
    name: str
    data: bytes = b""
    offset: int = 0


def operations(seed: int) -> Iterator[Operation]:
    """Without an end. The data of each is its own."""
    rng = Random(seed)
    files: list[str] = []
    length = 0
    yield Operation("write", "slots", bytes(SLOTS * SLOT))
    while True:
        kind = rng.choices(("append", "create", "rename", "overwrite", "unlink"), (30, 20, 15, 30, 15))[0]
        data = rng.randbytes(rng.choice((50, 200, 3000, 4096, 9000)))
        if kind == "append":
            yield Operation("write", "log", data, length)
            length += len(data)
        elif kind == "overwrite":
            yield Operation("write", "slots", rng.randbytes(SLOT), rng.randrange(SLOTS) * SLOT)
        elif kind == "rename":
            yield Operation("replace", "current", data)
        elif kind == "unlink" or len(files) >= LIVE_FILES:
            if files:
                yield Operation("unlink", files.pop(rng.randrange(len(files))))
        else:
            files.append(f"file-{rng.getrandbits(48):012x}")
            yield Operation("write", files[-1], data)


def perform(root: Path, operation: Operation) -> None:
    """Return when it is durable."""
    kind, name, data, offset = operation
    if kind == "unlink":
        (root / name).unlink()
        return
    path = root / (f"{name}.new" if kind == "replace" else name)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        assert os.pwrite(fd, data, offset) == len(data)
        os.fsync(fd)
    finally:
        os.close(fd)
    if kind == "replace":
        path.rename(root / name)


def apply(state: State, operation: Operation) -> State:
    """What the files hold after it."""
    kind, name, data, offset = operation
    after = dict(state)
    if kind == "unlink":
        del after[name]
    elif kind == "replace":
        after[name] = data
    else:
        before = after.get(name, b"").ljust(offset, b"\0")
        after[name] = before[:offset] + data + before[offset + len(data) :]
    return after


def states(seed: int, count: int) -> list[State]:
    """`states[n]` is what is there when the first n operations are done."""
    found: list[State] = [{}]
    for operation, _ in zip(operations(seed), range(count), strict=False):
        found.append(apply(found[-1], operation))
    return found


def complaints(root: Path, before: State, after: State) -> Sequence[str]:
    """What is wrong with the files, when `before` was acknowledged and the step to `after` was under way at most."""
    names = {entry.name for entry in root.iterdir()} - {"lost+found", JUNK, "current.new"}
    found = [f"{name} is there, and should not be" for name in sorted(names - before.keys() - after.keys())]
    for name in sorted(before.keys() & after.keys()):
        if name not in names:
            found.append(f"{name} is gone")
            continue
        content = (root / name).read_bytes()
        old, new = before[name], after[name]
        if content not in (old, new) and not _between(content, old, new):
            at = next((i for i in range(len(old)) if content[i : i + 1] != old[i : i + 1]), len(old))
            found.append(f"{name}: {len(content)} bytes, {len(old)} acknowledged, other from byte {at} on")
    return found


def _between(content: bytes, old: bytes, new: bytes) -> bool:
    """A write that was under way may be there in part; what it adds to the file's length may still be zeros."""
    if len(old) == len(new) == len(content):
        pieces = range(0, len(old), 512)
        return all(content[i : i + 512] in (old[i : i + 512], new[i : i + 512]) for i in pieces)
    if not new.startswith(old) or not content.startswith(old) or len(content) > len(new):
        return False
    return all(byte in (0, new[i]) for i, byte in enumerate(content[len(old) :], len(old)))
