"""What a user may write for a size, a name, an owner, a network, and what it means."""

from __future__ import annotations

import ipaddress
import re

from engine.address import Address, AddressError
from share_manager.errors import InvalidValueError

BLOCK = 4096
MIN_SIZE = {"ext4": 64 << 20, "xfs": 300 << 20, "none": 1 << 20}
"""Least bytes that make sense, by filesystem. mkfs.xfs refuses less than 300 MiB; ext4 has room for its journal and
our reserve at 64 MiB."""
MAX_SIZE = 1 << 50
MAX_REPLICAS = 9
_UNITS = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}
_SIZE = re.compile(r"(\d{1,18})(Ki|Mi|Gi|Ti)?")
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_OWNER = re.compile(r"(\d{1,10}):(\d{1,10})")
_REPLICA = re.compile(r"[a-z]([a-z0-9-]{0,8}[a-z0-9])?")
_PROCESSES = ("engine", "ganesha")
_MODE = re.compile(r"[0-7]{3,4}")
MAX_ID = (1 << 32) - 2


def parse_size(text: str, what: str = "size") -> int:
    """Bytes of `10Gi` and the like. Raises InvalidValueError."""
    match = _SIZE.fullmatch(text)
    if not match:
        raise InvalidValueError(what, text, "write a whole number and Ki, Mi, Gi or Ti, such as 10Gi")
    size = int(match[1]) * _UNITS.get(match[2], 1)
    if size == 0 or size % BLOCK:
        raise InvalidValueError(what, text, f"a size is a multiple of {BLOCK} bytes and not zero, such as 10Gi")
    if size > MAX_SIZE:
        raise InvalidValueError(what, text, f"at most {format_size(MAX_SIZE)}")
    return size


def check_size(size: int, filesystem: str, what: str = "size", *, header: int = 0) -> int:
    """`size` when `filesystem` ("none" for a bare block file) fits in it, behind `header` bytes of an encrypted one.

    Raises InvalidValueError.
    """
    least = MIN_SIZE[filesystem] + header
    if size < least:
        kind = "an encrypted volume" if header else "a volume"
        need = kind if filesystem == "none" else f"{kind} with {filesystem}"
        raise InvalidValueError(what, format_size(size), f"{need} has at least {format_size(least)}")
    return size


def format_size(size: int) -> str:
    """The shortest exact way to write `size`, one that `parse_size` reads back."""
    for unit, factor in reversed(_UNITS.items()):
        if size >= factor and size % factor == 0:
            return f"{size // factor}{unit}"
    return str(size)


def format_rate(amount: float) -> str:
    """Bytes a second."""
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}/s" if unit == "B" else f"{amount:.1f} {unit}/s"
        amount /= 1024
    return f"{amount:.1f} GiB/s"


def format_left(seconds: float | None) -> str:
    """Behind a rate: how long something still takes; nothing when that is not known."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f", {hours}:{minutes:02}:{rest:02} left" if hours else f", {minutes}:{rest:02} left"


def check_replicas(count: int | None) -> None:
    """Raises InvalidValueError."""
    if count is not None and not 1 <= count <= MAX_REPLICAS:
        raise InvalidValueError("--replicas", str(count), f"from 1 to {MAX_REPLICAS}")


def parse_name(text: str) -> str:
    """A volume's name: a DNS label, as it names a Service, an export and directories. Raises InvalidValueError."""
    if not _NAME.fullmatch(text):
        raise InvalidValueError(
            "volume name", text, "use 1 to 63 of a-z, 0-9 and '-', beginning and ending with a letter or digit"
        )
    return text


def parse_replica(text: str) -> str:
    """Name of a replica, short enough for its socket. Raises InvalidValueError."""
    if not _REPLICA.fullmatch(text) or text in _PROCESSES:
        raise InvalidValueError("replica", text, "up to 10 of a-z, 0-9 and '-', a letter first, and no process's name")
    return text


def parse_owner(text: str) -> tuple[int, int]:
    """(uid, gid) of `UID:GID`. Raises InvalidValueError."""
    match = _OWNER.fullmatch(text)
    if not match or max(int(match[1]), int(match[2])) > MAX_ID:
        raise InvalidValueError("--root-owner", text, f"write UID:GID in numbers up to {MAX_ID}, such as 1000:1000")
    return int(match[1]), int(match[2])


def parse_mode(text: str) -> int:
    """Raises InvalidValueError."""
    if not _MODE.fullmatch(text):
        raise InvalidValueError("--root-mode", text, "write three or four octal digits, such as 0777")
    return int(text, 8)


def parse_network(text: str, option: str = "--allow") -> str:
    """An address or a network in CIDR notation, in its normal form. Raises InvalidValueError."""
    try:
        network = ipaddress.ip_network(text, strict=True)
    except ValueError as error:
        try:
            meant = ipaddress.ip_network(text, strict=False)
        except ValueError:
            raise InvalidValueError(option, text, "write a network such as 10.0.0.0/8 or fd00::/8") from error
        raise InvalidValueError(option, text, f"it has host bits set; did you mean {meant}?") from error
    return str(network)


def parse_interface(text: str) -> str:
    """An address with its prefix length. Raises InvalidValueError."""
    try:
        if "/" in text:
            return str(ipaddress.ip_interface(text))
    except ValueError:
        pass
    raise InvalidValueError("--address", text, "write an address and its prefix length, such as 10.0.0.5/24")


def parse_address(text: str) -> str:
    """Raises InvalidValueError."""
    try:
        return str(ipaddress.ip_address(text.strip("[]")))
    except ValueError:
        raise InvalidValueError(
            "--bind", text, "write an IP address of this machine, such as 127.0.0.1 or 0.0.0.0 for all"
        ) from None


def parse_records(text: str, what: str = "--records") -> str:
    """`tcp:host:port` of HOST:PORT. Raises InvalidValueError."""
    try:
        return str(Address.parse(f"tcp:{text}"))
    except AddressError as error:
        raise InvalidValueError(what, text, f"write HOST:PORT, such as 192.0.2.1:7420 ({error.reason})") from None


def parse_node(text: str, what: str = "--node") -> str:
    """A DNS label. Raises InvalidValueError."""
    if not _NAME.fullmatch(text):
        raise InvalidValueError(what, text, "use 1 to 63 of a-z, 0-9 and '-'")
    return text


def parse_placed(text: str) -> tuple[str, str]:
    """(node, address) of NODE=HOST:PORT. Raises InvalidValueError."""
    node, _, address = text.partition("=")
    return parse_node(node, "--replica"), parse_records(address, "--replica")


def parse_port(port: int, what: str = "--port", least: int = 1) -> int:
    """Raises InvalidValueError."""
    if not least <= port <= 65535:
        raise InvalidValueError(what, str(port), f"a port is a number from {least} to 65535")
    return port


SHORTEST_LEASE = 10
"""Seconds. A Linux client that says nothing else renews its lease when a third of it is over, but looks only every
5 s where two thirds of it are less: of 6 s it lets up to 7 pass, and its locks and open files are gone
(nfs4_schedule_state_renewal in fs/nfs/nfs4renewd.c)."""


def check_grace(lease: int, grace: int) -> None:
    """Lease and grace fit each other (RFC 8881 section 8.4.2.1: grace at least the lease). Raises InvalidValueError."""
    if not SHORTEST_LEASE <= lease <= 120:
        what = f"from {SHORTEST_LEASE} to 120 seconds: Linux clients cannot be relied on to renew a shorter one in time"
        raise InvalidValueError("--lease-lifetime", str(lease), what)
    if not grace <= 180:
        raise InvalidValueError("--grace-period", str(grace), "at most 180 seconds")
    if grace < lease:
        raise InvalidValueError(
            "--grace-period",
            str(grace),
            f"a client may be silent for the whole lease, so it is at least --lease-lifetime ({lease})",
        )


def endpoint(address: str, port: int, volume: str) -> str:
    host = f"[{address}]" if ":" in address else address
    return f"nfs://{host}:{port}/{volume}"


def mount_command(address: str, port: int, volume: str) -> str:
    host = f"[{address}]" if ":" in address else address
    option = f",port={port}" if port != 2049 else ""
    return f"mount -t nfs4 -o vers=4.2{option} {host}:/{volume} /mnt"
