"""What a connection does with its frames, without waiting: execute a batch of them, answer, send the answers.

No task, thread or stream per request: the cost of a request is a few calls. What cannot be answered at once (a write
that waits for its intent bits, a flush) is parked in the server, which answers through `reply`; what goes to the disk
past the page cache is answered by `Direct` when it has completed.
"""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING, Final, cast

import structlog
from crc32c import crc32c
from mypy_extensions import mypyc_attr

from engine.errors import CorruptBlockError, ProtocolError
from engine.ops import FLUSH, READ, UNMAP, WRITE
from engine.store.regions import REGION_SHIFT, Regions
from engine.store.snapshots import snapshot_name
from engine.wire import messages
from engine.wire.frame import (
    HEADER_SIZE,
    REPLY,
    Buffer,
    Frame,
    FrameType,
    Status,
    encode_header,
    encode_written,
)
from engine.wire.layers import BLOCK, decode_layer, layer_name

if TYPE_CHECKING:
    from engine.replica.backlog import Backlog
    from engine.replica.direct import Direct
    from engine.replica.exchange import Exchange
    from engine.replica.server import Server
    from engine.store.chain import Chain

log = structlog.get_logger()

MAX_REQUEST: Final = 1 << 20
MAX_UNSENT: Final = 8 << 20
IOV_MAX: Final = 1024

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


@mypyc_attr(allow_interpreted_subclasses=True)
class Executor:
    """What an `Exchange` does with whole frames."""

    def __init__(self, server: Backlog, sock: socket.socket, peer: str) -> None:
        self.server = server
        self.peer = peer
        self.token: tuple[int, int] | None = None
        self._sock = sock
        self._out: list[Buffer] = []
        self._unsent = 0
        # what is answered waits for the answer of a flush that came with it, unless more comes
        self._together = False
        # the peer takes the answers to many writes in one frame
        self.gathers = False
        self._written: list[int] = []
        self._written_bytes = 0

    def close(self) -> None:
        raise NotImplementedError

    def execute(self, frames: list[Frame], at: int) -> int:
        """Execute from `frames[at]` on; returns the index of the first frame that needs the caller.

        Synchronous, so whoever owns the replica at its first frame owns it at its last. What it prepared for the disk
        has to be submitted then.
        """
        try:
            return self._execute(frames, at)
        finally:
            self.answer_written()

    def wrote(self, seq: int, length: int) -> None:
        """A WRITE of a peer that gathers is done; `answer_written` tells it."""
        self._written.append(seq)
        self._written_bytes += length

    def answer_written(self) -> None:
        if not self._written:
            return
        written, counters = self._written, self.server.counters
        counters.writes += len(written)
        counters.written_bytes += self._written_bytes
        self._written_bytes = 0
        header, body = encode_written(written)
        self._out.append(header)
        self._out.append(body)
        self._unsent += HEADER_SIZE + len(body)
        written.clear()

    def _execute(self, frames: list[Frame], at: int) -> int:
        server, connection = self.server, cast("Exchange", self)
        self._together = False
        if server.owner is not self or server.failed:
            return self._refuse(frames, at)
        store, counters, out = server.store, server.counters, self._out
        regions: Regions = store.maps.regions
        # the ranges are looked at here
        content: Chain = store.content
        size: int = store.size
        direct, fd = server.direct, store.direct
        if fd < 0:
            direct = None
        cache = store.cache
        direct_write = direct if cache is None else None
        server.tick()
        last = len(frames) - 1
        for index in range(at, len(frames)):
            kind, _, seq, offset, length, payload = frames[index]
            if kind == READ:
                if offset + length > size or not 0 < length <= MAX_REQUEST or payload:
                    self._bad_range(frames[index])
                    continue
                try:
                    if direct is None:
                        data, crc = content.read_checked(offset, length)
                    elif cache is None or (cached := cache.read(offset, length)) is None:
                        if not direct.read(connection, fd, seq, offset, length):
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
                out.append(encode_header(READ | REPLY, 0, seq, offset, length, length, crc))
                out.append(data)
                self._unsent += HEADER_SIZE + length
                counters.reads += 1
                counters.read_bytes += length
                if self._unsent > MAX_UNSENT:
                    return index + 1
            elif kind == WRITE:
                if offset + length > size or not 0 < length <= MAX_REQUEST or len(payload) != length:
                    self._bad_range(frames[index])
                elif not regions.touch(offset >> REGION_SHIFT, (offset + length - 1) >> REGION_SHIFT, seq):
                    server.park(connection, frames[index])
                elif direct_write is not None:
                    if not direct_write.write(connection, fd, seq, offset, payload):
                        return index
                else:
                    try:
                        content.write(offset, payload)
                    except OSError as error:
                        self.io_error(frames[index], error)
                        continue
                    if self.gathers and last > at:
                        self.wrote(seq, length)
                    else:
                        out.append(encode_header(WRITE | REPLY, 0, seq, offset, length))
                        self._unsent += HEADER_SIZE
                        counters.writes += 1
                        counters.written_bytes += length
            elif kind == FLUSH:
                server.flush(connection, frames[index])
                self._together = bool(length)
            elif kind == UNMAP:
                if offset + length > size or not 0 < length <= MAX_REQUEST or payload:
                    self._bad_range(frames[index])
                elif not self._change(frames[index], direct):
                    return index
            elif kind == PING:
                self.reply(kind, 0, seq)
            elif kind == CONFIRM:
                server.confirm(connection, seq)
            elif kind == SETTLED:
                server.settled(connection, frames[index])
            elif kind == BITMAP:
                self._bitmap(frames[index])
            elif kind in CONTROL:
                return index
            elif kind == WRITE_LAYER and not layer_name(payload):
                if not self._fits_head(frames[index]):
                    self._bad_range(frames[index])
                elif not self._change(frames[index], direct):
                    return index
            elif kind in BACKGROUND:
                if kind in RANGED and (offset + length > size or not 0 < length <= MAX_REQUEST):
                    self._bad_range(frames[index])
                else:
                    cast("Server", server).snapshots.background(connection, frames[index])
                    if server.crowded():
                        return index + 1
            else:
                raise ProtocolError(f"unknown frame type {kind:#x}")
        return len(frames)

    def _change(self, frame: Frame, direct: Direct | None) -> bool:
        """An unmap, or what becomes one in part, within the volume; False: it has to be brought again later."""
        _, _, seq, offset, length, _ = frame
        server, connection = self.server, cast("Exchange", self)
        if not server.store.maps.touch(offset, length, seq):
            server.park(connection, frame)
        elif direct is None:
            self.apply(frame)
        else:
            return direct.unmap(connection, frame)
        return True

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
                layers = cast("Server", self.server).layers
                layers.write_head(frame)
                layers.wrote_head(frame)
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
        self._unsent += HEADER_SIZE + len(payload)
        if payload:
            self._out.append(payload)

    def queue(self, header: bytes, payload: bytes = b"") -> None:
        """The same for a reply that is encoded already."""
        self._out.append(header)
        self._unsent += HEADER_SIZE + len(payload)
        if payload:
            self._out.append(payload)

    def send_some(self) -> bool:
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
