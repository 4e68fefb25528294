"""How this process reaches a server that lives in another network namespace, or behind rules that drop strangers."""

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from socket import SOCK_STREAM, SOL_SOCKET
from socket import socket as Socket  # noqa: N812 - beside a method of that name

import msgspec

_CLONE_NEWNET = 0x40000000
_SO_MARK = 36  # asm-generic/socket.h


class Reach(msgspec.Struct, frozen=True):
    """`namespace`: a descriptor of the server's network namespace, None for this process's own. `mark`: the mark
    (SO_MARK, socket(7)) of the sockets with which this process asks, 0 for none."""

    namespace: int | None = None
    mark: int = 0

    def argv(self) -> tuple[str, ...]:
        """What a server's command line begins with; the descriptor must be passed on under its number."""
        return () if self.namespace is None else ("nsenter", f"--net=/proc/self/fd/{self.namespace}", "--")

    def fds(self) -> tuple[int, ...]:
        return () if self.namespace is None else (self.namespace,)

    def socket(self, family: int) -> Socket:
        """A TCP socket from which the server can be reached. Raises OSError."""
        sock = Socket(family, SOCK_STREAM) if self.namespace is None else self._elsewhere(family)
        try:
            if self.mark:
                sock.setsockopt(SOL_SOCKET, _SO_MARK, self.mark)
        except BaseException:
            sock.close()
            raise
        return sock

    def _elsewhere(self, family: int) -> Socket:
        def work() -> Socket:
            # moves this thread only; the socket stays where it was made
            if ctypes.CDLL(None, use_errno=True).setns(self.namespace, _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            return Socket(family, SOCK_STREAM)

        with ThreadPoolExecutor(1, "netns") as worker:
            return worker.submit(work).result()


HERE = Reach()
