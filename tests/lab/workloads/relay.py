"""Connections to a TCP port of the guest go on to a unix socket there, so that the host can call what listens on it; or
to a port elsewhere, which the guest then finds at its own loopback."""

from __future__ import annotations

import contextlib
import socket
import threading

from tests.lab.workloads import channel


def relay(port: int, path: str = "", target: tuple[str, int] | None = None) -> int:
    """Until told to stop; how many connections there were. To `path`, or to an address and port."""
    count = 0
    with socket.create_server(("0.0.0.0", port)) as listener:
        channel.emit("relaying")
        listener.settimeout(0.05)
        while not channel.stopping():
            try:
                outside, _ = listener.accept()
            except TimeoutError:
                continue
            try:
                inside = _connect(path, target)
            except OSError:
                # as if nobody listened
                outside.close()
                continue
            count += 1
            outside.settimeout(None)
            for one, other in ((outside, inside), (inside, outside)):
                threading.Thread(target=pump, args=(one, other), daemon=True).start()
    return count


def _connect(path: str, target: tuple[str, int] | None) -> socket.socket:
    if target is not None:
        connection = socket.create_connection((target[0], target[1]), timeout=10)
        connection.settimeout(None)
        return connection
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
    except OSError:
        connection.close()
        raise
    return connection


def pump(one: socket.socket, other: socket.socket) -> None:
    """Both directions end together; each closes what it reads from."""
    with one:
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
