"""Clients' connections outlive the server that dies, until the next one listens.

The kernel closes what a dead process had, and tells clients by a FIN or a RST. They connect anew at once, find nobody,
and wait: 1 s when nothing answers, 3 s when they are refused. So the share manager has a descriptor of each connection
too (pidfd_getfd(2), Linux 5.6). While nobody serves the kernel takes what comes, or the gate drops it; when the next
server listens every connection of the last one gets a RST, and its client connects at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import socket
import struct

import structlog
import trio

from share_manager.node.connections import inodes

log = structlog.get_logger()

LOOK, LOOK_LEAST = 0.25, 1.0
"""Seconds between looks for new connections: while some come, and at the least."""

_SEEK = 8
_PIDFD_GETFD = 438  # on every architecture
_RESET = struct.pack("ii", 1, 0)  # struct linger: closing sends a RST
_libc = ctypes.CDLL(None, use_errno=True)


class KeptConnections:
    """Those of one server at a time, which `follow` gets to know; closed with the object.

    `port` is where it listens.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._living: dict[int, tuple[socket.socket, int]] = {}  # by inode; with the server's descriptor
        self._left: list[socket.socket] = []
        self._sought: dict[int, int] = {}  # how often a connection was looked for that the server does not have
        self._able = True

    def __len__(self) -> int:
        return len(self._living) + len(self._left)

    async def follow(self, pid: int) -> None:
        """Keep what the server has, until cancelled. What it or its client closes is let go."""
        with select.epoll() as hangups:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._hang_up, hangups)
                pause = LOOK
                while self._able:
                    came = await trio.to_thread.run_sync(self._look, pid, hangups)
                    pause = LOOK if came else min(pause * 1.25, LOOK_LEAST)
                    await trio.sleep(pause)

    async def _hang_up(self, hangups: select.epoll) -> None:
        while True:
            await trio.lowlevel.wait_readable(hangups.fileno())
            gone = {fd for fd, _ in hangups.poll(0)}
            for inode, (kept, _) in list(self._living.items()):
                if kept.fileno() in gone and self._living.pop(inode, None) is not None:
                    kept.close()

    def left(self) -> None:
        """The server has ended."""
        self._left += [kept for kept, _ in self._living.values()]
        self._living.clear()
        self._sought.clear()

    def reset(self) -> None:
        """The next server listens."""
        left, self._left = self._left, []
        for kept in left:
            with contextlib.suppress(OSError):
                kept.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            kept.close()

    def close(self) -> None:
        self.left()
        for kept in self._left:
            kept.close()
        self._left.clear()

    def _look(self, pid: int, hangups: select.epoll) -> bool:
        """In a thread, one at a time; the loop's takes away meanwhile. Whether there were new ones."""
        for inode, (kept, number) in list(self._living.items()):
            if _inode(pid, number) != inode and self._living.pop(inode, None) is not None:
                kept.close()
        seen = inodes(self._port, pid)
        # what is not found is of another server in this network
        self._sought = {inode: count for inode, count in self._sought.items() if inode in seen}
        fresh = {inode for inode in seen - self._living.keys() if self._sought.get(inode, 0) < _SEEK}
        if not fresh:
            return False
        try:
            server = os.pidfd_open(pid)
        except ProcessLookupError:
            return False
        found = False
        try:
            for number in _descriptors(pid):
                inode = _inode(pid, number)
                if inode not in fresh:
                    continue
                fd = _libc.syscall(_PIDFD_GETFD, server, number, 0)
                if fd < 0:
                    self._give_up(ctypes.get_errno())
                    return False
                kept = socket.socket(fileno=fd)
                if os.fstat(fd).st_ino != inode:  # closed, and another in its place
                    kept.close()
                    continue
                hangups.register(kept, select.EPOLLRDHUP | select.EPOLLHUP)
                self._living[inode] = (kept, number)
                self._sought.pop(inode, None)
                found = True
        finally:
            os.close(server)
        for inode in fresh - self._living.keys():
            self._sought[inode] = self._sought.get(inode, 0) + 1
        return found

    def _give_up(self, code: int) -> None:
        if code in (errno.EBADF, errno.ESRCH):  # closed, or dead, meanwhile
            return
        self._able = False
        log.warning("clients' connections cannot be kept", reason=os.strerror(code))


def _descriptors(pid: int) -> list[int]:
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/fd")]
    except OSError:
        return []


def _inode(pid: int, number: int) -> int:
    """Of the socket behind a descriptor; 0 when there is none."""
    try:
        target = os.readlink(f"/proc/{pid}/fd/{number}")
    except OSError:
        return 0
    return int(target[8:-1]) if target.startswith("socket:[") else 0
