"""Ends TCP connections of this node that lead to where a share is no more, by ss(8) and conntrack(8).

Without that a client waits for its own retransmissions, and a server that comes back answers for connections of its
life before. The kernel needs CONFIG_INET_DIAG_DESTROY; where it lacks that nothing is ended, and clients wait longer.
"""

from __future__ import annotations

import shutil

from ganesha import Reach
from share_manager.errors import CommandError, MissingProgramError, TimeoutProblem
from share_manager.share.commands import run, search_path

_TIMEOUT = 5.0
_HERE = Reach()


async def end_served(address: str, port: int, reach: Reach = _HERE) -> bool:
    """All of clients to a server that was here, or where `reach` says. Whether the kernel could."""
    argv = (*reach.argv(), *_kill("all", "exclude", "listening"), "src", address, "sport", "=", f":{port}")
    return await _quietly(*argv, pass_fds=reach.fds())


async def end_one(address: str, port: int, local_port: int) -> bool:
    """That of this node's own to a server elsewhere, by its local port."""
    where = ("dst", address, "dport", "=", f":{port}", "and", "sport", "=", f":{local_port}")
    return await _quietly(*_kill("all"), *where)


async def forget_routes(address: str, port: int) -> None:
    """What this node remembers of where connections to an address are to go."""
    if shutil.which("conntrack", path=search_path()):
        await _quietly("conntrack", "-D", "-p", "tcp", "-d", address, "--dport", str(port))


def _kill(*states: str) -> list[str]:
    return ["ss", "--kill", "--tcp", "state", *states]


async def _quietly(*argv: str, pass_fds: tuple[int, ...] = ()) -> bool:
    try:
        await run(*argv, ok=(0, 1, 255), timeout=_TIMEOUT, pass_fds=pass_fds)
    except (CommandError, MissingProgramError, TimeoutProblem):
        return False
    return True
