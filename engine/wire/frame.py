"""Frames of the data connection between engine and replica: fixed header, checksummed header and payload.

Layout (little-endian, 40 bytes; docs/wire-protocol.md):

    magic u32 | type u16 | status u16 | seq u64 | offset u64 | length u32
    | payload size u32 | payload crc u32 | header crc u32

Checksums are CRC-32C (RFC 3720, appendix B.4). The header's own covers its first 36 bytes, so a damaged length is
found before anything waits for that many bytes.
"""

from __future__ import annotations

import mmap
import struct
from enum import IntEnum
from typing import Any, Final

from crc32c import crc32c

from engine.buffers import BufferPool
from engine.errors import ProtocolError

MAGIC: Final = 0x31464D53
MAX_PAYLOAD: Final = (1 << 20) + 4096
REPLY: Final = 0x8000
WRITTEN: Final = 42

HEADER = struct.Struct("<IHHQQIIII")
HEADER_SIZE = HEADER.size
_PREFIX = struct.Struct("<IHHQQIII")
_CRC = struct.Struct("<I")
_PREFIX_SIZE = _PREFIX.size

Buffer = bytes | bytearray | memoryview


class FrameType(IntEnum):
    HELLO = 1
    AUTH = 2
    OPEN = 3
    READ = 4
    WRITE = 5
    FLUSH = 6
    UNMAP = 7
    PING = 8
    STATUS = 9
    SETTLED = 10
    TRACK = 11
    BITMAP = 12
    STATE = 13
    CLOSE = 14
    SNAPSHOT = 20
    SNAPSHOTS = 21
    REVERT = 22
    REMOVE_SNAPSHOT = 23
    COALESCE = 24
    READ_SNAPSHOT = 25
    READ_LAYER = 26
    WRITE_LAYER = 27
    BEGIN_REBUILD = 28
    REBUILD_STATE = 29
    RESIZE = 30
    DIGEST = 32
    MEND = 33
    PULL = 36
    CONFIRM = 40
    WATCH = 41
    WRITTEN = 42


class Status(IntEnum):
    OK = 0
    STALE_EPOCH = 1
    NOT_OPEN = 2
    IO_ERROR = 3
    NO_SPACE = 4
    BAD_REQUEST = 5
    OUT_OF_RANGE = 6
    UNAUTHENTICATED = 7
    UNSUPPORTED_VERSION = 8
    WRONG_VOLUME = 9
    EXISTS = 10
    NOT_FOUND = 11
    IN_USE = 12
    CORRUPT = 13


# (type, status, seq, offset, length, payload); a large payload of data may be a view, if the reader was given buffers:
# it can be summed, sent, written, sliced and compared like bytes, and is nothing else's business
Frame = tuple[int, int, int, int, int, Any]

# payloads that are worth a buffer of their own
BULK = 64 << 10
_BULK_KINDS = frozenset({int(FrameType.WRITE), FrameType.READ | REPLY})


def encode_header(
    kind: int, status: int, seq: int, offset: int, length: int, payload_size: int = 0, payload_crc: int = 0
) -> bytes:
    """Header of a frame whose payload (of `payload_size` bytes) is sent right behind it.

    `payload_crc` is passed in so that a payload that goes to several replicas is summed once.
    """
    prefix = _PREFIX.pack(MAGIC, kind, status, seq, offset, length, payload_size, payload_crc)
    return prefix + _CRC.pack(crc32c(prefix))


def encode_frame(
    kind: int, seq: int, payload: bytes = b"", *, status: int = 0, offset: int = 0, length: int = 0
) -> bytes:
    """A whole frame in one piece, for the frames that are small and rare."""
    crc = crc32c(payload) if payload else 0
    return encode_header(kind, status, seq, offset, length, len(payload), crc) + payload


_SEQ = struct.Struct("<Q")


def encode_written(seqs: list[int]) -> tuple[bytes, bytes]:
    """Header and payload of the answer to several WRITEs at once."""
    body = struct.pack(f"<{len(seqs)}Q", *seqs)
    return encode_header(WRITTEN | REPLY, 0, seqs[0], 0, len(seqs), len(body), crc32c(body)), body


def decode_written(payload: Any) -> list[int]:
    """The sequence numbers of a WRITTEN's payload. Raises ProtocolError."""
    if len(payload) % _SEQ.size:
        raise ProtocolError(f"a WRITTEN of {len(payload)} bytes")
    return [seq for (seq,) in _SEQ.iter_unpack(payload)]


class FrameReader:
    """Cuts a byte stream into frames; sans-IO, many frames per wake-up.

    Receive into `space()`, report with `received(n)`, then take whole frames with `frames()`. Once it has raised
    ProtocolError the stream is unusable: close the connection.

    With `bulk` a large payload of data is received where it stays: it is a view of a buffer of its own then, and not a
    copy. Such frames mostly come one behind the other, so behind one of them no more than a header is asked for.
    """

    def __init__(self, capacity: int = 4 * MAX_PAYLOAD, bulk: BufferPool | None = None) -> None:
        """The buffers of `bulk` have room for MAX_PAYLOAD."""
        if capacity < HEADER_SIZE + MAX_PAYLOAD:
            raise ValueError(f"capacity {capacity} cannot hold a frame")
        # anonymous pages cost nothing until bytes arrive
        self._buffer = mmap.mmap(-1, capacity, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._view = memoryview(self._buffer)
        self._start = 0
        self._end = 0
        self._pool = bulk
        # the frame whose payload is being received by itself: its header, the payload's room, how much is there
        self._header: tuple[int, int, int, int, int, int] | None = None
        self._payload = self._view[:0]
        self._filled = 0
        self._after_bulk = False

    def space(self) -> memoryview:
        """Where the next bytes go; never empty after `frames()` was drained."""
        if self._header is not None:
            return self._payload[self._filled :]
        if self._start == self._end:
            self._start = self._end = 0
            if self._after_bulk:
                return self._view[:HEADER_SIZE]
        elif len(self._buffer) - self._end < HEADER_SIZE + MAX_PAYLOAD:
            rest = bytes(self._view[self._start : self._end])
            self._view[: len(rest)] = rest
            self._start, self._end = 0, len(rest)
        return self._view[self._end :]

    def received(self, count: int) -> None:
        if self._header is None:
            self._end += count
        else:
            self._filled += count

    @property
    def partial(self) -> bool:
        """Whether the stream stopped inside a frame."""
        return self._start != self._end or self._header is not None

    def frames(self) -> list[Frame]:
        """All whole frames received so far. Raises ProtocolError."""
        out: list[Frame] = []
        if self._header is not None:
            if self._filled < len(self._payload):
                return out
            out.append(self._finish_bulk(self._header))
        view, buffer, start, end = self._view, self._buffer, self._start, self._end
        unpack = HEADER.unpack_from
        while end - start >= HEADER_SIZE:
            magic, kind, status, seq, offset, length, size, payload_crc, header_crc = unpack(buffer, start)
            if magic != MAGIC:
                raise ProtocolError(f"bad magic {magic:#010x}")
            if crc32c(view[start : start + _PREFIX_SIZE]) != header_crc:
                raise ProtocolError("header checksum mismatch")
            if size > MAX_PAYLOAD:
                raise ProtocolError(f"payload of {size} bytes, at most {MAX_PAYLOAD} allowed")
            body = start + HEADER_SIZE
            if end - body < size:
                if size >= BULK and self._pool is not None and kind in _BULK_KINDS:
                    self._header = kind, status, seq, offset, length, payload_crc
                    self._payload = self._pool.take()[:size]
                    self._filled = end - body
                    self._payload[: self._filled] = view[body:end]
                    start = end
                break
            payload = bytes(view[body : body + size]) if size else b""
            if (crc32c(payload) if size else 0) != payload_crc:
                raise ProtocolError(f"payload checksum mismatch in frame type {kind:#x} seq {seq}")
            out.append((kind, status, seq, offset, length, payload))
            self._after_bulk = False
            start = body + size
        self._start, self._end = start, end
        return out

    def _finish_bulk(self, header: tuple[int, int, int, int, int, int]) -> Frame:
        kind, status, seq, offset, length, payload_crc = header
        payload, self._payload, self._header = self._payload, self._view[:0], None
        if crc32c(payload) != payload_crc:
            raise ProtocolError(f"payload checksum mismatch in frame type {kind:#x} seq {seq}")
        self._after_bulk = True
        return kind, status, seq, offset, length, payload
