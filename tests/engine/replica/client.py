"""A blocking-style client of a replica server, for tests: one request at a time, or raw frames in bulk."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from engine.errors import ProtocolError
from engine.wire import messages
from engine.wire.frame import HEADER_SIZE, MAX_PAYLOAD, REPLY, Frame, FrameReader, FrameType, encode_frame
from engine.wire.handshake import check_proof, new_nonce, proof

KEY = b"k" * 32
UUID = "11111111-2222-3333-4444-555555555555"


class Closed(Exception):  # noqa: N818
    """The server closed the connection."""


class Client:
    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.seq = 0
        self.replica = ""
        self.instance = ""
        self._reader = FrameReader(HEADER_SIZE + MAX_PAYLOAD)
        self._frames: list[Frame] = []

    async def receive(self) -> Frame:
        while not self._frames:
            try:
                data = await self.stream.receive_some(1 << 20)
            except trio.BrokenResourceError:
                data = b""
            if not data:
                raise Closed
            while data:
                space = self._reader.space()
                count = min(len(space), len(data))
                space[:count] = data[:count]
                self._reader.received(count)
                self._frames += self._reader.frames()
                data = data[count:]
        return self._frames.pop(0)

    async def send(
        self, kind: int, payload: bytes = b"", *, offset: int = 0, length: int = 0, seq: int | None = None
    ) -> int:
        if seq is None:
            self.seq += 1
            seq = self.seq
        try:
            await self.stream.send_all(encode_frame(kind, seq, payload, offset=offset, length=length))
        except trio.BrokenResourceError:
            raise Closed from None
        return seq

    async def call(
        self, kind: int, payload: bytes = b"", *, offset: int = 0, length: int = 0, seq: int | None = None
    ) -> Frame:
        """Send one request and take its reply, whatever its status."""
        seq = await self.send(kind, payload, offset=offset, length=length, seq=seq)
        reply = await self.receive()
        assert reply[0] == kind | REPLY, reply
        assert reply[2] == seq
        return reply

    async def handshake(self, key: bytes = KEY, versions: tuple[int, int] = (1, 1)) -> None:
        nonce = new_nonce()
        hello = messages.Hello(version_min=versions[0], version_max=versions[1], nonce=nonce)
        reply = await self.call(FrameType.HELLO, messages.encode(hello))
        if reply[1]:
            raise ProtocolError(f"status {reply[1]}")
        theirs = messages.decode(reply[5], messages.HelloReply)
        mine = proof(key, "client", theirs.version, nonce, theirs.nonce)
        reply = await self.call(FrameType.AUTH, messages.encode(messages.Auth(proof=mine)))
        if reply[1]:
            raise ProtocolError(f"status {reply[1]}")
        auth = messages.decode(reply[5], messages.AuthReply)
        check_proof(auth.proof, proof(key, "replica", theirs.version, nonce, theirs.nonce), "the replica")
        self.replica, self.instance = auth.replica, auth.instance

    async def open(self, epoch: int, incarnation: int = 1, uuid: str = UUID, *, gathers: bool = False) -> Frame:
        wanted = messages.Open(volume_uuid=uuid, epoch=epoch, incarnation=incarnation, gathers=gathers)
        return await self.call(FrameType.OPEN, messages.encode(wanted))

    async def write(self, offset: int, data: bytes, seq: int | None = None) -> Frame:
        return await self.call(FrameType.WRITE, data, offset=offset, length=len(data), seq=seq)

    async def read(self, offset: int, length: int) -> Frame:
        return await self.call(FrameType.READ, offset=offset, length=length)

    async def unmap(self, offset: int, length: int) -> Frame:
        return await self.call(FrameType.UNMAP, offset=offset, length=length)

    async def flush(self) -> Frame:
        return await self.call(FrameType.FLUSH)

    async def settled(self, bound: int, inherited: bool = False) -> Frame:
        return await self.call(FrameType.SETTLED, offset=bound, length=int(inherited))

    async def track(self, *names: str) -> Frame:
        return await self.call(FrameType.TRACK, messages.encode(messages.Track(names=names)))

    async def bitmap(self, name: str = "", offset: int = 0, length: int = 1 << 20) -> Frame:
        return await self.call(
            FrameType.BITMAP, messages.encode(messages.Bitmap(name=name)), offset=offset, length=length
        )

    async def status(self) -> messages.StatusReply:
        return messages.decode((await self.call(FrameType.STATUS))[5], messages.StatusReply)


@asynccontextmanager
async def connect(address: str, key: bytes | None = KEY) -> AsyncIterator[Client]:
    """`key` None leaves the connection before its handshake."""
    scheme, _, rest = address.partition(":")
    if scheme == "unix":
        sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        await sock.connect(rest)
    else:
        host, _, port = rest.rpartition(":")
        sock = trio.socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        await sock.connect((host, int(port)))
    async with trio.SocketStream(sock) as stream:
        client = Client(stream)
        if key is not None:
            await client.handshake(key)
        yield client
