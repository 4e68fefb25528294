"""Linux AIO through ctypes: what was prepared goes to the kernel in one call, what completed comes back in one.

Request and result layouts are those of linux/aio_abi.h; see io_submit(2). Only `submit_all` may run in a thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import platform
import struct
from collections import deque
from collections.abc import Sequence
from typing import Final

PREAD: Final = 0
PWRITE: Final = 1
FDSYNC: Final = 3
NOWAIT: Final = 8  # RWF_NOWAIT: EAGAIN where the submission would have to wait, for a lock or to allocate blocks
FLAG_RESFD: Final = 1

POLL_NS = 100_000
MAX_MISSES = 8

# io_setup, io_destroy, io_getevents, io_submit
_CALLS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2), "riscv64": (0, 1, 4, 2)}

# an iocb as eight words: data | key u32, rw flags u32 | opcode u16, priority i16, fd u32 | buffer | bytes | offset
# | reserved | flags u32, eventfd u32; the first half of a word is its lower one on all of these machines
_IOCB_SIZE: Final = 64
_IOCB_WORDS: Final = 8
# an event as four: data | iocb | result | result
_EVENT_SIZE: Final = 32
_EVENT_WORDS: Final = 4
_TIMESPEC = struct.Struct("=qq")

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


def _address(buffer: mmap.mmap | bytearray) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


class Ring:
    """One AIO context for `depth` requests, each known by its tag (0 to `depth` - 1), one at a time.

    `eventfd` is readable when there are completions.
    """

    def __init__(self, depth: int, wait_ns: int = POLL_NS) -> None:
        """`wait_ns`: how long `completions` waits at most.

        Raises OSError: no AIO on this kernel, not allowed, or fs.aio-max-nr reached (EAGAIN).
        """
        calls = _CALLS.get(platform.machine())
        if calls is None or struct.calcsize("P") != 8:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        setup, self._destroy, getevents, submit = (ctypes.c_long(number) for number in calls)
        context = ctypes.c_ulong(0)
        if _syscall(setup, ctypes.c_uint(depth), ctypes.byref(context)):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        self._context = ctypes.c_ulong(context.value)
        self._submit, self._getevents = submit, getevents
        self.eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        iocbs = bytearray(_IOCB_SIZE * depth)
        self._iocbs_at = _address(iocbs)
        self._words = memoryview(iocbs).cast("Q")
        for tag in range(depth):
            self._words[tag * _IOCB_WORDS] = tag
            self._words[tag * _IOCB_WORDS + 7] = FLAG_RESFD | self.eventfd << 32
        self._queue = (ctypes.c_uint64 * depth)()
        self._queued = 0
        events = bytearray(_EVENT_SIZE * depth)
        self._events_at = ctypes.c_void_p(_address(events))
        self._events = memoryview(events).cast("q")
        self._one, self._poll = ctypes.c_long(1), _TIMESPEC.pack(0, wait_ns)
        self._poll_at = ctypes.c_char_p(self._poll)
        self._zero, self._depth, self._no_wait = ctypes.c_long(0), ctypes.c_long(depth), ctypes.c_void_p(None)
        self._failed: deque[tuple[int, int]] = deque()

    def prepare(self, tag: int, opcode: int, fd: int, address: int, length: int, offset: int, flags: int) -> None:
        words, at = self._words, tag * _IOCB_WORDS
        words[at + 1] = flags << 32
        words[at + 2] = opcode | fd << 32
        words[at + 3] = address
        words[at + 4] = length
        words[at + 5] = offset
        self._queue[self._queued] = self._iocbs_at + tag * _IOCB_SIZE
        self._queued += 1

    def flags(self, tag: int) -> int:
        return self._words[tag * _IOCB_WORDS + 1] >> 32

    def submit(self) -> int:
        """Hand over what was prepared, and return how many. What the kernel refuses completes with its error."""
        count, self._queued = self._queued, 0
        if count:
            self._hand_over(self._queue, count)
        return count

    def submit_all(self, tags: Sequence[int]) -> None:
        """Submit these again without NOWAIT; for a worker thread, since it may wait."""
        for tag in tags:
            self._words[tag * _IOCB_WORDS + 1] = 0
        queue = (ctypes.c_uint64 * len(tags))(*(self._iocbs_at + tag * _IOCB_SIZE for tag in tags))
        self._hand_over(queue, len(tags))

    def _hand_over(self, queue: ctypes.Array[ctypes.c_uint64], count: int) -> None:
        # the array, not its address: compiled code lets go of what it does not name any more
        queue_at = ctypes.addressof(queue)
        done = 0
        while done < count:
            taken = _syscall(
                self._submit, self._context, ctypes.c_long(count - done), ctypes.c_void_p(queue_at + done * 8)
            )
            if taken > 0:
                done += taken
                continue
            # the first of them is refused; those behind it may be good
            code = ctypes.get_errno()
            refused = ctypes.c_uint64.from_address(queue_at + done * 8).value
            self._failed.append(((refused - self._iocbs_at) // _IOCB_SIZE, -code))
            os.eventfd_write(self.eventfd, 1)
            done += 1

    def completions(self, wait: bool = False) -> list[tuple[int, int]]:
        """(tag, result) of what has completed; a result is a number of bytes, or an error number below zero.

        With `wait`, which is for a single request in flight, it is waited for, but no longer than `wait_ns`. (Were
        there others, one that completes between the two calls here would not be told by the eventfd any more.)
        """
        if wait:
            count = _syscall(self._getevents, self._context, self._one, self._depth, self._events_at, self._poll_at)
            if count > 0:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self.eventfd)
        else:
            try:
                os.eventfd_read(self.eventfd)
            except BlockingIOError:
                return []
            count = _syscall(self._getevents, self._context, self._zero, self._depth, self._events_at, self._no_wait)
        found = []
        while self._failed:  # appended to by threads
            found.append(self._failed.popleft())
        events = self._events
        found += [(events[at], events[at + 2]) for at in range(0, count * _EVENT_WORDS, _EVENT_WORDS)]
        return found

    def close(self) -> None:
        """Waits for what is submitted."""
        _syscall(self._destroy, self._context)
        os.close(self.eventfd)


class Patience:
    """Whether a disk is worth waiting for, for `completions`: one that was too slow is asked less and less often."""

    def __init__(self) -> None:
        self._misses = 0
        self._skip = 0

    def worth(self) -> bool:
        if self._skip:
            self._skip -= 1
            return False
        return True

    def found(self, anything: bool) -> None:
        """What came of waiting."""
        self._misses = 0 if anything else min(self._misses + 1, MAX_MISSES)
        self._skip = (1 << self._misses) - 1


class Pool:
    """Page-aligned memory, reused for ever; pages cost nothing until they are used."""

    def __init__(self, size: int) -> None:
        self.memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.address = _address(self.memory)
