from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ProtocolError
from engine.wire import messages
from engine.wire.frame import MAX_PAYLOAD
from engine.wire.layers import BLOCK, MAX_RANGE, decode_layer, encode_layer, layer_bytes, layer_name


def test_golden_bytes_of_a_layer() -> None:
    raw = encode_layer("a", [(4096, 8192)], b"\x01" * 8192)
    assert raw[:13].hex() == (
        "0100"  # bytes of the name
        "61"
        "0100"  # one extent
        "00100000"  # its offset
        "00200000"  # its length
    )
    assert raw[13:] == b"\x01" * 8192


def test_golden_bytes_of_a_rebuild() -> None:
    assert messages.encode(messages.ReadLayer(name="a")).hex() == "81a46e616d65a161"
    state = messages.RebuildState(snapshots={"a": messages.Filled(cursor=4096)}, head=7)
    assert messages.encode(state).hex() == ("82a9736e617073686f747381a16181a6637572736f72cd1000a46865616407")
    assert messages.encode(messages.BeginRebuild(snapshots=())).hex() == "81a9736e617073686f747390"


def test_the_worst_range_fits_in_a_frame() -> None:
    found = [(offset, BLOCK) for offset in range(0, MAX_RANGE, 2 * BLOCK)]
    assert len(encode_layer("n" * 128, found, bytes(len(found) * BLOCK))) <= MAX_PAYLOAD
    assert len(encode_layer("n" * 128, [(0, MAX_RANGE)], bytes(MAX_RANGE))) <= MAX_PAYLOAD


@given(st.text(max_size=40), st.sets(st.integers(0, 15)), st.randoms())
def test_what_is_encoded_is_decoded(name: str, blocks: set[int], rng: object) -> None:
    found = [(block * BLOCK, BLOCK) for block in sorted(blocks)]
    data = b"".join(bytes([block]) * BLOCK for block in sorted(blocks))
    raw = encode_layer(name, found, data)
    assert layer_name(raw) == name
    assert layer_bytes(raw) == len(data)
    extents, view = decode_layer(raw, 16 * BLOCK)
    assert (list(extents), bytes(view)) == (found, data)


@pytest.mark.parametrize(
    ("raw", "length"),
    [
        (b"", BLOCK),
        (b"\x05\x00ab", BLOCK),
        (b"\x01\x00\xff\x00\x00", BLOCK),
        (b"\x00\x00", BLOCK),
        (b"\x00\x00\x01\x00\x00", BLOCK),
        (encode_layer("", [(0, 7)], b"x" * 7), BLOCK),
        (encode_layer("", [(1, BLOCK)], bytes(BLOCK)), 2 * BLOCK),
        (encode_layer("", [(0, 0)], b""), BLOCK),
        (encode_layer("", [(0, BLOCK)], b""), BLOCK),
        (encode_layer("", [(0, BLOCK)], bytes(BLOCK + 1)), BLOCK),
        (encode_layer("", [(0, 2 * BLOCK)], bytes(2 * BLOCK)), BLOCK),
        (encode_layer("", [(BLOCK, BLOCK), (0, BLOCK)], bytes(2 * BLOCK)), 2 * BLOCK),
        (encode_layer("", [(0, BLOCK), (0, BLOCK)], bytes(2 * BLOCK)), 2 * BLOCK),
    ],
)
def test_nonsense_is_refused(raw: bytes, length: int) -> None:
    with pytest.raises(ProtocolError):
        decode_layer(raw, length)


@given(st.binary(max_size=64), st.integers(0, 1 << 20))
def test_any_bytes_are_decoded_or_refused(raw: bytes, length: int) -> None:
    try:
        found, data = decode_layer(raw, length)
    except ProtocolError:
        return
    assert sum(size for _, size in found) == len(data)
