"""Where a replica listens, and the sockets it accepts."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from pathlib import Path

from engine.address import Address
from engine.errors import EngineError

# a non-blocking connect to a unix socket whose backlog is full fails at once (EAGAIN, unix(7)): strangers could do that
BACKLOG = 1024
SOCKET_BUFFER = 4 << 20


class ListenError(EngineError):
    def __init__(self, address: Address, reason: str) -> None:
        super().__init__(address, reason)
        self.address = address
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot listen on {self.address}: {self.reason}"


class Listener:
    """`address` is the actual one, with the port that the kernel chose for port 0."""

    def __init__(self, sock: socket.socket, address: Address, path: Path | None = None) -> None:
        self.sock = sock
        self.address = address
        self._path = path
        self._inode = path.stat().st_ino if path else 0

    def close(self) -> None:
        self.sock.close()
        if self._path is not None:
            with contextlib.suppress(FileNotFoundError):
                if self._path.lstat().st_ino == self._inode:
                    self._path.unlink()


def listen(address: Address) -> Listener:
    """Raises ListenError."""
    try:
        if isinstance(address.target, str):
            return _listen_unix(address, Path(address.target))
        return _listen_tcp(address)
    except OSError as error:
        raise ListenError(address, error.strerror or str(error)) from error


def _listen_unix(address: Address, path: Path) -> Listener:
    _remove_stale(address, path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    before = os.umask(0o177)
    try:
        sock.bind(str(path))
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    finally:
        os.umask(before)
    return Listener(sock, address, path)


def _remove_stale(address: Address, path: Path) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ListenError(address, "there is a file that is not a socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except FileNotFoundError:
            return
        except BlockingIOError:
            pass  # its backlog is full, so somebody is there
    raise ListenError(address, "another process answers there")


def _listen_tcp(address: Address) -> Listener:
    sock = socket.socket(address.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address.target)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    host, port = sock.getsockname()[:2]
    return Listener(sock, Address(address.family, (host, port)))


def tune(sock: socket.socket) -> None:
    """Make an accepted or connected data socket fit for batches. Never fails."""
    sock.setblocking(False)
    with contextlib.suppress(OSError):
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        else:
            # TCP sizes its buffers itself, and better
            for plain, forced in ((socket.SO_SNDBUF, 32), (socket.SO_RCVBUF, 33)):  # SO_SNDBUFFORCE, SO_RCVBUFFORCE
                try:
                    sock.setsockopt(socket.SOL_SOCKET, forced, SOCKET_BUFFER)
                except PermissionError:
                    sock.setsockopt(socket.SOL_SOCKET, plain, SOCKET_BUFFER)
