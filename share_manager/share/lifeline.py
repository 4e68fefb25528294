"""How an engine learns that everybody is dead who could answer clients by its right to serve.

A pipe. Its writing end, to which nobody writes, is in this process and in each NFS server that it starts; the reading
end is in the engines. That one ends when the last of the others has ended, whoever that is: there is no moment in which
it says so too early. The engine gives the right up then, and nobody has to wait for it to lapse.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import msgspec

from share_manager.errors import RuntimeProblem


class Lifeline(msgspec.Struct, frozen=True, kw_only=True):
    """Descriptors of the engine's end and of the others'. `instance` is of the lease that the engine is to release."""

    engine: int
    server: int
    instance: str

    def require(self, pid: int) -> None:
        """Raises RuntimeProblem when that process does not have the server's end, and so could outlive it."""
        try:
            holds = os.readlink(f"/proc/{pid}/fd/{self.server}") == os.readlink(f"/proc/self/fd/{self.server}")
        except OSError:
            holds = False
        if not holds:
            raise RuntimeProblem(
                f"process {pid} let go of its lifeline: is this an nfs-ganesha that closes what it has?"
            )


@contextlib.contextmanager
def lifeline(instance: str) -> Iterator[Lifeline]:
    engine, server = os.pipe2(os.O_CLOEXEC)
    try:
        yield Lifeline(engine=engine, server=server, instance=instance)
    finally:
        os.close(engine)
        os.close(server)
