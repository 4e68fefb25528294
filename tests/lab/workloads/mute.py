"""An NFS server that answers NULL calls and nothing else: alive to those who ask, and every mount of it hangs."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading

from tests.lab.workloads import channel


def serve(port: int) -> int:
    """Until told to stop; how many calls it left unanswered."""
    unanswered: list[int] = []
    with socket.create_server(("127.0.0.1", port)) as listener:
        channel.emit("listening")
        listener.settimeout(0.05)
        while not channel.stopping():
            with contextlib.suppress(TimeoutError):
                connection, _ = listener.accept()
                connection.settimeout(None)
                threading.Thread(target=_answer, args=(connection, unanswered), daemon=True).start()
    return len(unanswered)


def _answer(connection: socket.socket, unanswered: list[int]) -> None:
    """RFC 5531: a record mark, then xid, CALL, version, program, version, procedure."""
    with connection, contextlib.suppress(OSError), connection.makefile("rb") as stream:
        while mark := stream.read(4):
            call = stream.read(struct.unpack(">I", mark)[0] & 0x7FFFFFFF)
            xid, procedure = struct.unpack_from(">I16xI", call)
            if procedure == 0:
                # REPLY, accepted, no verifier, success
                connection.sendall(struct.pack(">7I", 0x80000018, xid, 1, 0, 0, 0, 0))
            else:
                unanswered.append(procedure)
