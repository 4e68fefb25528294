"""All addresses under which this host's mounts may be seen by a share.

A mount to a ClusterIP may leave by any interface, and a masqueraded one shows that interface's address: a bridge's as
often as the node's InternalIP.
"""

from __future__ import annotations

import ipaddress

import msgspec

from share_manager.share.commands import run

MOST = 256
"""What a StorageNode has room for."""
_NOT_OURS = ("kube-ipvs0", "nodelocaldns", "lo")
"""Interfaces that carry addresses of services, not of the host."""


class _Address(msgspec.Struct):
    local: str = ""


class _Interface(msgspec.Struct):
    ifname: str = ""
    addr_info: list[_Address] = []


def parse(text: str | bytes) -> tuple[str, ...]:
    """Of what `ip -json address show` says. Raises msgspec.DecodeError."""
    found = set()
    for interface in msgspec.json.decode(text, type=list[_Interface]):
        if interface.ifname in _NOT_OURS:
            continue
        for one in interface.addr_info:
            if not one.local:
                continue
            address = ipaddress.ip_address(one.local)
            if not (address.is_loopback or address.is_link_local or address.is_multicast):
                found.add(address)
    ordered = sorted(found, key=lambda address: (address.version, int(address)))
    return tuple(str(address) for address in ordered[:MOST])


async def of_this_host() -> tuple[str, ...]:
    """Raises CommandError, MissingProgramError, TimeoutProblem."""
    _, text = await run("ip", "-json", "address", "show", timeout=10.0)
    return parse(text)
