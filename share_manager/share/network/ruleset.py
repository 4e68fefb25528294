"""The nftables rules of one share's port, as text for libnftables(3). Pure.

    input   client -> no pulse, not allowed, gate shut: dropped -> remembered as seen -> translated -> ganesha
    output  ganesha -> no pulse, gate shut: dropped -> first FIN or RST of the present life: held back -> client

The *pulse* is a table of its own that only marks packets, and belongs to the share manager's socket (`flags owner`,
Linux 5.12): it goes with the process, however that ends, and from that moment on no packet passes in either direction,
not even the last word of a server that dies with it.

The gate is a set element with a timeout, so the kernel shuts it, whatever became of the process that held it open. It
is renewed only together with a *permit*, another element, which lives for `PERMIT` seconds and was made before the
remaining time was calculated: a process that was stopped in between finds its permit gone, and the whole transaction
fails. So the gate is never open for more than `PERMIT` seconds longer than it should be.

A connection carries, as its conntrack mark, the number of the server's *life* in which it began. When a server is
killed its sockets say so with a FIN before anybody can act, but for those that the share manager keeps open
(connections.py). On connections of the present life that is held back for `HOLD` seconds, in which the port is
silenced, however busy the machine, and so is the refusal of a new connection. FINs are sent again by the kernel, so
that of a server that only closes an idle connection arrives a little later. A RST of an established connection is not
sent again, and gets out. When the next server is there, clients of the last one learn that they have to connect again
from the kernel's RST, or from its FIN, which is sent again.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

PERMIT = 0.2
HOLD = 1.0
SEEN = 60
"""Seconds for which a client's end of a connection is remembered after its last packet."""

CONSTANT_V4 = "127.0.0.2"
CONSTANT_V6 = "::1"
"""The one address that ganesha sees of every client, but of one in the namespace itself (a forwarded port), which is
127.0.0.1 or ::1 there for good. Records of clients are named by it: never change it."""

OWN_MARK = 0x736D
"""Socket mark of the share manager's own calls, which no gate holds up."""

_PULSE = 0x1000000
"""The bit of a packet's mark that says so; nothing after the gate sees it."""

_EVERYONE = ("0.0.0.0/0", "::/0")


def table(port: int) -> str:
    return f"share-manager-{port}"


def _quoted(port: int) -> str:
    return f"inet {table(port)}"


def pulse(port: int) -> str:
    """The table that is there as long as the socket by which it is made."""
    chains = "".join(
        f"    chain {name} {{\n        type filter hook {name} priority -20; policy accept;\n"
        f"        tcp {side} {port} meta mark != {OWN_MARK} meta mark set meta mark | {_PULSE}\n    }}\n"
        for name, side in (("input", "dport"), ("output", "sport"))
    )
    return f"table inet {table(port)}-pulse {{\n    flags owner\n{chains}}}\n"


def setup(port: int, life: int, allowed: Sequence[str]) -> str:
    """The whole table, in place of one that is there, with the gate shut. One transaction."""
    four, six = split(allowed)
    name = _quoted(port)
    return f"""\
add table {name}
delete table {name}
table {name} {{
    set gate {{
        type inet_service
        flags timeout
    }}
    set entry {{
        type inet_service
        flags timeout
    }}
    set permit {{
        type inet_service
        flags timeout
    }}
    map life {{
        type inet_service : mark
        elements = {{ {port} : {life} }}
    }}
    set alive {{
        type mark
        elements = {{ {life} }}
    }}
    set closing {{
        typeof ct id
        flags dynamic,timeout
        timeout {_milliseconds(HOLD)}
        size 65535
    }}
    set allowed4 {{
        type ipv4_addr
        flags interval
        auto-merge
        {_elements(four)}
    }}
    set allowed6 {{
        type ipv6_addr
        flags interval
        auto-merge
        {_elements(six)}
    }}
    set seen4 {{
        type ipv4_addr . inet_service
        flags dynamic,timeout
        timeout {SEEN}s
        size 65535
    }}
    set seen6 {{
        type ipv6_addr . inet_service
        flags dynamic,timeout
        timeout {SEEN}s
        size 65535
    }}
    chain come {{
        type filter hook input priority -10; policy accept;
        tcp dport {port} jump client
    }}
    chain client {{
        meta mark {OWN_MARK} ct mark set {OWN_MARK} accept
        ct mark {OWN_MARK} accept
        meta mark & {_PULSE} == 0 drop
        meta mark set meta mark & {0xFFFFFFFF ^ _PULSE}
        meta nfproto ipv4 ip saddr != @allowed4 drop
        meta nfproto ipv6 ip6 saddr != @allowed6 drop
        tcp dport != @gate drop
        tcp dport != @entry drop
        tcp flags & (fin | rst) != 0 ct mark set 0
        tcp flags & (syn | ack) == syn ct mark set tcp dport map @life
        meta nfproto ipv4 update @seen4 {{ ip saddr . tcp sport }}
        meta nfproto ipv6 update @seen6 {{ ip6 saddr . tcp sport }}
    }}
    chain go {{
        type filter hook output priority -10; policy accept;
        tcp sport {port} jump server
    }}
    chain server {{
        ct mark {OWN_MARK} accept
        meta mark & {_PULSE} == 0 drop
        meta mark set meta mark & {0xFFFFFFFF ^ _PULSE}
        tcp sport != @gate drop
        tcp flags & (fin | rst) == 0 accept
        tcp flags & rst != 0 ct status assured accept
        ct id @closing drop
        ct mark @alive ct mark set 0 update @closing {{ ct id }} drop
    }}
    chain translate {{
        type nat hook input priority 100; policy accept;
        tcp dport {port} jump one
    }}
    chain one {{
        ct mark {OWN_MARK} accept
        meta nfproto ipv4 snat ip to {CONSTANT_V4}
        meta nfproto ipv6 snat ip6 to {CONSTANT_V6}
    }}
}}
"""


def remove(port: int) -> str:
    name = _quoted(port)
    return f"add table {name}\ndelete table {name}\n"


def permit(port: int) -> str:
    return _renew(port, "permit", PERMIT)


def open_gate(port: int, seconds: float) -> str:
    """Both directions, for so long; fails as a whole when the permit has ended."""
    name = _quoted(port)
    return f"delete element {name} permit {{ {port} }}\n{_renew(port, 'gate', seconds)}{_renew(port, 'entry', seconds)}"


def shut_entry(port: int) -> str:
    """Nothing more comes in; what the server still has to say goes out."""
    return _clear(port, "entry")


def shut_gate(port: int, life: int) -> str:
    """Silence in both directions at once; what began before belongs to an earlier life."""
    name = _quoted(port)
    return (
        f"{_clear(port, 'gate')}{_clear(port, 'entry')}"
        f"flush map {name} life\nadd element {name} life {{ {port} : {life} }}\n"
        f"flush set {name} closing\nflush set {name} alive\nadd element {name} alive {{ {life} }}\n"
    )


def allow(port: int, allowed: Sequence[str]) -> str:
    name = _quoted(port)
    text = ""
    for key, networks in zip(("allowed4", "allowed6"), split(allowed), strict=True):
        text += f"flush set {name} {key}\n"
        if networks:
            text += f"add element {name} {key} {{ {', '.join(networks)} }}\n"
    return text


def list_seen(port: int) -> tuple[str, str]:
    """Two commands: libnftables finds only the first set of several that are listed at once."""
    name = _quoted(port)
    return f"list set {name} seen4\n", f"list set {name} seen6\n"


def split(allowed: Sequence[str]) -> tuple[list[str], list[str]]:
    """IPv4 and IPv6 networks without overlaps; everyone when none is named."""
    networks = [ipaddress.ip_network(text, strict=False) for text in allowed or _EVERYONE]
    four = [network for network in networks if isinstance(network, ipaddress.IPv4Network)]
    six = [network for network in networks if isinstance(network, ipaddress.IPv6Network)]
    return list(map(str, ipaddress.collapse_addresses(four))), list(map(str, ipaddress.collapse_addresses(six)))


def _elements(networks: Sequence[str]) -> str:
    return f"elements = {{ {', '.join(networks)} }}" if networks else ""


def _renew(port: int, key: str, seconds: float) -> str:
    # adding again what is there would leave its timeout as it was (measured), so it is deleted in between
    ends = f" timeout {_milliseconds(seconds)}" if seconds < float("inf") else ""
    return f"{_clear(port, key)}add element {_quoted(port)} {key} {{ {port}{ends} }}\n"


def _clear(port: int, key: str) -> str:
    # what is not there cannot be deleted
    element = f"element {_quoted(port)} {key} {{ {port} }}"
    return f"add {element}\ndelete {element}\n"


def _milliseconds(seconds: float) -> str:
    return f"{max(1, int(seconds * 1000))}ms"
