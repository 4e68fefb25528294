"""A TCP echo on loopback: prints its port, serves one connection, ends with it."""

from __future__ import annotations

import socket

FRAME = 4 << 10


def exactly(connection: socket.socket, buffer: memoryview) -> bool:
    """Fill `buffer`; False when the other side has closed."""
    have = 0
    while have < len(buffer):
        count = connection.recv_into(buffer[have:])
        if not count:
            return False
        have += count
    return True


def main() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        # nobody may come: whoever started it is waited for no longer than this
        listener.settimeout(30)
        connection, _ = listener.accept()
    with connection:
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        frame = memoryview(bytearray(FRAME))
        while exactly(connection, frame):
            connection.sendall(frame)


if __name__ == "__main__":
    main()
