"""The address under which clients know a share, on the node that serves it: by netlink, with a lifetime.

The kernel takes the address away by itself when nobody prolongs it, so a node whose share manager was killed or stopped
stops to answer for it. A gratuitous ARP tells the network where the address is now.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import ipaddress
import os
import socket
import struct

import msgspec

from share_manager.errors import EnvironmentProblem, InvalidValueError

# linux/rtnetlink.h, linux/netlink.h, linux/if_addr.h
_RTM_NEWADDR, _RTM_DELADDR = 20, 21
_NLM_REQUEST, _NLM_ACK, _NLM_REPLACE, _NLM_CREATE = 0x1, 0x4, 0x100, 0x400
_NLMSG_ERROR = 2
_IFA_ADDRESS, _IFA_LOCAL, _IFA_CACHEINFO, _IFA_FLAGS = 1, 2, 6, 8
_NO_PREFIX_ROUTE = 0x200
_NODAD = 0x02
_HEADER = struct.Struct("=IHHII")
_IFADDR = struct.Struct("=BBBBI")
_ETH_P_ARP = 0x0806
_SIOCGIFHWADDR = 0x8927


class FloatingAddressError(EnvironmentProblem):
    def __init__(self, address: FloatingAddress, error: OSError) -> None:
        super().__init__(address, error)
        self.address = address
        self.error = error

    def __str__(self) -> str:
        return f"address {self.address} cannot be set: {self.error.strerror or self.error}; see `ip link` for its name"


class FloatingAddress(msgspec.Struct, frozen=True):
    """An IPv4 or IPv6 address with the length of its prefix, on an interface."""

    address: str
    prefix: int
    interface: str

    @classmethod
    def parse(cls, text: str, interface: str) -> FloatingAddress:
        """Of ADDRESS or ADDRESS/PREFIX. Raises InvalidValueError."""
        try:
            found = ipaddress.ip_interface(text)
        except ValueError:
            raise InvalidValueError("--address", text, "write ADDRESS/PREFIX, such as 192.0.2.10/24") from None
        return cls(str(found.ip), found.network.prefixlen, interface)

    def __str__(self) -> str:
        return f"{self.address}/{self.prefix} on {self.interface}"

    @property
    def family(self) -> int:
        return socket.AF_INET6 if ":" in self.address else socket.AF_INET

    def hold(self, seconds: int) -> None:
        """Have it for so long from now on, unless it is asked for again. Raises FloatingAddressError."""
        flags = _NLM_REPLACE | _NLM_CREATE
        cache = struct.pack("=IIII", seconds, seconds, 0, 0)
        extra = _attribute(_IFA_CACHEINFO, cache) + _attribute(_IFA_FLAGS, struct.pack("=I", _NO_PREFIX_ROUTE | _NODAD))
        try:
            self._ask(_RTM_NEWADDR, flags, extra)
        except OSError as error:
            raise FloatingAddressError(self, error) from error

    def drop(self) -> None:
        """Harmless when it is not here."""
        with contextlib.suppress(OSError):
            self._ask(_RTM_DELADDR, 0, b"")

    def announce(self) -> None:
        """Tell the neighbours, who may know it from another node. Does what it can."""
        with contextlib.suppress(OSError):
            if self.family == socket.AF_INET:
                self._announce_arp()
            else:
                self._announce_neighbour()

    def _announce_arp(self) -> None:
        """RFC 5227 section 3: a request and an answer for the address itself."""
        mac = self._mac()
        ip = socket.inet_aton(self.address)
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC) as raw:
            raw.bind((self.interface, _ETH_P_ARP))
            for operation, target in ((1, bytes(6)), (2, b"\xff" * 6)):
                body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, operation) + mac + ip + target + ip
                raw.send(b"\xff" * 6 + mac + struct.pack("!H", _ETH_P_ARP) + body)

    def _announce_neighbour(self) -> None:
        """RFC 4861 section 7.2.6: an unsolicited advertisement to all nodes, that overrides."""
        mac = self._mac()
        ip = socket.inet_pton(socket.AF_INET6, self.address)
        with socket.socket(socket.AF_INET6, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_ICMPV6) as raw:
            raw.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
            raw.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, socket.if_nametoindex(self.interface))
            raw.bind((self.address, 0))
            raw.sendto(struct.pack("!BBHI", 136, 0, 0, 0x20000000) + ip + b"\x02\x01" + mac, ("ff02::1", 0))

    def _mac(self) -> bytes:
        """By netdevice(7): /sys may show another network namespace. Raises OSError."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as any_socket:
            request = struct.pack("16sH14x8x", self.interface.encode(), 0)
            return fcntl.ioctl(any_socket, _SIOCGIFHWADDR, request)[18:24]

    def _ask(self, kind: int, flags: int, extra: bytes) -> None:
        """Raises OSError."""
        packed = socket.inet_pton(self.family, self.address)
        index = socket.if_nametoindex(self.interface)
        body = _IFADDR.pack(self.family, self.prefix, 0, 0, index)
        body += _attribute(_IFA_LOCAL, packed) + _attribute(_IFA_ADDRESS, packed) + extra
        length = _HEADER.size + len(body)
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as netlink:
            netlink.settimeout(1.0)
            netlink.send(_HEADER.pack(length, kind, _NLM_REQUEST | _NLM_ACK | flags, 1, 0) + body)
            answer = netlink.recv(65536)
        _, answered, *_ = _HEADER.unpack_from(answer)
        if answered != _NLMSG_ERROR:
            raise OSError(errno.EPROTO, os.strerror(errno.EPROTO))
        (code,) = struct.unpack_from("=i", answer, _HEADER.size)
        if code:
            raise OSError(-code, os.strerror(-code))


def _attribute(kind: int, value: bytes) -> bytes:
    length = 4 + len(value)
    return struct.pack("=HH", length, kind) + value + bytes(-length % 4)
