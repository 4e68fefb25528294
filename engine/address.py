"""Addresses of replicas: `unix:/path` or `tcp:host:port` (IPv6 hosts in brackets)."""

from __future__ import annotations

import ipaddress
import socket

import msgspec

from engine.errors import EngineError


class AddressError(EngineError):
    def __init__(self, text: str, reason: str) -> None:
        super().__init__(text, reason)
        self.text = text
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.text!r} is not a replica address ({self.reason}); write unix:/path or tcp:host:port"


# sun_path of Linux, unix(7), with its closing NUL
_UNIX_PATH_MAX = 107


class Address(msgspec.Struct, frozen=True):
    """`target` is what connect(2) takes for `family`."""

    family: int
    target: str | tuple[str, int]

    @classmethod
    def parse(cls, text: str) -> Address:
        """Raises AddressError."""
        scheme, _, rest = text.partition(":")
        if scheme == "unix":
            if not rest.startswith("/") or len(rest.encode()) > _UNIX_PATH_MAX:
                raise AddressError(text, f"the path must be absolute and at most {_UNIX_PATH_MAX} bytes")
            return cls(socket.AF_UNIX, rest)
        if scheme != "tcp":
            raise AddressError(text, f"unknown scheme {scheme!r}")
        host, _, port = rest.rpartition(":")
        try:
            ip = ipaddress.ip_address(host.strip("[]"))
            number = int(port)
        except ValueError as error:
            raise AddressError(text, str(error)) from None
        if not 0 <= number <= 65535:
            raise AddressError(text, f"port {number} is out of range")
        return cls(socket.AF_INET if ip.version == 4 else socket.AF_INET6, (str(ip), number))

    def __str__(self) -> str:
        if isinstance(self.target, str):
            return f"unix:{self.target}"
        host, port = self.target
        return f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}"
