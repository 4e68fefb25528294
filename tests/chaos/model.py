"""What must be in a directory of files, whatever happens below: the names, and every byte that was synced."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class File:
    """`now` is what a read must return while nothing breaks; `synced` what must be there after anything.

    `touched` are the ranges written since: what they hold after a crash is open. `rewritten`: it was truncated since.
    """

    now: bytearray = field(default_factory=bytearray)
    synced: bytes = b""
    touched: list[tuple[int, int]] = field(default_factory=list)
    rewritten: bool = False

    def write(self, offset: int, data: bytes) -> None:
        self.now[len(self.now) :] = bytes(max(0, offset + len(data) - len(self.now)))
        self.now[offset : offset + len(data)] = data
        self.touched.append((offset, offset + len(data)))

    def truncate(self, size: int) -> None:
        del self.now[size:]
        self.rewritten = True

    def sync(self) -> None:
        self.synced = bytes(self.now)
        self.touched.clear()
        self.rewritten = False

    def lost(self, found: bytes) -> int:
        """Bytes that had to survive a crash, and are not in what was found after it."""
        if self.rewritten:
            return 0
        missing = max(0, len(self.synced) - len(found))
        expected = bytearray(self.synced[: len(found)])
        for start, end in self.touched:
            end = min(end, len(expected))
            if start < end:
                expected[start:end] = found[start:end]
        return missing + differing(expected, found[: len(expected)])

    def owed(self) -> int:
        """Bytes that `lost` looks at."""
        if self.rewritten:
            return 0
        kept = bytearray(b"\1") * len(self.synced)
        for start, end in self.touched:
            end = min(end, len(kept))
            kept[start:end] = bytes(max(0, end - start))
        return sum(kept)

    def adopt(self, found: bytes) -> None:
        """After a crash, what is there is what there is; no more than before is owed of it until it is synced."""
        self.rewritten = self.rewritten or self.lost(found) > 0
        self.now = bytearray(found)


def differing(expected: bytes | bytearray, found: bytes | bytearray) -> int:
    """How many bytes differ; what is missing at the end counts."""
    if expected == found:
        return 0
    shorter = min(len(expected), len(found))
    return sum(a != b for a, b in zip(expected, found, strict=False)) + max(len(expected), len(found)) - shorter


@dataclass(frozen=True)
class Change:
    """A change of names: `old` goes, `new` comes, either may be empty. Both: `old` is renamed, over what `new` was."""

    old: str = ""
    new: str = ""


class Directory:
    """Names survive as soon as the call that changed them has returned: the filesystem is mounted `dirsync`.

    `pending` is the change that is under way: cut off, it has happened or not, and never in part.
    """

    def __init__(self) -> None:
        self.files: dict[str, File] = {}
        self.pending: Change | None = None
        self._before: dict[str, File] = {}

    def begin(self, change: Change) -> None:
        self.pending = change

    def done(self) -> None:
        change, self.pending = self.pending, None
        assert change is not None
        self._before = dict(self.files)
        file = self.files.pop(change.old) if change.old else File(rewritten=True)
        if change.new:
            self.files[change.new] = file

    def undo_unconfirmed(self, found: set[str]) -> bool:
        """The journal failed under the last change, which may have returned as if it had not: take it back if it is
        not among the names that were `found`. Whether it was."""
        if found in self._possible() or set(self._before) != found:
            return False
        self.files = self._before
        self.pending = None
        return True

    def _possible(self) -> list[set[str]]:
        """The names without what is under way, and with it."""
        before = set(self.files)
        if self.pending is None:
            return [before, before]
        return [before, (before - {self.pending.old}) | ({self.pending.new} - {""})]

    def recover(self, found: set[str]) -> set[str]:
        """After a crash `found` are the names. Returns those that are wrong: missing, or there against all orders."""
        before, after = self._possible()
        if len(after ^ found) < len(before ^ found):
            self.done()
        self.pending = None
        wrong = set(self.files) ^ found
        for name in wrong:
            if self.files.pop(name, None) is None:
                self.files[name] = File(rewritten=True)
        return wrong
