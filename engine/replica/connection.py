"""One connection of an engine: handshake, then batches of frames, executed inline and answered with one sendmsg.

No task, thread or stream per request: the cost of a request is a few calls. What cannot be answered at once (a write
that waits for its intent bits, a flush) is parked in the server, which answers through `reply`; what goes to the disk
past the page cache is answered by `Direct` when it has completed.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import time
from typing import TYPE_CHECKING

import structlog
import trio
from crc32c import crc32c

from engine.errors import AuthenticationError, CorruptBlockError, ProtocolError, VersionError
from engine.poller import BUDGET, LINGER
from engine.replica.watch import Confirm, Watch
from engine.store.snapshots import snapshot_name
from engine.wire import messages
from engine.wire.frame import (
    HEADER_SIZE,
    MAX_PAYLOAD,
    REPLY,
    Buffer,
    Frame,
    FrameReader,
    FrameType,
    Status,
    encode_header,
)
from engine.wire.handshake import NONCE_SIZE, check_proof, choose_version, new_nonce, proof
from engine.wire.layers import BLOCK, decode_layer, layer_name

if TYPE_CHECKING:
    from engine.replica.server import Server

log = structlog.get_logger()

HANDSHAKE_SECONDS = 5.0
MAX_REQUEST = 1 << 20
MAX_UNSENT = 8 << 20
IOV_MAX = 1024

READ, WRITE, FLUSH, UNMAP = int(FrameType.READ), int(FrameType.WRITE), int(FrameType.FLUSH), int(FrameType.UNMAP)
PING, SETTLED, BITMAP = int(FrameType.PING), int(FrameType.SETTLED), int(FrameType.BITMAP)
CONFIRM, WATCH = int(FrameType.CONFIRM), int(FrameType.WATCH)
WRITE_LAYER = int(FrameType.WRITE_LAYER)
HELLO, AUTH = int(FrameType.HELLO), int(FrameType.AUTH)
# answered after work of their own; the frames behind them on the connection wait
CONTROL = frozenset(
    map(
        int,
        (
            FrameType.OPEN,
            FrameType.STATUS,
            FrameType.TRACK,
            FrameType.STATE,
            FrameType.CLOSE,
            FrameType.SNAPSHOT,
            FrameType.REVERT,
            FrameType.REMOVE_SNAPSHOT,
            FrameType.BEGIN_REBUILD,
            FrameType.RESIZE,
            FrameType.WATCH,
        ),
    )
)
# answered after work of their own, for which nothing else waits
RANGED = frozenset(map(int, (FrameType.READ_SNAPSHOT, FrameType.READ_LAYER, FrameType.DIGEST, FrameType.MEND)))
BACKGROUND = RANGED | frozenset(
    map(
        int,
        (
            FrameType.SNAPSHOTS,
            FrameType.COALESCE,
            FrameType.PULL,
            FrameType.WRITE_LAYER,
            FrameType.REBUILD_STATE,
        ),
    )
)
WITHOUT_OPEN = frozenset(map(int, (FrameType.OPEN, FrameType.STATUS, FrameType.PING, FrameType.WATCH)))
DATA = frozenset((READ, WRITE, FLUSH, UNMAP, SETTLED, BITMAP, CONFIRM))


class ConnectionEndError(Exception):
    """The peer closed."""


class Connection:
    def __init__(self, server: Server, sock: socket.socket, peer: str) -> None:
        self.server = server
        self.peer = peer
        self.token: tuple[int, int] | None = None
        self.authenticated = False
        self.read_scope = trio.CancelScope()
        self._scope = trio.CancelScope()
        self._sock = sock
        self._reader = FrameReader(HEADER_SIZE + MAX_PAYLOAD)
        self._out: list[Buffer] = []
        self._unsent = 0
        # what is answered waits for the answer of a flush that came with it, unless more comes
        self._together = False
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
                            self._send_some()
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
                    at = self._execute(frames, at)
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

    def _execute(self, frames: list[Frame], at: int) -> int:
        """Execute from `frames[at]` on; returns the index of the first frame that needs the caller.

        Synchronous, so whoever owns the replica at its first frame owns it at its last. What it prepared for the disk
        has to be submitted then.
        """
        server = self.server
        self._together = False
        if server.owner is not self or server.failed:
            return self._refuse(frames, at)
        store, counters, out = server.store, server.counters, self._out
        touch, size = store.maps.touch, store.size
        reply_read, reply_write = READ | REPLY, WRITE | REPLY
        direct, fd = server.direct, store.direct
        if fd < 0:
            direct = None
        cache = store.cache
        direct_write = direct if cache is None else None
        server.tick()
        for index in range(at, len(frames)):
            kind, _, seq, offset, length, payload = frames[index]
            if kind == READ:
                if offset + length > size or not 0 < length <= MAX_REQUEST or payload:
                    self._bad_range(frames[index])
                    continue
                try:
                    if direct is None:
                        data, crc = store.read_checked(offset, length)
                    elif cache is None or (cached := cache.read(offset, length)) is None:
                        if not direct.read(self, fd, seq, offset, length):
                            return index
                        continue
                    else:
                        data, crc = cached, store.checked(offset, cached)
                except OSError as error:
                    self.io_error(frames[index], error)
                    continue
                except CorruptBlockError as error:
                    self.corrupt(frames[index], error)
                    continue
                out.append(encode_header(reply_read, 0, seq, offset, length, length, crc))
                out.append(data)
                self._unsent += 40 + length
                counters.reads += 1
                counters.read_bytes += length
                if self._unsent > MAX_UNSENT:
                    return index + 1
            elif kind == WRITE:
                if offset + length > size or not 0 < length <= MAX_REQUEST or len(payload) != length:
                    self._bad_range(frames[index])
                elif not touch(offset, length, seq):
                    server.park(self, frames[index])
                elif direct_write is not None:
                    if not direct_write.write(self, fd, seq, offset, payload):
                        return index
                else:
                    try:
                        store.write(offset, payload)
                    except OSError as error:
                        self.io_error(frames[index], error)
                        continue
                    out.append(encode_header(reply_write, 0, seq, offset, length))
                    self._unsent += 40
                    counters.writes += 1
                    counters.written_bytes += length
            elif kind == FLUSH:
                server.flush(self, frames[index])
                self._together = bool(length)
            elif kind == UNMAP:
                if offset + length > size or not 0 < length <= MAX_REQUEST or payload:
                    self._bad_range(frames[index])
                elif not touch(offset, length, seq):
                    server.park(self, frames[index])
                elif direct is None:
                    self.apply(frames[index])
                elif not direct.unmap(self, frames[index]):
                    return index
            elif kind == PING:
                self.reply(kind, 0, seq)
            elif kind == CONFIRM:
                server.confirm(self, seq)
            elif kind == SETTLED:
                server.settled(self, frames[index])
            elif kind == BITMAP:
                self._bitmap(frames[index])
            elif kind in CONTROL:
                return index
            elif kind == WRITE_LAYER and not layer_name(payload):
                if not self._fits_head(frames[index]):
                    self._bad_range(frames[index])
                elif not touch(offset, length, seq):
                    server.park(self, frames[index])
                elif direct is None:
                    self.apply(frames[index])
                elif not direct.unmap(self, frames[index]):
                    return index
            elif kind in BACKGROUND:
                if kind in RANGED and (offset + length > size or not 0 < length <= MAX_REQUEST):
                    self._bad_range(frames[index])
                else:
                    server.snapshots.background(self, frames[index])
                    if server.snapshots.crowded:
                        return index + 1
            else:
                raise ProtocolError(f"unknown frame type {kind:#x}")
        return len(frames)

    def apply(self, frame: Frame) -> None:
        """A write or unmap that its maps admit, and its reply."""
        kind, _, seq, offset, length, payload = frame
        counters = self.server.counters
        try:
            if kind == WRITE:
                self.server.store.write(offset, payload)
                counters.writes += 1
                counters.written_bytes += length
            elif kind == WRITE_LAYER:
                self.server.layers.write_head(frame)
                self.server.layers.wrote_head(frame)
            else:
                self.server.store.unmap(offset, length)
                counters.unmaps += 1
        except OSError as error:
            self.io_error(frame, error)
            return
        self.reply(kind, 0, seq, offset=offset, length=length)

    def _fits_head(self, frame: Frame) -> bool:
        """Whether a WRITE_LAYER of the head is whole blocks within the volume. Raises ProtocolError."""
        _, _, _, offset, length, payload = frame
        decode_layer(payload, length)
        inside = offset + length <= self.server.store.size and 0 < length <= MAX_REQUEST
        return inside and not offset % BLOCK and not length % BLOCK

    def _refuse(self, frames: list[Frame], at: int) -> int:
        for index in range(at, len(frames)):
            kind, _, seq, _, _, _ = frames[index]
            if self.server.failed:
                self.reply(kind, Status.IO_ERROR, seq, payload=self.server.failed.encode())
            elif kind == PING:
                self.reply(kind, 0, seq)
            elif kind in WITHOUT_OPEN:
                return index
            elif kind in DATA or kind in CONTROL or kind in BACKGROUND:
                self.refuse_unopened(frames[index])
            else:
                raise ProtocolError(f"unknown frame type {kind:#x}")
        return len(frames)

    def refuse_unopened(self, frame: Frame) -> None:
        """This connection does not own the replica (any more)."""
        status, payload = self.refusal()
        self.reply(frame[0], status, frame[2], payload=payload)

    def refusal(self) -> tuple[int, bytes]:
        """Status and payload for one that does not own the replica."""
        if self.token is not None and self.token < self.server.token:
            return Status.STALE_EPOCH, self.server.highest()
        return Status.NOT_OPEN, b""

    def _bad_range(self, frame: Frame) -> None:
        kind, _, seq, offset, length, payload = frame
        size = self.server.store.size
        status = Status.OUT_OF_RANGE if offset + length > size else Status.BAD_REQUEST
        text = f"{offset}+{length} with {len(payload)} bytes, volume of {size}"
        self.reply(kind, status, seq, payload=text.encode())

    def io_error(self, frame: Frame, error: OSError) -> None:
        status = Status.NO_SPACE if error.errno in (errno.ENOSPC, errno.EDQUOT) else Status.IO_ERROR
        log.error("request failed", type=frame[0], offset=frame[3], length=frame[4], reason=str(error))
        self.reply(frame[0], status, frame[2], payload=str(error).encode())

    def corrupt(self, frame: Frame, error: CorruptBlockError) -> None:
        """Answer a request for what the checksums deny, with the block."""
        self.server.counters.corrupt += 1
        log.error("checksum mismatch", type=frame[0], image=error.image, offset=error.offset)
        body = messages.encode(messages.Corrupt(snapshot=snapshot_name(error.image), reason=error.reason))
        self.reply(frame[0], Status.CORRUPT, frame[2], offset=error.offset, length=BLOCK, payload=body)

    def _bitmap(self, frame: Frame) -> None:
        kind, _, seq, offset, length, payload = frame
        name = messages.decode(payload, messages.Bitmap).name
        try:
            bits = self.server.store.maps.bitmap(name)
        except KeyError:
            self.reply(kind, Status.BAD_REQUEST, seq, payload=f"no map of replica {name!r}".encode())
            return
        page = bits[offset : offset + min(length, MAX_REQUEST)]
        self.reply(kind, 0, seq, offset=offset, length=len(bits), payload=page)

    def reply(
        self, kind: int, status: int, seq: int, *, offset: int = 0, length: int = 0, payload: bytes = b""
    ) -> None:
        """Queue a reply; during a batch it leaves with the batch, otherwise call `send`."""
        crc = crc32c(payload) if payload else 0
        self._out.append(encode_header(kind | REPLY, status, seq, offset, length, len(payload), crc))
        self._unsent += 40 + len(payload)
        if payload:
            self._out.append(payload)

    def queue(self, header: bytes, payload: bytes = b"") -> None:
        """The same for a reply that is encoded already."""
        self._out.append(header)
        self._unsent += 40 + len(payload)
        if payload:
            self._out.append(payload)

    def send(self, *, now: bool = False) -> None:
        """Send what is queued, as far as the kernel takes it now; the rest follows by itself.

        Without `now` it may wait for the answer of a flush that was asked for ahead.
        """
        if now:
            self._together = False
        if not self._out or self._together or self._draining is not None or self._nursery is None:
            return
        if not self._send_some():
            self._draining = trio.Event()
            self._nursery.start_soon(self._drain)

    def _send_some(self) -> bool:
        """True when nothing is left."""
        out = self._out
        while out:
            try:
                sent = self._sock.sendmsg(out if len(out) <= IOV_MAX else out[:IOV_MAX])
            except BlockingIOError:
                return False
            except OSError as error:
                # the reader will see it too, and ends the connection
                log.info("peer gone", peer=self.peer, reason=error.strerror)
                out.clear()
                self._unsent = 0
                self.close()
                return True
            self._unsent -= sent
            if not self._unsent:
                out.clear()
                return True
            done = 0
            while sent >= len(out[done]):
                sent -= len(out[done])
                done += 1
            del out[:done]
            if sent:
                out[0] = memoryview(out[0])[sent:]
        return True

    async def _drain(self) -> None:
        drained = self._draining
        assert drained is not None
        try:
            while not self._send_some():
                await trio.lowlevel.wait_writable(self._sock)
        finally:
            self._draining = None
            drained.set()
