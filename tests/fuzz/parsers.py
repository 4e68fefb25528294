"""Everything that turns bytes of others into values, without sockets. A target that raises has found a defect."""

from __future__ import annotations

from engine.controller.core import Core
from engine.controller.handlers import decode as decode_operation
from engine.decoding import UNDECODABLE
from engine.errors import EngineError, ProtocolError
from engine.record import ReplicaRecord, VolumeRecord, decode_record, encode_record
from engine.wire import messages
from engine.wire.frame import HEADER_SIZE, MAX_PAYLOAD, Frame, FrameReader, encode_frame
from tests.fuzz.source import Source

MESSAGES: tuple[type[messages.Message], ...] = tuple(
    sorted(
        (kind for kind in vars(messages).values() if isinstance(kind, type) and issubclass(kind, messages.Message)),
        key=lambda kind: kind.__name__,
    )
)
UUID = "11111111-2222-3333-4444-555555555555"
RECORD = encode_record(
    VolumeRecord(
        volume="vol1",
        uuid=UUID,
        size=1 << 20,
        replicas=tuple(ReplicaRecord(name=n, address=f"unix:/run/{n}", directory=f"/srv/{n}") for n in ("r1", "r2")),
        in_sync=("r1",),
    )
)


def frames(data: bytes) -> None:
    """The stream of one peer: what comes out is what went in, and what is no frame is a ProtocolError."""
    source = Source(data)
    stream = b""
    while source.left and len(stream) < 4 * HEADER_SIZE + 4096:
        if source.chance(3):
            stream += source.noise()
        else:
            whole = encode_frame(
                source.number(2), source.number(8), source.noise(), offset=source.number(8), length=source.number(4)
            )
            stream += source.mutated(whole) if source.chance(2) else whole
    reader = FrameReader(HEADER_SIZE + MAX_PAYLOAD)
    found: list[Frame] = []
    step = 1 + len(stream) % 97
    try:
        for at in range(0, len(stream), step):
            piece = stream[at : at + step]
            reader.space()[: len(piece)] = piece
            reader.received(len(piece))
            found += reader.frames()
    except ProtocolError:
        pass
    again = b"".join(
        encode_frame(kind, seq, payload, status=status, offset=offset, length=length)
        for kind, status, seq, offset, length, payload in found
    )
    assert stream.startswith(again)


def message(data: bytes) -> None:
    source = Source(data)
    kind = source.choice(MESSAGES)
    payload = b"\x81\xa1x" + b"\x91" * 16 * source.number() + source.take(8) if source.chance(8) else data[1:]
    try:
        found = messages.decode(payload, kind)
    except ProtocolError:
        return
    assert messages.decode(messages.encode(found), kind) == found


def record(data: bytes) -> None:
    """The volume record: damaged, or one that an engine can be made of."""
    source = Source(data)
    raw = source.mutated(RECORD) if source.chance(2) else source.take(1 << 16)
    try:
        found = decode_record(raw, "somewhere")
    except EngineError:
        return
    Core(size=found.size, replicas=[replica.name for replica in found.replicas], in_sync=found.in_sync)


def operation(data: bytes) -> None:
    """A line of the control socket, at the engine. What it may raise is what engine/control.py answers."""
    source = Source(data)
    line = source.mutated(b'{"op":"snapshot_create","name":"s1"}\n') if source.chance(2) else source.take(1 << 16)
    try:
        decode_operation(source.choice(("snapshot_create", "status", "", "resize")), line)
    except (EngineError, *UNDECODABLE):
        pass
