"""Requests that go past the page cache: O_DIRECT and Linux AIO, so that a slow disk never stops the event loop.

A batch of frames is submitted in one call, and each wake-up takes all completions in one call and answers each
connection with one sendmsg. A request is a slot of the pool and one tuple; there is no task or thread for it.

* Submissions carry NOWAIT. What would have to wait (blocks to allocate in a hole, mostly) comes back with EAGAIN and
  is submitted again by a thread. Without it, submitting into holes took up to 2 ms beside an fdatasync (ext4).
  Allocating ahead does not help: unwritten extents wait for the journal even under NOWAIT.
* Blocks are 4 KiB. A write of parts of blocks reads them, and writes them back whole. Requests in flight never overlap
  (the engine's promise), but two such writes may share a block: the second is not begun before the first is done.
* With `io: "auto"` writes and what the page cache has go through it, and only reads that would wait come here. The
  kernel keeps the two coherent: it writes back what is dirty in the range of a direct read (that waits, so a thread
  does it), and drops from the cache what a direct write or a punched hole makes old.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final, Protocol

import trio
from crc32c import crc32c

from engine.errors import CorruptBlockError
from engine.ops import READ, WRITE, Data
from engine.replica.aio import NOWAIT, PREAD, PWRITE, Patience, Pool
from engine.replica.backlog import Item
from engine.replica.barrier import Barrier, Era
from engine.wire.frame import REPLY, Frame, FrameType, Status, encode_header

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from engine.replica.backlog import Backlog
    from engine.replica.exchange import Exchange

BLOCK: Final = 4096
SMALL, SMALL_COUNT = 16 << 10, 208
MEDIUM, MEDIUM_COUNT = 128 << 10, 32
LARGE, LARGE_COUNT = (1 << 20) + BLOCK, 16  # the largest request, unaligned
SLOTS = SMALL_COUNT + MEDIUM_COUNT + LARGE_COUNT
MAX_UNMAPS = 256

IO_ERROR: Final = int(Status.IO_ERROR)
WRITE_LAYER: Final = int(FrameType.WRITE_LAYER)

# connection, type, seq, offset, length, payload of an unaligned write, era of a write
Request = tuple["Exchange", int, int, int, int, Data, Era[Item] | None]


class Disk(Protocol):
    """What `Direct` needs of a `Ring`; tests put delays and errors between."""

    eventfd: int

    def prepare(self, tag: int, opcode: int, fd: int, address: int, length: int, offset: int, flags: int) -> None: ...
    def flags(self, tag: int) -> int: ...
    def submit(self) -> int: ...
    def submit_all(self, tags: Sequence[int]) -> None: ...
    def completions(self, wait: bool = False) -> list[tuple[int, int]]: ...
    def close(self) -> None: ...


class Direct:
    """`read`, `write` and `unmap` return False, and set `starved`, when the request has to be brought again later."""

    def __init__(self, server: Backlog, ring: Disk) -> None:
        """`ring` has room for `SLOTS` requests, and is closed by `close`."""
        self.ring = ring
        self.starved = False
        self._server = server
        self._at: list[int] = []  # of each slot in the pool
        self._free: list[list[int]] = []  # the free list to which each slot belongs
        size = 0
        for count, room in ((SMALL_COUNT, SMALL), (MEDIUM_COUNT, MEDIUM), (LARGE_COUNT, LARGE)):
            self._free += [list(range(len(self._at), len(self._at) + count))] * count
            self._at += range(size, size + count * room, room)
            size += count * room
        self._small, self._medium, self._large = self._free[0], self._free[SMALL_COUNT], self._free[-1]
        pool = Pool(size)
        self._memory, self._address = pool.memory, pool.address
        self._requests: list[Request | None] = [None] * SLOTS
        self._spans = [0] * SLOTS  # bytes of the whole blocks that the request covers
        self._dones = [0] * SLOTS
        self._opcodes = [PREAD] * SLOTS
        self._fds = [-1] * SLOTS
        self._shared: set[int] = set()  # blocks that a write in flight covers in part
        self._barrier: Barrier[Item] = Barrier()
        self._flags = NOWAIT
        self.unmaps: list[tuple[Item, Era[Item]]] = []
        self.again: list[int] = []
        self._patience = Patience()
        self.wake_unmaps = trio.Event()
        self.wake_again = trio.Event()

    @property
    def idle(self) -> bool:
        """Nothing is under way."""
        return not self.in_flight and self._barrier.idle

    @property
    def in_flight(self) -> int:
        """Reads and writes."""
        return SLOTS - len(self._small) - len(self._medium) - len(self._large)

    def close(self) -> None:
        """Waits for what the disk has."""
        self.ring.close()

    # requests

    def read(self, connection: Exchange, fd: int, seq: int, offset: int, length: int) -> bool:
        head = offset & 4095
        span = (head + length + 4095) & -4096
        free = self._small if span <= SMALL else self._medium if span <= MEDIUM else self._large
        if not free:
            self.starved = True
            return False
        slot = free.pop()
        self._requests[slot] = (connection, READ, seq, offset, length, b"", None)
        self._begin(slot, PREAD, fd, offset - head, span)
        return True

    def write(self, connection: Exchange, fd: int, seq: int, offset: int, payload: Data) -> bool:
        """The intent bits of the range are durable."""
        length = len(payload)
        head = offset & 4095
        span = (head + length + 4095) & -4096
        free = self._small if span <= SMALL else self._medium if span <= MEDIUM else self._large
        if not free:
            self.starved = True
            return False
        era = self._barrier.current
        if span == length:
            slot = free.pop()
            at = self._at[slot]
            self._memory[at : at + length] = payload
            self._requests[slot] = (connection, WRITE, seq, offset, length, b"", era)
            self._begin(slot, PWRITE, fd, offset, span)
        else:
            if not self._take_edges(offset, length):
                return False
            slot = free.pop()
            self._requests[slot] = (connection, WRITE, seq, offset, length, payload, era)
            self._begin(slot, PREAD, fd, offset - head, span)
        era.count += 1
        return True

    def unmap(self, connection: Exchange, frame: Frame) -> bool:
        """Punching a hole waits for all direct I/O of the file, so a thread does it. Intent bits as for `write`.

        A WRITE_LAYER of the head, which punches holes too, goes the same way.
        """
        if len(self.unmaps) >= MAX_UNMAPS:
            self.starved = True
            return False
        if not self._take_edges(frame[3], frame[4]):
            return False
        era = self._barrier.current
        era.count += 1
        self.unmaps.append(((connection, frame), era))
        self.wake_unmaps.set()
        return True

    def submit(self) -> None:
        """A lone request is waited for, shortly, which saves a turn of the event loop, unless the disk is too slow."""
        if self.ring.submit() != 1 or self.in_flight != 1:
            return
        if not self._patience.worth():
            return
        done = self.ring.completions(wait=True)
        self._patience.found(bool(done))
        if done:
            self._take(done)

    def barrier(self, item: Item) -> bool:
        """Have `item` flushed when all writes that are under way have completed; False when there are none."""
        return self._barrier.park(item)

    def discard(self) -> list[Item]:
        """Flushes that wait in `barrier`: forget them."""
        return self._barrier.discard()

    def _begin(self, slot: int, opcode: int, fd: int, offset: int, span: int) -> None:
        self._spans[slot] = span
        self._dones[slot] = 0
        self._opcodes[slot] = opcode
        self._fds[slot] = fd
        self.ring.prepare(slot, opcode, fd, self._address + self._at[slot], span, offset, self._flags)

    @staticmethod
    def _edges(offset: int, length: int) -> set[int]:
        """Blocks that the range covers in part."""
        end = offset + length
        edges = set()
        if offset % BLOCK:
            edges.add(offset // BLOCK)
        if end % BLOCK:
            edges.add(end // BLOCK)
        return edges

    def _take_edges(self, offset: int, length: int) -> bool:
        edges = self._edges(offset, length)
        if edges & self._shared:
            self.starved = True
            return False
        self._shared |= edges
        return True

    # completions

    def reap(self) -> None:
        """The ring's eventfd is readable."""
        self._take(self.ring.completions())

    def _take(self, completions: list[tuple[int, int]]) -> None:
        touched: dict[Exchange, None] = {}
        several = len(completions) > 1
        for slot, result in completions:
            self._completed(slot, result, several, touched)
        self._settle(touched)

    def _settle(self, touched: Iterable[Exchange]) -> None:
        """After some requests were done."""
        self.ring.submit()  # second halves of unaligned writes, rests of short transfers
        if self.again:
            self.wake_again.set()
        self.starved = False
        self._server.direct_progress()
        for connection in touched:
            connection.answer_written()
            connection.send()

    def _completed(self, slot: int, result: int, several: bool, touched: dict[Exchange, None]) -> None:
        request = self._requests[slot]
        assert request is not None
        connection, kind, seq, offset, length, payload, era = request
        if self._dones[slot] + result != self._spans[slot]:
            code = self._go_on(slot, result, offset)
            if not code:
                return
            self._finish(slot, offset, length, payload, era)
            if self._answers(connection, kind, seq):
                connection.io_error((kind, 0, seq, offset, length, b""), OSError(code, os.strerror(code)))
            touched[connection] = None
            return
        if payload and self._opcodes[slot] == PREAD:
            # the second half: the new bytes among the old ones of their blocks
            head = offset & 4095
            at = self._at[slot] + head
            self._memory[at : at + length] = payload
            self._begin(slot, PWRITE, self._fds[slot], offset - head, self._spans[slot])
            return
        server = self._server
        touched[connection] = None
        if server.owner is not connection or server.failed:
            self._answers(connection, kind, seq)
        elif kind == READ:
            at = self._at[slot] + (offset & 4095)
            data: bytes = self._memory[at : at + length]
            try:
                if self._spans[slot] == length:
                    crc = server.store.checked(offset, data)
                else:
                    start = self._at[slot]
                    server.store.checked(offset & -BLOCK, self._memory[start : start + self._spans[slot]])
                    crc = crc32c(data)
            except CorruptBlockError as error:
                connection.corrupt((READ, 0, seq, offset, length, b""), error)
            else:
                connection.queue(encode_header(READ | REPLY, 0, seq, offset, length, length, crc), data)
                server.counters.reads += 1
                server.counters.read_bytes += length
        elif several and connection.gathers:
            connection.wrote(seq, length)
        else:
            connection.queue(encode_header(WRITE | REPLY, 0, seq, offset, length))
            server.counters.writes += 1
            server.counters.written_bytes += length
        self._finish(slot, offset, length, payload, era)

    def _answers(self, connection: Exchange, kind: int, seq: int) -> bool:
        """Whether the request may be answered with its result; if not, it is refused here."""
        server = self._server
        if server.failed:
            connection.reply(kind, IO_ERROR, seq, payload=server.failed.encode())
        elif server.owner is not connection:
            connection.refuse_unopened((kind, 0, seq, 0, 0, b""))
        else:
            return True
        return False

    def _finish(self, slot: int, offset: int, length: int, payload: Data, era: Era[Item] | None) -> None:
        self._requests[slot] = None
        self._free[slot].append(slot)
        if payload:
            self._shared -= self._edges(offset, length)
        if era is not None:
            self._done(era)

    def _done(self, era: Era[Item]) -> None:
        released = self._barrier.done(era)
        if released:
            self._server.flush_head(released)

    def _go_on(self, slot: int, result: int, offset: int) -> int:
        """After a result that is not all: 0 when the request goes on, else why not."""
        if result < 0:
            if result == -errno.EAGAIN:
                self.again.append(slot)
                return 0
            if self.ring.flags(slot) & NOWAIT and result in (-errno.EOPNOTSUPP, -errno.EINVAL):
                # a kernel, a file system or a disk that does not know NOWAIT, or there is another reason, to be seen
                self._flags = 0 if result == -errno.EOPNOTSUPP else self._flags
                self.again.append(slot)
                return 0
            return -result
        done = self._dones[slot] + (result & -BLOCK)
        if not result & -BLOCK:
            return errno.EIO
        self._dones[slot] = done
        start = offset - (offset & 4095) + done
        at = self._address + self._at[slot] + done
        self.ring.prepare(slot, self._opcodes[slot], self._fds[slot], at, self._spans[slot] - done, start, self._flags)
        return 0

    def punched(self, batch: list[tuple[Item, Era[Item]]], errors: list[OSError | None]) -> None:
        """What was in `unmaps` has been done, or has failed."""
        touched: dict[Exchange, None] = {}
        for ((connection, frame), era), error in zip(batch, errors, strict=True):
            kind, _, seq, offset, length, _ = frame
            touched[connection] = None
            if self._answers(connection, kind, seq):
                if error is not None:
                    connection.io_error(frame, error)
                else:
                    connection.reply(kind, 0, seq, offset=offset, length=length)
                    if kind != WRITE_LAYER:
                        self._server.counters.unmaps += 1
            self._shared -= self._edges(offset, length)
            self._done(era)
        self._settle(touched)
