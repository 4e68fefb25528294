"""Mount options of NFS: which may be asked for, and which a node gets. nfs(5) and mount(8) have their meaning.

Those that lead to another server, need another daemon or leave the foreground are refused, as are those that would be
ignored: what is asked for is what a mount has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from share_manager.csi.errors import InvalidArgumentError
from share_manager.node.mountoptions import COMMON, asks_for_delegations

DEFAULTS = ("vers=4.2", *COMMON, "noresvport", "sec=sys")
"""noresvport: a reconnection comes from another port, so nothing on the way takes it for the one before."""
MAX_LENGTH = 1024
"""Characters in all."""

_SECONDS = r"\d{1,5}"
_BYTES = r"\d{4,8}"
_VALUES = {
    "vers": r"4(\.[012])?",
    "sec": "sys",
    "timeo": r"[1-9]\d{0,4}",
    "retrans": r"\d{1,3}",
    "rsize": _BYTES,
    "wsize": _BYTES,
    "acregmin": _SECONDS,
    "acregmax": _SECONDS,
    "acdirmin": _SECONDS,
    "acdirmax": _SECONDS,
    "actimeo": _SECONDS,
    "nconnect": r"[1-9]|1[0-6]",
    "max_connect": r"[1-9]|1[0-6]",
    "lookupcache": "all|none|pos|positive",
    "write": "lazy|eager|wait",
    "proto": "tcp|tcp6",
}
_FLAGS = (
    ("hard", "soft", "softerr"),
    ("softreval", "nosoftreval"),
    ("ac", "noac"),
    ("cto", "nocto"),
    ("sharecache", "nosharecache"),
    ("resvport", "noresvport"),
    ("rdirplus", "nordirplus"),
    ("migration", "nomigration"),
    ("rw", "ro"),
    ("atime", "noatime", "relatime", "norelatime", "strictatime"),
    ("diratime", "nodiratime"),
    ("suid", "nosuid"),
    ("dev", "nodev"),
    ("exec", "noexec"),
    ("async", "sync"),
)
_ALIASES = {"nfsvers": "vers"}
_GROUP = {flag: group[0] for group in _FLAGS for flag in group}


def parse(text: str, what: str) -> dict[str, str]:
    """Options by what they decide, from `vers=4.2,hard`; `what` is where they were given.

    Raises InvalidArgumentError."""
    if len(text) > MAX_LENGTH:
        raise InvalidArgumentError(f"{what} is longer than {MAX_LENGTH} characters")
    return _collect((word.strip() for word in text.split(",") if word.strip()), what)


def parse_flags(flags: Iterable[str], what: str = "mount_flags") -> dict[str, str]:
    """Of a StorageClass's `mountOptions`: each one option, or several with commas. Raises InvalidArgumentError."""
    return parse(",".join(flags), what)


def _collect(words: Iterable[str], what: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        name = _ALIASES.get(name, name)
        if name in _VALUES and equals:
            if not re.fullmatch(_VALUES[name], value):
                raise InvalidArgumentError(f"{what}: {name} cannot be {value!r}")
            key, option = name, f"{name}={value}"
        elif name in _GROUP and not equals:
            key, option = _GROUP[name], name
        else:
            # not the value: somebody may have taken this for a place for passwords
            raise InvalidArgumentError(f"{what}: {name!r} is no mount option that this driver has, as it is written")
        if found.get(key, option) != option:
            raise InvalidArgumentError(f"{what}: {found[key]!r} and {option!r} contradict each other")
        found[key] = option
    return found


def asked(class_options: str, flags: Iterable[str]) -> dict[str, str]:
    """What was asked for: `flags` go before the options of the StorageClass. Raises InvalidArgumentError."""
    return {**parse(class_options, "nfsOptions"), **parse_flags(flags)}


def resolve(asked: Mapping[str, str], *, kernel: str, read_only: bool) -> str:
    """What a node with that kernel (as `uname -r` says) mounts with: what was asked for goes before the defaults."""
    chosen = {**_collect(DEFAULTS, "defaults"), **asked}
    if "vers" not in asked and asks_for_delegations(kernel):
        chosen["vers"] = "vers=4.0"
    if read_only:
        chosen["rw"] = "ro"
    return ",".join(chosen[key] for key in sorted(chosen, key=_order))


def _order(key: str) -> tuple[int, str]:
    return (0 if key == "vers" else 1, key)


_SHOWN = ("vers", "timeo", "retrans", "nconnect", "lookupcache")
_SIZES = ("rsize", "wsize")


def differs(wanted: str, shown: Mapping[str, str]) -> str:
    """The option in which a mount is not as wanted, or nothing; `shown` is what the kernel says of it, by name."""
    return next((option for option in parse(wanted, "options").values() if _differs(option, shown)), "")


def _differs(option: str, shown: Mapping[str, str]) -> bool:
    name, _, value = option.partition("=")
    if name in _SIZES:
        # the server may have wanted less
        return name in shown and int(shown[name]) > int(value)
    if name in _SHOWN:
        return name in shown and not _same(name, value, shown[name])
    if _GROUP.get(name) == "hard":
        return option not in shown
    if _GROUP.get(name) == "rw":
        return ("ro" in shown) != (option == "ro")
    # of the others the kernel shows nothing, or in other words
    return False


def _same(name: str, wanted: str, shown: str) -> bool:
    if name == "lookupcache":
        return shown.startswith(wanted[:3])
    # "4" lets client and server agree on a minor version
    return shown == wanted or (name == "vers" and wanted == "4" and shown.startswith("4"))
