"""How a client's kernel should mount a share, decided on the client's node: the server offers every version."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from share_manager.errors import InvalidValueError

DELEGATING = (6, 19)
"""The first Linux that asks for directory delegations, which servers of before mid-2026 answer so that `ls` fails."""
PARAMETER = Path("/sys/module/nfsv4/parameters/directory_delegations")
COMMON = ("hard", "timeo=600", "retrans=2")
"""A hard mount never gives an application an error; it waits for as long as a failover takes."""
_RELEASE = re.compile(r"(\d{1,4})\.(\d{1,4})")


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """`options` for mount -o, and why that `version`."""

    version: str
    options: str
    reason: str


def choose(release: str, delegations: str | None) -> Choice:
    """For a kernel of that release (uname -r), whose nfsv4 module has that value of its parameter
    `directory_delegations`; None when there is no such parameter, or the module is not loaded yet.

    Raises InvalidValueError.
    """
    asks = asks_for_delegations(release)
    if asks is None:
        raise InvalidValueError("--kernel", release, "write a release as `uname -r` does, such as 6.1.0-13-amd64")
    if delegations is not None and delegations.strip().upper() in ("N", "0"):
        return _choice("4.2", "directory delegations are switched off")
    if delegations is not None or asks:
        return _choice("4.0", "this kernel asks for directory delegations, which nfs-ganesha answers so that ls fails")
    return _choice("4.2", "the newest that kernel and server have")


def asks_for_delegations(release: str) -> bool | None:
    """Whether a kernel of that release does by itself; None when that is no release."""
    found = _RELEASE.match(release)
    return None if found is None else (int(found[1]), int(found[2])) >= DELEGATING


def _choice(version: str, reason: str) -> Choice:
    return Choice(version=version, options=",".join((f"vers={version}", *COMMON)), reason=reason)


def parameter() -> str | None:
    """Of the kernel that runs."""
    try:
        return PARAMETER.read_text()
    except OSError:
        return None
