"""The workload: writers on a mounted filesystem who know what must be there, and look all the time.

A process of its own, told by lines on its standard input and telling by lines on its standard output. Every writer has
a directory and a model of it. While nothing breaks, whatever is read must be what was written last. After an I/O error
(the volume below was lost and is attached anew) it waits to be told of the new mount; then every name and every synced
byte must be there.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Literal

import msgspec

from tests.chaos.model import Change, Directory, File, differing

WRITERS = 3
FILES = 24
LARGEST = 256 << 10
STALL = 0.5
_PAUSE = (0.005, 0.04)


Act = Literal["go", "stop", "verify"]


class Order(msgspec.Struct, frozen=True):
    """`go`: work below `where`, after looking at what is there. `stop`: end, and sync all. `verify`: read all.
    `journal_failed`: the filesystem had met an error of its own and gone read-only."""

    serial: int
    act: Act
    where: str = ""
    journal_failed: bool = False


class Totals(msgspec.Struct, kw_only=True):
    """`operations` that succeeded, of them `syncs`; `verified` reads and looks whose outcome was compared with the
    model. `lost_bytes` were synced; `wrong_bytes` were read back wrong while nothing had broken. `unconfirmed_names`:
    changes that ext4 reported as done although its journal had just failed (it does, on any disk that is full)."""

    operations: int = 0
    syncs: int = 0
    verified: int = 0
    written_bytes: int = 0
    verified_bytes: int = 0
    synced_bytes: int = 0
    lost_bytes: int = 0
    lost_names: int = 0
    unconfirmed_names: int = 0
    wrong_bytes: int = 0
    errors: int = 0

    def __iadd__(self, other: Totals) -> Totals:
        for name in self.__struct_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self


class Said(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`done`: order `serial` is carried out, or failed with `message`. `broken`: a writer met an error. `stall`: an
    operation took from `start` to `end` (monotonic seconds). `wrong`: `message` says what was lost. `totals`: every
    second. `error` is the number of the I/O error that broke a writer, or made an order fail."""

    event: Literal["done", "broken", "stall", "wrong", "totals"]
    serial: int = 0
    message: str = ""
    error: int = 0
    start: float = 0.0
    end: float = 0.0
    totals: Totals | None = None


_out = threading.Lock()


def say(said: Said) -> None:
    with _out:
        os.write(1, msgspec.json.encode(said) + b"\n")


class Cut:
    """A flag in a file that two processes share: set before the requests that hang below are failed.

    What returns afterwards counts as failed, whatever it says: ext4 reports success for a `dirsync` change of names
    whose commit failed. (`serve` has killed ganesha by then, so that it tells nobody.)
    """

    def __init__(self, path: Path) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, 1)
            self._map = mmap.mmap(fd, 1)
        finally:
            os.close(fd)

    def set(self, value: bool) -> None:
        self._map[0] = value

    def __bool__(self) -> bool:
        return bool(self._map[0])


class Writer:
    def __init__(self, number: int, seed: int, cut: Cut) -> None:
        self.cut = cut
        self.name = f"w{number}"
        self.rng = Random(f"{seed} {number}")
        self.model = Directory()
        self.totals = Totals()
        self.made = 0
        self.root = Path()

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            end = time.monotonic()
            if end - start > STALL:
                say(Said(event="stall", message=what, start=start, end=end))
        if self.cut:
            raise OSError(errno.EIO, "the volume was lost meanwhile")
        self.totals.operations += 1

    def _wrong(self, message: str) -> None:
        say(Said(event="wrong", message=f"{self.root.name}/{message}"))

    # while nothing breaks

    def work(self, stopped: Callable[[], bool]) -> None:
        """Until `stopped`. Raises OSError."""
        acts: tuple[tuple[Callable[[], None], int], ...]
        acts = ((self._create, 8), (self._append, 20), (self._overwrite, 20), (self._sync, 22))
        acts += ((self._rename, 6), (self._remove, 5), (self._truncate, 2), (self._check, 17))
        choices, weights = [act for act, _ in acts], [weight for _, weight in acts]
        while not stopped():
            (act,) = self.rng.choices(choices, weights)
            if not self.model.files:
                act = self._create
            if act != self._create or len(self.model.files) < FILES:
                act()
            time.sleep(self.rng.uniform(*_PAUSE))

    def _any(self) -> tuple[str, File]:
        name = self.rng.choice(sorted(self.model.files))
        return name, self.model.files[name]

    def _new_name(self) -> str:
        self.made += 1
        return f"f{self.made}"

    def _change(self, change: Change, what: str, act: Callable[[], None]) -> None:
        self.model.begin(change)
        with self._timed(what):
            act()
        self.model.done()

    def _create(self) -> None:
        name = self._new_name()
        self._change(Change(new=name), "create", lambda: os.close(os.open(self.root / name, os.O_CREAT | os.O_EXCL)))

    def _remove(self) -> None:
        name, _ = self._any()
        self._change(Change(old=name), "remove", lambda: os.unlink(self.root / name))

    def _rename(self) -> None:
        old, _ = self._any()
        new = self.rng.choice([self._new_name(), self._any()[0]])
        if new != old:
            self._change(Change(old=old, new=new), "rename", lambda: os.rename(self.root / old, self.root / new))

    def _write(self, name: str, file: File, offset: int, data: bytes) -> None:
        # in the model first: cut off in the middle, any part of it may be there
        file.write(offset, data)
        with self._timed("write"):
            fd = os.open(self.root / name, os.O_WRONLY)
            try:
                written = os.pwrite(fd, data, offset)
            finally:
                os.close(fd)
        if written != len(data):
            raise OSError(errno.EIO, f"{written} of {len(data)} bytes were written")
        self.totals.written_bytes += written

    def _append(self) -> None:
        name, file = self._any()
        room = LARGEST - len(file.now)
        if room > 0:
            self._write(name, file, len(file.now), self.rng.randbytes(self.rng.randint(1, min(room, 48 << 10))))

    def _overwrite(self) -> None:
        name, file = self._any()
        if file.now:
            offset = self.rng.randrange(len(file.now))
            length = self.rng.randint(1, min(len(file.now) - offset, 24 << 10))
            self._write(name, file, offset, self.rng.randbytes(length))

    def _truncate(self) -> None:
        name, file = self._any()
        size = self.rng.randint(0, len(file.now))
        file.truncate(size)
        with self._timed("truncate"):
            os.truncate(self.root / name, size)

    def _sync(self) -> None:
        name, file = self._any()
        self._sync_file(name, file)

    def _sync_file(self, name: str, file: File) -> None:
        with self._timed("fsync"):
            fd = os.open(self.root / name, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        file.sync()
        self.totals.syncs += 1
        self.totals.synced_bytes += len(file.synced)

    def _check(self) -> None:
        name, file = self._any()
        found = self._read(name)
        wrong = differing(file.now, found)
        if wrong:
            # what could not be written back is gone from the page cache, and fsync is the one to say so
            self._sync_file(name, file)
            self.totals.wrong_bytes += wrong
            self._wrong(f"{name}: {wrong} of {len(file.now)} bytes read back wrong")
        names = set(os.listdir(self.root))
        if names != set(self.model.files):
            self.totals.lost_names += 1
            self._wrong(f"names: {sorted(names ^ set(self.model.files))} are wrong")
        self.totals.verified += 2
        self.totals.verified_bytes += len(found)

    def _read(self, name: str) -> bytes:
        """From below the page cache, as far as its pages are clean."""
        with self._timed("read"):
            fd = os.open(self.root / name, os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                return os.read(fd, LARGEST + 1)
            finally:
                os.close(fd)

    # after a crash

    def recover(self, where: Path, journal_failed: bool) -> None:
        """Names and synced bytes must be there; what else is found is taken as it is, and synced. Raises OSError."""
        self.root = where / self.name
        if not self.root.exists():
            if self.model.files:
                self._wrong("the directory is gone")
                self.totals.lost_names += 1
            self.root.mkdir(exist_ok=True)
        names = set(os.listdir(self.root))
        if journal_failed:
            self.totals.unconfirmed_names += self.model.undo_unconfirmed(names)
        wrong = self.model.recover(names)
        if wrong:
            self.totals.lost_names += len(wrong)
            self._wrong(f"names: {sorted(wrong)} are missing, or there although they were removed")
        for name, file in self.model.files.items():
            found = self._read(name)
            lost = file.lost(found)
            if lost:
                self.totals.lost_bytes += lost
                self._wrong(f"{name}: {lost} of {len(file.synced)} synced bytes are lost")
            self.totals.verified += 1
            self.totals.verified_bytes += file.owed()
            file.adopt(found)
        self.sync_all()

    def verify(self) -> None:
        """All of it is synced: it is read and compared, byte for byte. Raises OSError."""
        names = set(os.listdir(self.root))
        if names != set(self.model.files):
            self.totals.lost_names += len(names ^ set(self.model.files))
            self._wrong(f"names: {sorted(names ^ set(self.model.files))} are wrong")
        for name, file in self.model.files.items():
            found = self._read(name) if name in names else b""
            wrong = differing(file.now, found)
            if wrong:
                self.totals.lost_bytes += wrong
                self._wrong(f"{name}: {wrong} of {len(file.now)} bytes are wrong at the end")
            self.totals.verified += 1
            self.totals.verified_bytes += len(found)

    def sync_all(self) -> None:
        for name, file in self.model.files.items():
            self._sync_file(name, file)


class Workload:
    def __init__(self, seed: int, cut: Cut) -> None:
        self.writers = [Writer(number, seed, cut) for number in range(WRITERS)]
        self.threads: list[threading.Thread] = []
        self.stopping = threading.Event()

    def carry_out(self, order: Order) -> None:
        self._stop()
        failed, number = "", 0
        try:
            match order.act:
                case "go":
                    for writer in self.writers:
                        writer.recover(Path(order.where), order.journal_failed)
                case "verify":
                    for writer in self.writers:
                        writer.root = Path(order.where, writer.name)
                        writer.verify()
                case "stop":
                    for writer in self.writers:
                        writer.sync_all()
        except OSError as error:
            failed, number = f"{order.act}: {error}", error.errno or errno.EIO
        say(Said(event="totals", totals=self.totals()))
        say(Said(event="done", serial=order.serial, message=failed, error=number))
        if order.act == "go" and not failed:
            # after that: what a writer meets from here on is not part of the answer
            self.stopping.clear()
            self.threads = [threading.Thread(target=self._run, args=(writer,)) for writer in self.writers]
            for thread in self.threads:
                thread.start()

    def _run(self, writer: Writer) -> None:
        try:
            writer.work(self.stopping.is_set)
        except OSError as error:
            writer.totals.errors += 1
            say(Said(event="broken", message=f"{writer.name}: {error}", error=error.errno or errno.EIO))

    def _stop(self) -> None:
        self.stopping.set()
        for thread in self.threads:
            thread.join()
        self.threads.clear()

    def totals(self) -> Totals:
        total = Totals()
        for writer in self.writers:
            total += writer.totals
        return total

    def report(self, ended: threading.Event) -> None:
        while not ended.wait(1.0):
            say(Said(event="totals", totals=self.totals()))


def main(seed: int, cut: Path) -> None:
    workload = Workload(seed, Cut(cut))
    ended = threading.Event()
    threading.Thread(target=workload.report, args=(ended,), daemon=True).start()
    for line in sys.stdin.buffer:
        workload.carry_out(msgspec.json.decode(line, type=Order))
    ended.set()
    workload._stop()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
