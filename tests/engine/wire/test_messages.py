from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import AuthenticationError, ProtocolError, VersionError
from engine.wire import handshake, messages


def test_golden_bytes_of_an_open() -> None:
    message = messages.Open(volume_uuid="5f0c", epoch=7, incarnation=2)
    assert messages.encode(message).hex() == (
        "83ab766f6c756d655f75756964a435663063a565706f636807ab696e6361726e6174696f6e02"
    )


def test_golden_bytes_of_a_hello() -> None:
    message = messages.Hello(version_min=1, version_max=1, nonce=b"\x01\x02")
    assert messages.encode(message).hex() == (
        "83ab76657273696f6e5f6d696e01ab76657273696f6e5f6d617801a56e6f6e6365c4020102"
    )


def test_fields_of_a_later_release_are_ignored() -> None:
    later = msgspec.msgpack.encode({"volume_uuid": "u", "epoch": 1, "incarnation": 1, "invented_later": [1, 2]})
    assert messages.decode(later, messages.Open).epoch == 1


@given(st.binary(max_size=100))
def test_any_bytes_decode_or_are_a_protocol_error(noise: bytes) -> None:
    for kind in (messages.Hello, messages.Auth, messages.Open, messages.Track, messages.State, messages.Bitmap):
        try:
            messages.decode(noise, kind)
        except ProtocolError:
            continue


@pytest.mark.parametrize(
    ("theirs", "ours", "chosen"),
    [((1, 1), (1, 1), 1), ((1, 2), (1, 1), 1), ((1, 2), (2, 3), 2), ((1, 9), (1, 3), 3)],
)
def test_adjacent_releases_find_a_version(theirs: tuple[int, int], ours: tuple[int, int], chosen: int) -> None:
    hello = messages.Hello(version_min=theirs[0], version_max=theirs[1], nonce=b"")
    assert handshake.choose_version(hello, *ours) == chosen


@pytest.mark.parametrize(("theirs", "ours"), [((2, 3), (1, 1)), ((1, 1), (2, 2)), ((3, 2), (1, 9))])
def test_releases_too_far_apart_say_so(theirs: tuple[int, int], ours: tuple[int, int]) -> None:
    hello = messages.Hello(version_min=theirs[0], version_max=theirs[1], nonce=b"")
    with pytest.raises(VersionError, match="upgrade the older one"):
        handshake.choose_version(hello, *ours)


def test_a_proof_is_bound_to_key_role_version_and_both_nonces() -> None:
    base = (b"k" * 32, "client", 1, b"c" * 32, b"s" * 32)
    given_proof = handshake.proof(*base)
    handshake.check_proof(given_proof, handshake.proof(*base), "it")
    for i, other in enumerate((b"x" * 32, "replica", 2, b"d" * 32, b"t" * 32)):
        changed = list(base)
        changed[i] = other
        with pytest.raises(AuthenticationError):
            handshake.check_proof(given_proof, handshake.proof(*changed), "it")  # type: ignore[arg-type]
