"""One connection of an engine: handshake, then batches of frames, executed inline and answered with one sendmsg."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from typing import TYPE_CHECKING

import structlog
import trio

from engine.errors import AuthenticationError, ProtocolError, VersionError
from engine.poller import BUDGET, LINGER
from engine.replica.executor import AUTH, CONTROL, HELLO, MAX_UNSENT, WATCH, Executor
from engine.replica.watch import Confirm, Watch
from engine.wire import messages
from engine.wire.frame import (
    HEADER_SIZE,
    MAX_PAYLOAD,
    Frame,
    FrameReader,
    Status,
)
from engine.wire.handshake import NONCE_SIZE, check_proof, choose_version, new_nonce, proof

if TYPE_CHECKING:
    from engine.replica.server import Server

log = structlog.get_logger()

HANDSHAKE_SECONDS = 5.0


class ConnectionEndError(Exception):
    """The peer closed."""


class Connection(Executor):
    def __init__(self, server: Server, sock: socket.socket, peer: str) -> None:
        super().__init__(server, sock, peer)
        self.authenticated = False
        self.read_scope = trio.CancelScope()
        self._scope = trio.CancelScope()
        self._reader = FrameReader(HEADER_SIZE + MAX_PAYLOAD)
        self._draining: trio.Event | None = None
        self._nursery: trio.Nursery | None = None
        self._poll: select.poll | None = None
        self._give_way = 0.0

    async def run(self) -> None:
        """Serve until the peer leaves or misbehaves; never raises for what a peer does."""
        reason = ""
        try:
            with self._scope:
                async with trio.open_nursery() as self._nursery:
                    with self.read_scope:
                        try:
                            with trio.fail_after(HANDSHAKE_SECONDS):
                                frames = await self._handshake()
                            await self._serve(frames)
                        except trio.TooSlowError:
                            reason = "not authenticated in time"
                        except (ProtocolError, VersionError) as error:
                            reason = str(error)
                        except ConnectionEndError:
                            pass
                        except OSError as error:
                            reason = error.strerror or str(error)
                        # what was answered before the end, and why a handshake was refused, is worth a try
                        if self._draining is None:
                            self.send_some()
                        self._nursery.cancel_scope.cancel()
                    await trio.sleep_forever()
        finally:
            self._nursery = None
            self._sock.close()
            if reason:
                log.warning("connection closed", peer=self.peer, reason=reason)

    def close(self) -> None:
        self._scope.cancel()

    async def watch(self, confirm: Confirm) -> None:
        """Be a watch, from here to the end of the connection."""
        watch = Watch(self._sock.dup(), self.peer, confirm)
        try:
            await trio.to_thread.run_sync(watch.run, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1))
        finally:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)

    async def drained(self) -> None:
        """Wait until everything replied so far is with the kernel."""
        while self._draining is not None:
            await self._draining.wait()

    async def _receive(self) -> list[Frame]:
        self.send()
        while True:
            if not self._linger():
                await trio.lowlevel.wait_readable(self._sock)
                self._give_way = time.monotonic() + BUDGET
            try:
                count = self._sock.recv_into(self._reader.space())
            except BlockingIOError:
                continue
            if not count:
                if self._reader.partial:
                    raise ProtocolError("the connection ended within a frame")
                raise ConnectionEndError
            self._reader.received(count)
            if frames := self._reader.frames():
                return frames

    def _linger(self) -> bool:
        """Wait a moment for the owner's next frames, past the event loop (see engine.poller); whether there are any."""
        if self.server.owner is not self:
            return False
        completions = self.server.completions
        if self._poll is None:
            self._poll = select.poll()
            for fd in (self._sock.fileno(), *completions):
                self._poll.register(fd, select.POLLIN)
        while time.monotonic() < self._give_way and not self.server.busy:
            events = self._poll.poll(LINGER * 1000)
            if not events:
                return False
            readable = False
            for fd, _ in events:
                if fd in completions:
                    completions[fd]()
                else:
                    readable = True
            if readable:
                return True
        return False

    async def _handshake(self) -> list[Frame]:
        """Returns the frames that came right behind the proof. Raises ProtocolError, VersionError."""
        frames = await self._receive()
        kind, _, seq, _, _, payload = frames.pop(0)
        if kind != HELLO:
            raise AuthenticationError(f"frame type {kind:#x} instead of a hello")
        hello = messages.decode(payload, messages.Hello)
        if len(hello.nonce) != NONCE_SIZE:
            raise ProtocolError(f"nonce of {len(hello.nonce)} bytes")
        try:
            version = choose_version(hello)
        except VersionError as error:
            # the range is what the peer needs to tell its operator which side to upgrade
            ours = f"this replica speaks versions {error.ours[0]}..{error.ours[1]}".encode()
            self.reply(HELLO, Status.UNSUPPORTED_VERSION, seq, payload=ours)
            raise
        nonce = new_nonce()
        self.reply(HELLO, Status.OK, seq, payload=messages.encode(messages.HelloReply(version=version, nonce=nonce)))
        if not frames:
            frames = await self._receive()
        kind, _, seq, _, _, payload = frames.pop(0)
        if kind != AUTH:
            raise AuthenticationError(f"frame type {kind:#x} instead of a proof")
        key = self.server.key
        try:
            given = messages.decode(payload, messages.Auth).proof
            check_proof(given, proof(key, "client", version, hello.nonce, nonce), "the peer")
        except ProtocolError:
            self.reply(AUTH, Status.UNAUTHENTICATED, seq)
            raise
        self.authenticated = True
        if not self._reader.partial:
            # its room is for peers that have proven something
            self._reader = FrameReader(bulk=self.server.buffers)
        answer = messages.AuthReply(
            proof=proof(key, "replica", version, hello.nonce, nonce),
            replica=self.server.store.identity.replica,
            instance=self.server.instance,
        )
        self.reply(AUTH, Status.OK, seq, payload=messages.encode(answer))
        return frames

    async def _serve(self, frames: list[Frame]) -> None:
        while True:
            at, count = 0, len(frames)
            while at < count:
                self.server.begin_batch()
                try:
                    at = self.execute(frames, at)
                finally:
                    self.server.submit()
                if at < count and frames[at][0] in CONTROL and self._unsent <= MAX_UNSENT:
                    if frames[at][0] == WATCH:
                        if at + 1 < count or self._reader.partial:
                            raise ProtocolError("a frame behind a watch that is not answered yet")
                        await self.server.watch(self, frames[at])
                        return
                    await self.server.control(self, frames[at])
                    at += 1
                self.send()
                await self.server.room()
                if self._unsent > MAX_UNSENT:
                    await self.drained()
            frames = await self._receive()

    def send(self, *, now: bool = False) -> None:
        """Send what is queued, as far as the kernel takes it now; the rest follows by itself.

        Without `now` it may wait for the answer of a flush that was asked for ahead.
        """
        if now:
            self._together = False
        if not self._out or self._together or self._draining is not None or self._nursery is None:
            return
        if not self.send_some():
            self._draining = trio.Event()
            self._nursery.start_soon(self._drain)

    async def _drain(self) -> None:
        drained = self._draining
        assert drained is not None
        try:
            while not self.send_some():
                await trio.lowlevel.wait_writable(self._sock)
        finally:
            self._draining = None
            drained.set()
