from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from share_manager import units
from share_manager.errors import InvalidValueError, UsageError


@pytest.mark.parametrize(
    ("text", "size"),
    [("10Gi", 10 << 30), ("512Mi", 512 << 20), ("4Ki", 4096), ("2Ti", 2 << 40), ("8192", 8192)],
)
def test_sizes(text: str, size: int) -> None:
    assert units.parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "10", "10GB", "10G", "-1Gi", "1.5Gi", "0", "0Gi", "5000", "Gi", " 1Gi", "9999999Ti"]
)
def test_no_sizes(text: str) -> None:
    with pytest.raises(InvalidValueError):
        units.parse_size(text)


@given(st.integers(1, units.MAX_SIZE // units.BLOCK))
def test_a_written_size_reads_back(blocks: int) -> None:
    size = blocks * units.BLOCK
    assert units.parse_size(units.format_size(size)) == size


def test_a_size_must_hold_the_filesystem() -> None:
    assert units.check_size(64 << 20, "ext4") == 64 << 20
    with pytest.raises(InvalidValueError, match="xfs has at least 300Mi"):
        units.check_size(64 << 20, "xfs")


@pytest.mark.parametrize("name", ["a", "vol1", "a-b", "0", "a" * 63])
def test_names(name: str) -> None:
    assert units.parse_name(name) == name


@pytest.mark.parametrize("name", ["", "Vol", "-a", "a-", "a_b", "a.b", "a/b", "..", "a" * 64, "a\n", "ä"])
def test_no_names(name: str) -> None:
    with pytest.raises(UsageError):
        units.parse_name(name)


def test_owners_and_modes() -> None:
    assert units.parse_owner("1000:100") == (1000, 100)
    assert units.parse_mode("0777") == 0o777
    assert units.parse_mode("2770") == 0o2770
    for owner in ("root:root", "1", "1:", "-1:0", "4294967295:0", "1:2:3"):
        with pytest.raises(InvalidValueError):
            units.parse_owner(owner)
    for mode in ("9", "0o777", "77777", "rwx", "088"):
        with pytest.raises(InvalidValueError):
            units.parse_mode(mode)


def test_networks() -> None:
    assert units.parse_network("10.0.0.0/8") == "10.0.0.0/8"
    assert units.parse_network("10.1.2.3") == "10.1.2.3/32"
    assert units.parse_network("fd00::/8") == "fd00::/8"
    with pytest.raises(InvalidValueError, match=r"did you mean 10\.0\.0\.0/8"):
        units.parse_network("10.1.2.3/8")
    for text in ("example.com", "10.0.0.0/33", "10.0.0.0/8; }"):
        with pytest.raises(InvalidValueError):
            units.parse_network(text)


def test_grace_is_at_least_the_lease() -> None:
    units.check_grace(20, 30)
    units.check_grace(20, 20)
    for lease, grace in ((30, 20), (0, 30), (121, 180), (20, 181)):
        with pytest.raises(InvalidValueError):
            units.check_grace(lease, grace)


def test_ports_and_addresses() -> None:
    assert units.parse_port(2049) == 2049
    assert units.parse_port(0, "--metrics-port", least=0) == 0
    assert units.parse_address("[::1]") == "::1"
    for port in (0, -1, 65536):
        with pytest.raises(InvalidValueError):
            units.parse_port(port)
    with pytest.raises(InvalidValueError):
        units.parse_address("localhost")


def test_what_a_client_is_told() -> None:
    assert units.endpoint("127.0.0.1", 2049, "vol1") == "nfs://127.0.0.1:2049/vol1"
    assert units.endpoint("::1", 2050, "vol1") == "nfs://[::1]:2050/vol1"
    assert units.mount_command("127.0.0.1", 2049, "v") == "mount -t nfs4 -o vers=4.2 127.0.0.1:/v /mnt"
    assert units.mount_command("::1", 2050, "v") == "mount -t nfs4 -o vers=4.2,port=2050 [::1]:/v /mnt"
