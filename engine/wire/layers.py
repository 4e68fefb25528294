"""What one image of a chain holds in a range: its extents there, and their data (docs/wire-protocol.md).

Payload of a READ_LAYER answer and of a WRITE_LAYER request, little-endian:

    name size u16 | name | count u16 | count * (offset u32, length u32) | data

The offsets count from the start of the range. An empty name is the head. The data follows in the order of the extents,
which are whole blocks of 4 KiB, ascending and apart.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from engine.errors import ProtocolError
from engine.wire.frame import Buffer

BLOCK = 4096
# what a frame carries beside the largest range, in which every other block is data
MAX_RANGE = 1 << 20

_COUNT = struct.Struct("<H")
_EXTENT = struct.Struct("<II")

Extents = Sequence[tuple[int, int]]


def encode_layer(name: str, extents: Extents, data: Buffer) -> bytes:
    """`extents` are (offset in the range, length)."""
    raw = name.encode()
    parts: list[Buffer] = [_COUNT.pack(len(raw)), raw, _COUNT.pack(len(extents))]
    parts += [_EXTENT.pack(*extent) for extent in extents]
    parts.append(data)
    return b"".join(parts)


def layer_name(payload: bytes) -> str:
    """Empty for the head. Raises ProtocolError."""
    if len(payload) >= _COUNT.size:
        end = _COUNT.size + _COUNT.unpack_from(payload)[0]
        if len(payload) >= end:
            try:
                return payload[_COUNT.size : end].decode()
            except UnicodeDecodeError:
                pass
    raise ProtocolError("malformed layer data: no name")


def decode_layer(payload: bytes, length: int) -> tuple[Extents, memoryview]:
    """The extents in a range of `length` bytes, and the data of all. Raises ProtocolError."""
    at = _COUNT.size + len(layer_name(payload).encode())
    try:
        count = _COUNT.unpack_from(payload, at)[0]
        extents = [_EXTENT.unpack_from(payload, at + _COUNT.size + i * _EXTENT.size) for i in range(count)]
    except struct.error:
        raise ProtocolError("malformed layer data: it ends within the extents") from None
    end = total = 0
    for start, size in extents:
        if start < end or not size or start % BLOCK or size % BLOCK:
            raise ProtocolError(f"malformed layer data: extent {start}+{size} behind {end}")
        end = start + size
        total += size
    data = memoryview(payload)[at + _COUNT.size + count * _EXTENT.size :]
    if end > length or len(data) != total:
        raise ProtocolError(f"malformed layer data: extents up to {end} of {total} bytes, {len(data)} bytes of data")
    return extents, data


def layer_bytes(payload: bytes) -> int:
    """Bytes of data. Raises ProtocolError."""
    return len(decode_layer(payload, MAX_RANGE)[1])
