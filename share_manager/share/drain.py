"""What clients have asked is answered before the server of a share that moves is stopped.

A request that was carried out and whose answer is lost is sent again, to a server that knows nothing of it: a directory
exists already, a file is gone. So first no request is let in any more, while acknowledgements are; then what is under
way ends; then the node falls silent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import trio

from share_manager.errors import NetworkError
from share_manager.node.connections import established
from share_manager.share.network.nft import Nft, nftables

# what a snapshot, a replica that hangs and a busy machine may cost: the pause is longer then, no name is refused
PATIENCE = 5.0
# for the acknowledgements of clients, of which one may be away
ANSWERED_BY = 1.0
_LOOKS = 4
_EVERY = 0.015
# an IPv6 header and one of TCP with all options; a call of NFS is longer
_LONGEST_ACK = 100


class Door:
    """An nft table of this share's own that lets no request in while it exists."""

    def __init__(self, volume: str, port: int, nft: Nft | None) -> None:
        """`nft`: None where there is none, and then the door stays open."""
        self._table = f"inet share_manager_{volume.replace('-', '_')}"
        self._port = port
        self._nft = nft

    def close(self) -> bool:
        """Whether it is closed: the kernel's part may be missing."""
        rule = f"tcp dport {self._port} meta length > {_LONGEST_ACK} drop"
        return self._run(
            f"add table {self._table}\n"
            f"add chain {self._table} door {{ type filter hook input priority -10; }}\n"
            f"add rule {self._table} door {rule}\n"
        )

    def open(self) -> None:
        """Also one that an earlier run left closed."""
        self._run(f"add table {self._table}\ndelete table {self._table}\n")

    def _run(self, commands: str) -> bool:
        if self._nft is None:
            return False
        try:
            self._nft.run(commands)
        except NetworkError:
            return False
        return True


@contextlib.contextmanager
def door(volume: str, port: int, namespace: int | None) -> Iterator[Door]:
    """In that network namespace, or the present one."""
    with contextlib.ExitStack() as stack:
        nft = None
        with contextlib.suppress(NetworkError):
            nft = stack.enter_context(nftables(namespace))
        yield Door(volume, port, nft)


def is_idle(pid: int) -> bool:
    """Whether no thread of it runs or waits for the disk (proc(5))."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        states = [(task / "stat").read_text().rpartition(")")[2].split()[0] for task in tasks]
    except OSError:
        return False
    return not any(state in "RD" for state in states)


def is_answered(port: int, pid: int | str = "self") -> bool:
    """Whether every client has taken what was sent to it, and nothing that came waits to be read, in the network
    namespace of that process."""
    return all(connection.unsent == connection.unread == 0 for connection in established(port, pid))


async def drain(door: Door, port: int, pid: int) -> bool:
    """Close the door and wait until nothing is under way any more; whether that came to pass."""
    if not door.close():
        return False
    began = trio.current_time()
    quiet, answered = 0, False
    with trio.move_on_after(PATIENCE):
        while quiet < _LOOKS:
            answered = is_answered(port, pid)
            waits = not answered and trio.current_time() - began < ANSWERED_BY
            quiet = quiet + 1 if is_idle(pid) and not waits else 0
            await trio.sleep(_EVERY)
        return answered
    return False
