from __future__ import annotations

import socket

import pytest

from engine.address import Address, AddressError


@pytest.mark.parametrize("text", ["unix:/run/r1.sock", "tcp:127.0.0.1:7000", "tcp:[::1]:7000"])
def test_addresses_round_trip(text: str) -> None:
    assert str(Address.parse(text)) == text


def test_families() -> None:
    assert Address.parse("tcp:[fe80::1]:1").family == socket.AF_INET6
    assert Address.parse("tcp:10.0.0.1:1").target == ("10.0.0.1", 1)


@pytest.mark.parametrize(
    "text", ["", "unix:relative", "unix:/" + "x" * 108, "tcp:host:1", "tcp:127.0.0.1:70000", "tcp:127.0.0.1", "udp:1:1"]
)
def test_what_is_no_address_is_said_in_one_line(text: str) -> None:
    with pytest.raises(AddressError, match="write unix:/path or tcp:host:port"):
        Address.parse(text)
