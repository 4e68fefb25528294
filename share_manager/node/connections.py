"""The TCP connections of a share's clients, as the kernel of a node sees them, and how one that has moved is ended.

A client whose server has moved would wait until its own retransmission reaches the new node, which may be as long as
the share was away once more. A *tickle*, an acknowledgement that fits no window, makes it answer at once; the new node
knows no such connection and refuses it with a reset that fits, and the client connects anew (as CTDB does it).
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

_ESTABLISHED = "01"
_ACK = 0x10


class Connection(msgspec.Struct, frozen=True, order=True):
    """A client's end; `local` is the address that it is connected to. `unsent` and `unread` are bytes of its queues."""

    local: str
    host: str
    port: int
    unsent: int = 0
    unread: int = 0

    @property
    def name(self) -> str:
        return f"{self.local} {self.host} {self.port}"

    @classmethod
    def parse(cls, name: str) -> Connection:
        """Raises ValueError."""
        local, host, port = name.split()
        return cls(local, host, int(port))


def rows(text: str, port: int) -> Iterator[list[str]]:
    """Of /proc/net/tcp or tcp6 (proc(5)), those of established connections to a local port."""
    for line in text.splitlines()[1:]:
        fields = line.split()
        if fields[3] == _ESTABLISHED and int(fields[1].rsplit(":", 1)[1], 16) == port:
            yield fields


def parse_table(text: str, port: int) -> list[Connection]:
    found = []
    for fields in rows(text, port):
        local, remote = fields[1].split(":"), fields[2].split(":")
        unsent, unread = fields[4].split(":")
        found.append(
            Connection(_address(local[0]), _address(remote[0]), int(remote[1], 16), int(unsent, 16), int(unread, 16))
        )
    return found


def _address(text: str) -> str:
    """Words of 32 bits, each in the order of this machine."""
    words = (int(text[i : i + 8], 16) for i in range(0, len(text), 8))
    raw = b"".join(word.to_bytes(4, "little") for word in words)
    found = ipaddress.ip_address(raw)
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return str(mapped or found)


def established(port: int, pid: int | str = "self") -> list[Connection]:
    """Of the network namespace of that process."""
    return sorted(one for text in _tables(pid) for one in parse_table(text, port))


def inodes(port: int, pid: int) -> set[int]:
    """The same, of the sockets that a process has."""
    return {int(fields[9]) for text in _tables(pid) for fields in rows(text, port)} - {0}


def _tables(pid: int | str) -> Iterator[str]:
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            yield Path(f"/proc/{pid}/net", table).read_text()


def tickle(connections: Iterable[Connection], port: int) -> None:
    """Does what it can."""
    for connection in connections:
        with contextlib.suppress(OSError):
            _tickle(connection, port)


def _tickle(connection: Connection, port: int) -> None:
    family = socket.AF_INET6 if ":" in connection.local else socket.AF_INET
    local, host = (socket.inet_pton(family, address) for address in (connection.local, connection.host))
    with socket.socket(family, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_TCP) as raw:
        raw.bind((connection.local, 0))
        raw.sendto(segment(local, host, port, connection.port), (connection.host, 0))


def segment(local: bytes, host: bytes, port: int, client_port: int) -> bytes:
    """A bare acknowledgement with sequence and acknowledgement numbers of 0 (RFC 9293 section 3.1)."""
    bare = struct.pack("!HHIIBBHHH", port, client_port, 0, 0, 5 << 4, _ACK, 1024, 0, 0)
    length = struct.pack("!I", len(bare)) if len(local) == 16 else b""
    tail = struct.pack("!3xB", socket.IPPROTO_TCP)
    pseudo = local + host + (length + tail if length else b"\0" + tail[3:] + struct.pack("!H", len(bare)))
    return bare[:16] + struct.pack("!H", _checksum(pseudo + bare)) + bare[18:]


def _checksum(data: bytes) -> int:
    """RFC 1071."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
