"""As much of XDR (RFC 4506) and ONC RPC over TCP (RFC 5531) as it takes to ask an NFS server something."""

import os
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from ganesha.errors import RpcError
from ganesha.reach import HERE, Reach

NFS_PROGRAM = 100003
NFS_V4 = 4
PROC_NULL = 0
PROC_COMPOUND = 1

_CALL, _REPLY = 0, 1
_RPC_VERSION = 2
_AUTH_NONE, _AUTH_SYS = 0, 1
_LAST_FRAGMENT = 0x80000000
_MAX_RECORD = 4 << 20
_ACCEPT = {1: "program unavailable", 2: "program version mismatch", 3: "procedure unavailable", 4: "garbage arguments"}


def pack_uint(value: int) -> bytes:
    return struct.pack(">I", value)


def pack_uhyper(value: int) -> bytes:
    return struct.pack(">Q", value)


def pack_opaque(value: bytes) -> bytes:
    return struct.pack(">I", len(value)) + value + bytes(-len(value) % 4)


class Unpacker:
    """Reads XDR values one after the other. Raises RpcError where the data ends early."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        self._at = 0

    def fixed(self, length: int) -> bytes:
        end = self._at + length
        if end > len(self._data):
            raise RpcError("the server's answer is truncated")
        value = bytes(self._data[self._at : end])
        self._at = end + (-length % 4)
        return value

    def uint(self) -> int:
        return int.from_bytes(self.fixed(4), "big")

    def uhyper(self) -> int:
        return int.from_bytes(self.fixed(8), "big")

    def opaque(self) -> bytes:
        return self.fixed(self.uint())

    @property
    def rest(self) -> bytes:
        return bytes(self._data[self._at :])


def _auth_sys(uid: int, gid: int) -> bytes:
    body = pack_uint(0) + pack_opaque(b"share-manager") + pack_uint(uid) + pack_uint(gid) + pack_uint(0)
    return pack_uint(_AUTH_SYS) + pack_opaque(body)


class RpcConnection:
    """One TCP connection; one call at a time."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._xid = int.from_bytes(os.urandom(4), "big")
        self._buffer = bytearray()

    async def call(self, procedure: int, arguments: bytes = b"", *, uid: int | None = None, gid: int = 0) -> Unpacker:
        """Sends an NFSv4 call, with AUTH_SYS credentials when `uid` is given, and returns the results to unpack."""
        self._xid = (self._xid + 1) & 0xFFFFFFFF
        none = pack_uint(_AUTH_NONE) + pack_opaque(b"")
        credentials = none if uid is None else _auth_sys(uid, gid)
        header = struct.pack(">6I", self._xid, _CALL, _RPC_VERSION, NFS_PROGRAM, NFS_V4, procedure)
        message = header + credentials + none + arguments
        try:
            await self._stream.send_all(pack_uint(_LAST_FRAGMENT | len(message)) + message)
            while True:
                reply = Unpacker(await self._record())
                if reply.uint() == self._xid:
                    return _accepted(reply)
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as error:
            raise RpcError(f"the connection to the NFS server broke: {error.__cause__ or error}") from error

    async def _record(self) -> bytes:
        record = bytearray()
        last = False
        while not last:
            word = int.from_bytes(await self._exactly(4), "big")
            last, length = bool(word & _LAST_FRAGMENT), word & ~_LAST_FRAGMENT
            if len(record) + length > _MAX_RECORD:
                raise RpcError("the peer does not speak RPC: record too large")
            record += await self._exactly(length)
        return bytes(record)

    async def _exactly(self, length: int) -> bytes:
        while len(self._buffer) < length:
            data = await self._stream.receive_some()
            if not data:
                raise RpcError("the NFS server closed the connection")
            self._buffer += data
        data = bytes(self._buffer[:length])
        del self._buffer[:length]
        return data


def _accepted(reply: Unpacker) -> Unpacker:
    if reply.uint() != _REPLY:
        raise RpcError("the peer does not speak RPC: not a reply")
    if reply.uint() != 0:
        raise RpcError("the NFS server denied the call")
    reply.uint()
    reply.opaque()
    status = reply.uint()
    if status != 0:
        raise RpcError(f"the NFS server rejected the call: {_ACCEPT.get(status, f'status {status}')}")
    return reply


@asynccontextmanager
async def connect(
    host: str, port: int, *, source: str | None = None, reach: Reach = HERE
) -> AsyncIterator[RpcConnection]:
    """A connection to `host`, an IP address, from the local address `source` if given. Raises RpcError.

    Has no timeout of its own: the caller puts one around the whole exchange.
    """
    family = trio.socket.AF_INET6 if ":" in host else trio.socket.AF_INET
    try:
        made = reach.socket(family)
    except OSError as error:
        raise RpcError(f"no socket to reach the NFS server with: {error.strerror or error}") from error
    with trio.socket.from_stdlib_socket(made) as sock:
        try:
            if source is not None:
                await sock.bind((source, 0))
            await sock.connect((host, port))
        except OSError as error:
            raise RpcError(f"cannot connect to {host} port {port}: {error.strerror or error}") from error
        yield RpcConnection(trio.SocketStream(sock))
