from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import ops
from engine.buffers import BufferPool
from engine.controller import core
from engine.errors import ProtocolError
from engine.wire import frame
from engine.wire.frame import (
    BULK,
    HEADER_SIZE,
    MAX_PAYLOAD,
    REPLY,
    Frame,
    FrameReader,
    FrameType,
    Status,
    decode_written,
    encode_frame,
    encode_written,
)


def feed(reader: FrameReader, data: bytes) -> list[Frame]:
    out: list[Frame] = []
    view = memoryview(data)
    while view:
        space = reader.space()
        count = min(len(space), len(view))
        space[:count] = view[:count]
        reader.received(count)
        view = view[count:]
        out += reader.frames()
    return out


def assert_survives(reader: FrameReader, wanted: list[Frame], cuts: list[int]) -> None:
    """The frames come out of a stream that arrives in pieces of these lengths, over and over."""
    stream = b"".join(encode_frame(k, q, p, status=s, offset=o, length=n) for k, s, q, o, n, p in wanted)
    got: list[Frame] = []
    position = turn = 0
    while position < len(stream):
        step = cuts[turn % len(cuts)]
        got += feed(reader, stream[position : position + step])
        position += step
        turn += 1
    assert got == wanted
    assert not reader.partial


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=300))
def test_a_written_names_the_writes_that_it_answers(seqs: list[int]) -> None:
    header, body = encode_written(seqs)
    ((kind, status, seq, _, length, payload),) = feed(FrameReader(), header + body)
    assert (kind, status, seq, length) == (FrameType.WRITTEN | REPLY, 0, seqs[0], len(seqs))
    assert decode_written(payload) == seqs
    with pytest.raises(ProtocolError, match="WRITTEN of"):
        decode_written(payload[:-1])


def test_golden_bytes_of_a_write() -> None:
    data = encode_frame(FrameType.WRITE, 7, b"share-manager", offset=0x123456000, length=13)
    assert data.hex() == (
        "534d4631"  # magic, "SMF1"
        "0500"  # type
        "0000"  # status
        "0700000000000000"  # sequence number
        "0060452301000000"  # offset
        "0d000000"  # length
        "0d000000"  # payload size
        "371f780f"  # CRC-32C of the payload
        "7f2079ea"  # CRC-32C of the 36 bytes before
        "73686172652d6d616e61676572"
    )


def test_golden_bytes_of_an_empty_answer() -> None:
    data = encode_frame(FrameType.FLUSH | REPLY, 1, status=Status.STALE_EPOCH)
    assert data.hex() == "534d463106800100010000000000000000000000000000000000000000000000000000007593b14d"


def test_golden_bytes_of_a_confirm() -> None:
    data = encode_frame(FrameType.CONFIRM, 1 << 63 | 5)
    assert data.hex() == "534d46312800000005000000000000800000000000000000000000000000000000000000b003ab02"


def test_the_core_and_the_wire_agree_on_numbers() -> None:
    for name in ("READ", "WRITE", "FLUSH", "UNMAP"):
        assert getattr(ops, name) == FrameType[name]
    assert int(FrameType.WRITTEN) == frame.WRITTEN
    for name in ("PING", "SETTLED", "TRACK", "STATE", "READ_LAYER", "WRITE_LAYER"):
        assert getattr(core, name) == FrameType[name]
    for name in ("OK", "STALE_EPOCH", "NO_SPACE"):
        assert getattr(core, name) == Status[name]
    assert core.COPY not in FrameType._value2member_map_


frames = st.lists(
    st.tuples(
        st.integers(0, 0xFFFF),
        st.integers(0, 0xFFFF),
        st.integers(0, 2**64 - 1),
        st.integers(0, 2**64 - 1),
        st.integers(0, 2**32 - 1),
        st.binary(max_size=300),
    ),
    max_size=20,
)


@given(frames, st.lists(st.integers(1, 200), min_size=1))
def test_frames_survive_any_cutting(wanted: list[Frame], cuts: list[int]) -> None:
    assert_survives(FrameReader(), wanted, cuts)


sizes = st.lists(st.sampled_from([0, 1, 300, BULK - 1, BULK, BULK + 1, 2 * BULK, MAX_PAYLOAD]), max_size=8)
kinds = st.sampled_from([int(FrameType.WRITE), FrameType.READ | REPLY, int(FrameType.DIGEST)])


@settings(max_examples=60)
@given(sizes, st.lists(kinds, min_size=1), st.lists(st.integers(1, 3 * BULK), max_size=4), st.integers(0, 999))
def test_large_payloads_are_received_by_themselves_and_are_the_same(
    lengths: list[int], order: list[int], cuts: list[int], seed: int
) -> None:
    rng = Random(seed)
    cuts = [*cuts, 3 * BULK]
    wanted: list[Frame] = [
        (order[at % len(order)], 0, at, 0, length, rng.randbytes(length)) for at, length in enumerate(lengths)
    ]
    assert_survives(FrameReader(bulk=BufferPool(MAX_PAYLOAD, keep=2)), wanted, cuts)


def test_a_large_payload_stays_as_it_is_while_somebody_has_it() -> None:
    reader = FrameReader(bulk=BufferPool(MAX_PAYLOAD))
    frames = [encode_frame(FrameType.WRITE, seq, bytes([seq]) * BULK) for seq in range(1, 6)]
    kept = [feed(reader, part)[-1:] for frame in frames for part in (frame[:50], frame[50:])][1::2]
    for seq, (one,) in enumerate(kept, 1):
        assert isinstance(one[5], memoryview)
        assert one[5] == bytes([seq]) * BULK


def test_a_changed_byte_of_a_large_payload_is_noticed_and_half_of_one_is_partial() -> None:
    stream = bytearray(encode_frame(FrameType.WRITE, 1, bytes(BULK)))
    reader = FrameReader(bulk=BufferPool(MAX_PAYLOAD))
    assert feed(reader, bytes(stream[:100])) == []
    assert reader.partial
    stream[-1] ^= 1
    with pytest.raises(ProtocolError, match="payload checksum"):
        feed(reader, bytes(stream[100:]))


@given(st.binary(min_size=1, max_size=200), st.data())
def test_no_changed_byte_goes_unnoticed(payload: bytes, data: st.DataObject) -> None:
    stream = bytearray(encode_frame(FrameType.WRITE, 3, payload, offset=4096, length=len(payload)))
    position = data.draw(st.integers(0, len(stream) - 1))
    stream[position] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ProtocolError):
        feed(FrameReader(), bytes(stream))


@given(st.binary(min_size=HEADER_SIZE, max_size=400))
def test_noise_is_refused_and_nothing_else(noise: bytes) -> None:
    with pytest.raises(ProtocolError):
        feed(FrameReader(), noise)


def test_too_large_a_payload_is_refused_before_it_is_awaited() -> None:
    header = frame.encode_header(FrameType.WRITE, 0, 1, 0, 0, MAX_PAYLOAD + 1, 0)
    with pytest.raises(ProtocolError, match="payload of"):
        feed(FrameReader(), header)


def test_the_largest_frames_fill_the_buffer_again_and_again() -> None:
    payload = bytes(range(256)) * (MAX_PAYLOAD // 256)
    one = encode_frame(FrameType.WRITE, 1, payload)
    got = feed(FrameReader(), one * 12)
    assert len(got) == 12
    assert all(entry[5] == payload for entry in got)


def test_a_truncated_stream_is_known_to_be_partial() -> None:
    reader = FrameReader()
    assert feed(reader, encode_frame(FrameType.READ, 1)[:-1]) == []
    assert reader.partial
