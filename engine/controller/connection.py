"""The engine's end of one data connection: connect, prove, then frames in batches.

After the handshake nothing here awaits per request: frames are queued and leave with one sendmsg per round.
Driver calls (open, maps, marks) share the connection; their sequence numbers have the top bit set.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from engine.address import Address
from engine.buffers import BufferPool
from engine.controller.stream import Stream
from engine.errors import EngineError, FencedError, ProtocolError, VersionError
from engine.wire import handshake, messages
from engine.wire.frame import MAX_PAYLOAD, REPLY, Frame, FrameReader, FrameType, Status, encode_frame

if TYPE_CHECKING:
    from engine.controller.watch import Watch

CALL = 1 << 63
_SOCKET_BUFFER = 4 << 20
# of all connections of the process
_BUFFERS = BufferPool(MAX_PAYLOAD)


class ReplicaRefusedError(EngineError):
    """A replica answered a control request with an error status."""

    def __init__(self, replica: str, kind: FrameType, status: int, detail: bytes) -> None:
        super().__init__(replica, kind, status, detail)
        self.replica = replica
        self.kind = kind
        self.status = status
        self.detail = detail

    def __str__(self) -> str:
        name = Status(self.status).name if self.status in Status._value2member_map_ else str(self.status)
        return (
            f"replica {self.replica} refused {self.kind.name}: {name} {self.detail.decode(errors='replace')}".rstrip()
        )


class ReplicaUnreachableError(EngineError):
    def __init__(self, replica: str, reason: str) -> None:
        super().__init__(replica, reason)
        self.replica = replica
        self.reason = reason

    def __str__(self) -> str:
        return f"replica {self.replica} cannot be reached: {self.reason}"


def _nothing() -> None:
    pass


class _Call:
    __slots__ = ("answer", "done")

    def __init__(self) -> None:
        self.done = trio.Event()
        self.answer: Frame | None = None


class ReplicaConnection:
    """One authenticated connection. `bit` is the replica's place in the core's masks, `origin` what it is linked to."""

    def __init__(self, name: str, bit: int, sock: socket.socket) -> None:
        self.name = name
        self.bit = bit
        self.stream = Stream(bit, sock, FrameReader(bulk=_BUFFERS))
        self.sock = sock
        self.instance = ""
        self.version = 0
        # what it is opened with
        self.token = (0, 0)
        self.origin = ""
        # another one, on which the replica answers while its disk keeps it waiting
        self.watch: Watch | None = None
        self.scope = trio.CancelScope()
        self.before_close: Callable[[], None] = _nothing
        self._calls: dict[int, _Call] = {}
        self._next_call = CALL

    @property
    def closed(self) -> bool:
        return self.stream.closed

    # setting up

    @classmethod
    async def connect(cls, name: str, bit: int, address: Address, key: bytes) -> ReplicaConnection:
        """Raises ReplicaUnreachableError, AuthenticationError, VersionError, ProtocolError. Has no deadline."""
        sock = socket.socket(address.family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.setblocking(False)
            tsock = trio.socket.from_stdlib_socket(sock)
            await tsock.connect(address.target)
            # a full backlog of a unix socket looks like success until one asks for the peer
            sock.getpeername()
            if address.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER)
            connection = cls(name, bit, sock)
            await connection._handshake(key)
        except OSError as error:
            sock.close()
            raise ReplicaUnreachableError(name, error.strerror or str(error)) from error
        except BaseException:
            sock.close()
            raise
        return connection

    async def _handshake(self, key: bytes) -> None:
        ours = handshake.new_nonce()
        hello = messages.Hello(version_min=messages.VERSION_MIN, version_max=messages.VERSION_MAX, nonce=ours)
        reply = messages.decode(await self.exchange(FrameType.HELLO, messages.encode(hello)), messages.HelloReply)
        if not messages.VERSION_MIN <= reply.version <= messages.VERSION_MAX:
            raise VersionError((messages.VERSION_MIN, messages.VERSION_MAX), (reply.version, reply.version))
        proof = handshake.proof(key, "client", reply.version, ours, reply.nonce)
        body = await self.exchange(FrameType.AUTH, messages.encode(messages.Auth(proof=proof)))
        answer = messages.decode(body, messages.AuthReply)
        expected = handshake.proof(key, "replica", reply.version, ours, reply.nonce)
        handshake.check_proof(answer.proof, expected, f"the server at replica {self.name}'s address")
        if answer.replica != self.name:
            raise ProtocolError(f"replica {answer.replica!r} answers at the address of {self.name!r}")
        self.instance = answer.instance
        self.version = reply.version

    async def exchange(self, kind: FrameType, payload: bytes) -> bytes:
        """One request and the body of its answer, while nobody else receives. Has no deadline.

        Raises OSError, ReplicaUnreachableError, ReplicaRefusedError, ProtocolError.
        """
        tsock = trio.socket.from_stdlib_socket(self.sock)
        await tsock.send(encode_frame(kind, 0, payload))
        while True:
            count = await tsock.recv_into(self.stream.reader.space())
            if not count:
                raise ReplicaUnreachableError(self.name, f"it closed the connection during {kind.name}")
            self.stream.reader.received(count)
            frames = self.stream.reader.frames()
            if not frames:
                continue
            answer, status, _, _, _, body = frames[0]
            if answer != kind | REPLY or len(frames) > 1:
                raise ProtocolError(f"unexpected frame {answer:#x} during {kind.name}")
            if status != Status.OK:
                raise ReplicaRefusedError(self.name, kind, status, body)
            data: bytes = body
            return data

    # data

    def queue(self, piece: bytes | memoryview) -> None:
        self.stream.queue(piece)

    def pump(self) -> None:
        """Send what is queued as far as the socket takes it. Raises OSError."""
        self.stream.pump()

    async def pump_when_writable(self) -> None:
        """Runs beside the connection and sends what did not fit at once. Raises OSError."""
        stream = self.stream
        while True:
            await stream.blocked.wait()
            stream.blocked = trio.Event()
            await trio.lowlevel.wait_writable(stream.sock)
            stream.pump()

    def receive(self) -> list[Frame]:
        """Whole frames of what has arrived. Raises OSError, ProtocolError, ReplicaUnreachableError."""
        frames = self.stream.receive()
        if frames is None:
            raise ReplicaUnreachableError(self.name, "it closed the connection")
        return frames

    # control calls

    async def call(
        self,
        kind: FrameType,
        message: messages.Message | None = None,
        *,
        body: bytes = b"",
        offset: int = 0,
        length: int = 0,
    ) -> Frame:
        """One control request, with a message or a body, and its answer; raises on an error status.

        Needs somebody who delivers frames.
        """
        self._next_call += 1
        seq = self._next_call
        call = self._calls[seq] = _Call()
        try:
            if message is not None:
                body = messages.encode(message)
            self.queue(encode_frame(kind, seq, body, offset=offset, length=length))
            try:
                self.pump()
            except OSError as error:
                raise ReplicaUnreachableError(self.name, error.strerror or str(error)) from error
            await call.done.wait()
        finally:
            del self._calls[seq]
        if call.answer is None:
            raise ReplicaUnreachableError(self.name, f"the connection ended during {kind.name}")
        status, body = call.answer[1], call.answer[5]
        if status == Status.STALE_EPOCH:
            raise self.fenced(body)
        if status != Status.OK:
            raise ReplicaRefusedError(self.name, kind, status, body)
        return call.answer

    async def confirm(self) -> None:
        """Have the replica say that it has seen no higher token. Raises FencedError and what `call` raises."""
        if self.watch is not None:
            with contextlib.suppress(ReplicaUnreachableError):
                await self.watch.confirm()
                return
        await self.call(FrameType.CONFIRM)

    def fenced(self, body: bytes) -> FencedError:
        """What a STALE_EPOCH says. Raises ProtocolError for one that names no higher token than ours."""
        highest = messages.decode_token(body)
        if highest <= self.token:
            raise ProtocolError(f"replica {self.name} calls {self.token} stale and has seen {highest}")
        return FencedError(self.token, highest, f"replica {self.name}")

    def deliver(self, frame: Frame) -> None:
        """Hand an answer to the control call that waits for it."""
        call = self._calls.get(frame[2])
        if call is not None:
            call.answer = frame
            call.done.set()

    def close(self) -> None:
        """Idempotent; wakes whoever waits on this connection."""
        if self.closed:
            return
        self.stream.closed = True
        self.before_close()
        self.scope.cancel()
        trio.lowlevel.notify_closing(self.sock)
        self.sock.close()
        for call in self._calls.values():
            call.done.set()
        if self.watch is not None:
            self.watch.close()
