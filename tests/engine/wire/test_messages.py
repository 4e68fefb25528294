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


def test_golden_bytes_of_what_the_right_to_serve_needs() -> None:
    reply = messages.OpenReply(
        size=8, region_size=4, dirty_regions=0, tracked=(), rebuilding=False, rebuild=False, origin="", older_age=1.5
    )
    assert messages.encode(reply).hex() == (
        "86a473697a6508ab726567696f6e5f73697a6504ad64697274795f726567696f6e7300a7747261636b656490aa72656275696c64696e67c2"
        "a96f6c6465725f616765cb3ff8000000000000"
    )
    assert messages.encode(messages.Close(kept=True)).hex() == "81a46b657074c3"
    assert messages.encode(messages.Close()).hex() == "80"


def test_golden_bytes_of_a_snapshot_and_its_list() -> None:
    message = messages.Snapshot(name="a", created="2024-05-06T07:08:09Z", user_created=False, labels={"k": "v"})
    assert messages.encode(message).hex() == (
        "84a46e616d65a161a763726561746564b4323032342d30352d30365430373a30383a30395aac757365725f63726561746564c2"
        "a66c6162656c7381a16ba176"
    )
    entry = messages.SnapshotEntry(
        name="a", parent="", created="", user_created=True, removed=False, live=True, children=1, size=8, allocated=4
    )
    assert messages.encode(messages.SnapshotsReply(snapshots=(entry,))).hex() == (
        "81a9736e617073686f74739189a46e616d65a161a6706172656e74a0a763726561746564a0ac757365725f63726561746564c3"
        "a772656d6f766564c2a46c697665c3a86368696c6472656e01a473697a6508a9616c6c6f636174656404"
    )


def test_golden_bytes_of_a_coalesce() -> None:
    assert (
        messages.encode(messages.Coalesce(name="a", budget=1 << 20)).hex() == "82a46e616d65a161a6627564676574ce00100000"
    )
    assert messages.encode(messages.CoalesceReply(done=False, copied=4096, left=0)).hex() == (
        "83a4646f6e65c2a6636f70696564cd1000a46c65667400"
    )
    assert messages.encode(messages.ReadSnapshot(name="a")).hex() == "81a46e616d65a161"


def test_fields_of_a_later_release_are_ignored() -> None:
    later = msgspec.msgpack.encode({"volume_uuid": "u", "epoch": 1, "incarnation": 1, "invented_later": [1, 2]})
    assert messages.decode(later, messages.Open).epoch == 1


@given(st.binary(max_size=100))
def test_any_bytes_decode_or_are_a_protocol_error(noise: bytes) -> None:
    kinds = [kind for kind in vars(messages).values() if isinstance(kind, type) and issubclass(kind, messages.Message)]
    assert len(kinds) > 15
    for kind in kinds:
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
