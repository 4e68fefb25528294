"""Enough of an NFSv4.0 client (RFC 7530, RFC 7531) to hold state on a server and to look at what it answers."""

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from ganesha.health import compound, result
from ganesha.rpc import RpcConnection, Unpacker, connect, pack_opaque, pack_uhyper, pack_uint

CLOSE, COMMIT, GETFH, LOOKUP, OPEN, OPEN_CONFIRM, PUTFH = 4, 5, 10, 15, 18, 20, 22
PUTROOTFH, READ, READDIR, RENEW, SETCLIENTID, SETCLIENTID_CONFIRM, WRITE = 24, 25, 26, 30, 35, 36, 38

NOENT, ACCESS, ROFS, GRACE, NO_GRACE, RECLAIM_BAD = 2, 13, 30, 10013, 10033, 10034
_CONFIRM = 2
_NAMES = {number: name for name, number in list(globals().items()) if name.isupper() and isinstance(number, int)}


@dataclass
class Client:
    rpc: RpcConnection
    client_id: int = 0
    uid: int = 0
    _seqids: dict[bytes, int] = field(default_factory=dict)

    async def run(self, *operations: tuple[int, bytes]) -> list[Unpacker]:
        """Runs a compound; returns the reader once per operation, for the results in order. Raises Nfs4Error."""
        reply = await compound(self.rpc, list(operations), uid=self.uid, gid=self.uid)
        return [reply] * len(operations)

    async def root(self) -> None:
        reply = (await self.run((PUTROOTFH, b"")))[0]
        result(reply, PUTROOTFH, "PUTROOTFH")

    async def lookup(self, path: str) -> bytes:
        names = [name for name in path.split("/") if name]
        operations = [(PUTROOTFH, b""), *((LOOKUP, pack_opaque(name.encode())) for name in names), (GETFH, b"")]
        reply = (await self.run(*operations))[0]
        for number, _ in operations:
            result(reply, number, "LOOKUP" if number == LOOKUP else "GETFH")
        return reply.opaque()

    async def names(self, handle: bytes | None = None) -> set[str]:
        """READDIR of a directory, the pseudo root by default; without attributes."""
        first = (PUTROOTFH, b"") if handle is None else (PUTFH, pack_opaque(handle))
        arguments = pack_uhyper(0) + bytes(8) + pack_uint(8192) + pack_uint(32768) + pack_uint(0)
        reply = (await self.run(first, (READDIR, arguments)))[0]
        result(reply, first[0], "PUTFH")
        result(reply, READDIR, "READDIR").fixed(8)
        found = set()
        while reply.uint():
            reply.uhyper()
            found.add(reply.opaque().decode())
            for _ in range(reply.uint()):
                reply.uint()
            reply.opaque()
        return found

    async def set_client_id(self, name: bytes, verifier: bytes = b"verifier") -> int:
        callback = pack_uint(0) + pack_opaque(b"tcp") + pack_opaque(b"0.0.0.0.0.0") + pack_uint(0)
        reply = (await self.run((SETCLIENTID, verifier + pack_opaque(name) + callback)))[0]
        result(reply, SETCLIENTID, "SETCLIENTID")
        self.client_id, confirm = reply.uhyper(), reply.fixed(8)
        reply = (await self.run((SETCLIENTID_CONFIRM, pack_uhyper(self.client_id) + confirm)))[0]
        result(reply, SETCLIENTID_CONFIRM, "SETCLIENTID_CONFIRM")
        return self.client_id

    async def open(
        self, directory: bytes, name: str, *, owner: bytes = b"owner", create: bool = True, reclaim: bool = False
    ) -> tuple[bytes, bytes]:
        """(stateid, handle). With `reclaim`, `directory` is the file's own handle."""
        seqid = self._seqids.get(owner, 0)
        arguments = pack_uint(seqid) + pack_uint(3) + pack_uint(0) + pack_uhyper(self.client_id) + pack_opaque(owner)
        if create and not reclaim:
            arguments += pack_uint(1) + pack_uint(0) + pack_uint(0) + pack_opaque(b"")
        else:
            arguments += pack_uint(0)
        arguments += pack_uint(1) + pack_uint(0) if reclaim else pack_uint(0) + pack_opaque(name.encode())
        reply = (await self.run((PUTFH, pack_opaque(directory)), (OPEN, arguments), (GETFH, b"")))[0]
        result(reply, PUTFH, "PUTFH")
        result(reply, OPEN, "OPEN")
        self._seqids[owner] = seqid + 1
        stateid = reply.fixed(16)
        reply.fixed(20)
        flags = reply.uint()
        for _ in range(reply.uint()):
            reply.uint()
        assert reply.uint() == 0, "a delegation"
        handle = result(reply, GETFH, "GETFH").opaque()
        if flags & _CONFIRM:
            arguments = stateid + pack_uint(self._seqids[owner])
            reply = (await self.run((PUTFH, pack_opaque(handle)), (OPEN_CONFIRM, arguments)))[0]
            result(reply, PUTFH, "PUTFH")
            stateid = result(reply, OPEN_CONFIRM, "OPEN_CONFIRM").fixed(16)
            self._seqids[owner] += 1
        return stateid, handle

    async def close(self, handle: bytes, stateid: bytes, *, owner: bytes = b"owner") -> None:
        arguments = pack_uint(self._seqids[owner]) + stateid
        reply = (await self.run((PUTFH, pack_opaque(handle)), (CLOSE, arguments)))[0]
        result(reply, PUTFH, "PUTFH")
        result(reply, CLOSE, "CLOSE")
        self._seqids[owner] += 1

    async def write(self, handle: bytes, stateid: bytes, data: bytes, *, offset: int = 0) -> bytes:
        """An unstable write; returns the write verifier."""
        arguments = stateid + pack_uhyper(offset) + pack_uint(0) + pack_opaque(data)
        reply = (await self.run((PUTFH, pack_opaque(handle)), (WRITE, arguments)))[0]
        result(reply, PUTFH, "PUTFH")
        result(reply, WRITE, "WRITE")
        assert reply.uint() == len(data)
        reply.uint()
        return reply.fixed(8)

    async def commit(self, handle: bytes) -> bytes:
        reply = (await self.run((PUTFH, pack_opaque(handle)), (COMMIT, struct.pack(">QI", 0, 0))))[0]
        result(reply, PUTFH, "PUTFH")
        return result(reply, COMMIT, "COMMIT").fixed(8)

    async def renew(self) -> None:
        result((await self.run((RENEW, pack_uhyper(self.client_id))))[0], RENEW, "RENEW")


@asynccontextmanager
async def nfs_client(port: int, *, source: str | None = None, host: str = "127.0.0.1") -> AsyncIterator[Client]:
    with trio.fail_after(20):
        async with connect(host, port, source=source) as rpc:
            yield Client(rpc)
