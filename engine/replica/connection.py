"""One connection of an engine: handshake, then batches of frames, executed inline and answered with one sendmsg."""

from __future__ import annotations

import contextlib
import socket
import time
from typing import TYPE_CHECKING

import structlog
import trio

from engine.errors import AuthenticationError, ProtocolError, VersionError
from engine.readiness import BUDGET
from engine.replica.exchange import FULL, QUIET, ConnectionEndError, Exchange
from engine.replica.executor import AUTH, HELLO, MAX_UNSENT, WATCH
from engine.replica.watch import Confirm, Watch
from engine.wire import messages
from engine.wire.frame import Frame, FrameReader, Status
from engine.wire.handshake import NONCE_SIZE, check_proof, choose_version, new_nonce, proof

if TYPE_CHECKING:
    from engine.replica.server import Server

log = structlog.get_logger()

HANDSHAKE_SECONDS = 5.0


class Connection(Exchange):
    server: Server

    def __init__(self, server: Server, sock: socket.socket, peer: str) -> None:
        super().__init__(server, sock, peer)
        self.authenticated = False
        self.read_scope = trio.CancelScope()
        self._scope = trio.CancelScope()
        self._nursery: trio.Nursery | None = None

    async def run(self) -> None:
        """Serve until the peer leaves or misbehaves; never raises for what a peer does."""
        reason = ""
        try:
            with self._scope:
                async with trio.open_nursery() as self._nursery:
                    self.open = True
                    with self.read_scope:
                        try:
                            with trio.fail_after(HANDSHAKE_SECONDS):
                                self.take(await self._handshake())
                            await self._serve()
                        except trio.TooSlowError:
                            reason = "not authenticated in time"
                        except (ProtocolError, VersionError) as error:
                            reason = str(error)
                        except ConnectionEndError:
                            pass
                        except OSError as error:
                            reason = error.strerror or str(error)
                        # what was answered before the end, and why a handshake was refused, is worth a try
                        if self.draining is None:
                            self.send_some()
                        self._nursery.cancel_scope.cancel()
                    await trio.sleep_forever()
        finally:
            self.open = False
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
        while self.draining is not None:
            await self.draining.wait()

    async def _receive(self) -> list[Frame]:
        self.send()
        while True:
            await trio.lowlevel.wait_readable(self._sock)
            self.receive()
            if frames := self.received:
                return frames

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
        if not self.reader.partial:
            # its room is for peers that have proven something
            self.reader = FrameReader(bulk=self.server.buffers)
        answer = messages.AuthReply(
            proof=proof(key, "replica", version, hello.nonce, nonce),
            replica=self.server.store.identity.replica,
            instance=self.server.instance,
        )
        self.reply(AUTH, Status.OK, seq, payload=messages.encode(answer))
        return frames

    async def _serve(self) -> None:
        while True:
            why = self.go_on()
            if why == QUIET:
                await trio.lowlevel.wait_readable(self._sock)
                self.give_way = time.monotonic() + BUDGET
                self.receive()
                continue
            if why != FULL:
                frame = self.next_frame()
                if frame[0] == WATCH:
                    if not self.last:
                        raise ProtocolError("a frame behind a watch that is not answered yet")
                    await self.server.watch(self, frame)
                    return
                await self.server.control(self, frame)
                self.send()
            await self.server.room()
            if self._unsent > MAX_UNSENT:
                await self.drained()

    def drain(self) -> None:
        assert self._nursery is not None
        self._nursery.start_soon(self._drain)

    async def _drain(self) -> None:
        drained = self.draining
        assert drained is not None
        try:
            while not self.send_some():
                await trio.lowlevel.wait_writable(self._sock)
        finally:
            self.draining = None
            drained.set()
