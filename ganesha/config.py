"""What a share's NFS server is told, as typed values."""

import hashlib
import ipaddress
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec

from ganesha.errors import ConfigError

Squash = Literal["none", "root", "all"]
LogLevel = Literal["FATAL", "MAJ", "CRIT", "WARN", "EVENT", "INFO", "DEBUG", "FULL_DEBUG"]

MAX_LEASE = 120  # s, ganesha-core-config(8)
MAX_GRACE = 180  # s, ganesha-core-config(8)
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_MAX_ID = 65535
_MAX_PREFIX = 99
_MAX_LISTED = 256
_PSEUDO_NAME_MAX = 255


class Export(msgspec.Struct, frozen=True, kw_only=True):
    """One directory that clients can mount.

    `allow` lists addresses or CIDR networks; empty means everyone. A client outside the list gets no access and does
    not see the export. `squash` maps root or everybody to `anonymous_uid`/`anonymous_gid`.
    """

    export_id: int
    path: Path
    pseudo: str
    read_only: bool = False
    squash: Squash = "none"
    allow: tuple[str, ...] = ()
    anonymous_uid: int = 65534
    anonymous_gid: int = 65534
    attr_expiration: int = 10
    """Seconds for which attributes changed behind ganesha's back may stay stale; -1 never looks again."""


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One server for one volume.

    `identity` becomes Server_Owner and Server_Scope: constant for the volume on every node, or Linux clients drop
    their locks at a failover, and different between volumes, or NFSv4.1 clients trunk two shares into one connection.
    `recovery_root` lies on the volume. Times are seconds.
    """

    identity: str
    bind: str = "127.0.0.1"
    port: int = 2049
    lease_lifetime: int = 20
    grace_period: int = 30
    minor_versions: tuple[int, ...] = (0, 1, 2)
    recovery_root: Path
    exports: tuple[Export, ...]
    log_level: LogLevel = "EVENT"
    cache_entries: int = 20000

    @property
    def connect_host(self) -> str:
        """The address at which this host itself reaches the server."""
        address = ipaddress.ip_address(self.bind)
        if not address.is_unspecified:
            return str(address)
        return "127.0.0.1" if address.version == 4 else "::1"


def encoded(text: str) -> bytes:
    """The bytes of a name as the filesystem has them. Raises ConfigError for a lone surrogate."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise ConfigError(f"not a text that can be written: {text!r}") from error


def filesystem_id(identity: str, export_id: int) -> str:
    """The NFSv4 fsid of an export: the same on every node, and after every restart."""
    digest = hashlib.sha256(encoded(identity)).digest()
    return f"{int.from_bytes(digest[:8], 'big') >> 1}.{export_id}"


def client_list(allow: Iterable[str]) -> list[str]:
    """Addresses and CIDR networks as nfs-ganesha 4.3 takes them. Raises ConfigError.

    Its lexer has no prefix length of 0, and none above 99 for IPv6: such a line would lose the whole export.
    """
    forms = []
    for text in allow:
        network = _network(text)
        if network.prefixlen == 0:
            forms += [str(half) for half in network.subnets()]
        elif network.prefixlen == network.max_prefixlen:
            forms.append(str(network.network_address))
        elif network.prefixlen <= _MAX_PREFIX:
            forms.append(str(network))
        elif network.num_addresses <= _MAX_LISTED:
            forms += [str(address) for address in network]
        else:
            raise ConfigError(
                f"nfs-ganesha cannot express a prefix of {network.prefixlen} bits, only up to 99: {text!r}"
            )
    return list(dict.fromkeys(forms))


def _network(text: str) -> Network:
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError as error:
        raise ConfigError(f"not an address or CIDR network: {text!r}: {error}") from error
    if isinstance(network, ipaddress.IPv6Network):
        if network.network_address.scope_id:
            raise ConfigError(f"an allowed network cannot have a scope: {text!r}")
        mapped = network.network_address.ipv4_mapped
        if mapped is not None and network.prefixlen >= 96:
            return ipaddress.IPv4Network((mapped, network.prefixlen - 96))
    return network


def check(config: ServerConfig) -> None:
    """Raises ConfigError, with one line for a person, for the first value that ganesha could not use."""
    if not config.identity:
        raise ConfigError("the server's identity is empty")
    try:
        bind = ipaddress.ip_address(config.bind)
    except ValueError as error:
        raise ConfigError(f"not an IP address to listen on: {config.bind!r}") from error
    if isinstance(bind, ipaddress.IPv6Address) and bind.scope_id:
        raise ConfigError(f"cannot listen on an address with a scope: {config.bind!r}")
    if not 0 < config.port < 65536:
        raise ConfigError(f"not a TCP port: {config.port}")
    if not 1 <= config.lease_lifetime <= MAX_LEASE:
        raise ConfigError(f"lease lifetime must be 1 to {MAX_LEASE} s, not {config.lease_lifetime}")
    if not config.lease_lifetime <= config.grace_period <= MAX_GRACE:
        raise ConfigError(
            f"grace period must be at least the lease ({config.lease_lifetime} s) and at most {MAX_GRACE} s, "
            f"not {config.grace_period}"
        )
    if not config.minor_versions or not set(config.minor_versions) <= {0, 1, 2}:
        raise ConfigError(f"NFSv4 minor versions must be some of 0, 1, 2, not {config.minor_versions}")
    if config.cache_entries < 1:
        raise ConfigError(f"cache entries must be positive, not {config.cache_entries}")
    if not config.recovery_root.is_absolute():
        raise ConfigError(f"the recovery directory must be absolute: {config.recovery_root}")
    for what, values in (
        ("export id", [export.export_id for export in config.exports]),
        ("pseudo path", [export.pseudo for export in config.exports]),
    ):
        if len(set(values)) != len(values):
            raise ConfigError(f"two exports share one {what}: {values}")
    for export in config.exports:
        _check_export(export)


def _check_export(export: Export) -> None:
    if not 1 <= export.export_id <= _MAX_ID:
        raise ConfigError(f"export id must be 1 to {_MAX_ID}, not {export.export_id}")
    if not export.path.is_absolute():
        raise ConfigError(f"the exported path must be absolute: {export.path}")
    names = export.pseudo.split("/")
    if len(names) < 2 or names[0] or any(name in ("", ".", "..") for name in names[1:]):
        raise ConfigError(f"not a path for clients to mount: {export.pseudo!r}")
    if any(len(encoded(name)) > _PSEUDO_NAME_MAX for name in names):
        raise ConfigError(f"a name is longer than {_PSEUDO_NAME_MAX} bytes: {export.pseudo!r}")
    for number in (export.anonymous_uid, export.anonymous_gid):
        if not 0 <= number < 2**32 - 1:
            raise ConfigError(f"not a user or group id: {number}")
    if export.attr_expiration < -1:
        raise ConfigError(f"attribute expiration must be -1 or more, not {export.attr_expiration}")
    client_list(export.allow)
