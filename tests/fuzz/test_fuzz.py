"""A short look by hypothesis at what `python -m tests.fuzz` does for as long as wanted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.client import EngineClient, EngineUnreachableError
from engine.errors import FormatError, ProtocolError, RecordError
from engine.record import decode_record
from engine.store import create_replica
from engine.store.layout import inspect_replica
from engine.wire import messages
from engine.wire.frame import FrameType
from tests.fuzz import control, conversation, parsers
from tests.fuzz.conversation import KINDS
from tests.fuzz.targets import TARGETS

EXAMPLES = {
    "frames": 400,
    "messages": 600,
    "record": 400,
    "operation": 400,
    "directory": 150,
    "control": 80,
    "server": 100,
}
DEEP = b"\x81\xa1x" + b"\x91" * 5000 + b"\xc0"


def feed(target: Callable[[bytes], None], examples: int) -> None:
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.binary(min_size=1, max_size=256))
    def one(data: bytes) -> None:
        target(data)

    one()


@pytest.mark.parametrize("name", TARGETS)
def test_no_bytes_of_others_do_harm(name: str) -> None:
    with TARGETS[name]() as target:
        feed(target, EXAMPLES.get(name, 40))


@pytest.mark.parametrize("kind", parsers.MESSAGES, ids=lambda kind: kind.__name__)
def test_what_is_nested_deeply_or_no_text_is_no_message(kind: type[messages.Message]) -> None:
    for payload in (DEEP, b""):
        with pytest.raises(ProtocolError):
            messages.decode(payload, kind)
    with pytest.raises(ProtocolError):
        messages.decode(b"\x81\xa4name\xa1\xff", messages.ReadSnapshot)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ((b'"in_sync": [\n    "r1"\n  ]', b'"in_sync": []'), "at least one"),
        ((b'"in_sync": [\n    "r1"\n  ]', b'"in_sync": ["r9"]'), "'r9', which is no replica"),
        ((b'"name": "r2"', b'"name": "r1"'), "the same name"),
        ((b'"size": 1048576', b'"size": -1'), "size -1"),
        ((b'"vol1"', b'"vol\xff"'), "utf-8"),
        ((b'"format"', b'"x":' + b"[" * 5000), "recursion"),
    ],
)
def test_a_record_that_contradicts_itself_is_damaged(change: tuple[bytes, bytes], said: str) -> None:
    raw = parsers.RECORD.replace(*change)
    assert raw != parsers.RECORD
    with pytest.raises(RecordError, match=said):
        decode_record(raw, "/somewhere")


@pytest.mark.parametrize("name", ["volume.meta", "share-manager.json", "volume-head-000.img.meta"])
@pytest.mark.parametrize("content", [b"[" * 5000, b'{"Head":"\xff"}', b'{"format":1,"epoch":-1}', b"\0" * 100])
def test_metadata_that_is_damaged_is_said_to_be(tmp_path: Path, name: str, content: bytes) -> None:
    create_replica(tmp_path / "r1", volume="vol1", uuid=parsers.UUID, replica="r1", size=1 << 20)
    (tmp_path / "r1" / name).write_bytes(content)
    with pytest.raises(FormatError, match=f"{name} is damaged"):
        inspect_replica(tmp_path / "r1")


async def test_a_client_says_that_it_does_not_understand(tmp_path: Path) -> None:
    async def run(line: bytes) -> None:
        await control.hear(tmp_path / "sock", [line])

    for line in (control.NESTED, b"\xff\n", b"{}\n"):
        await run(line)
    with pytest.raises(EngineUnreachableError):
        await EngineClient(tmp_path / "nobody").status()


def test_a_target_notices_what_it_is_made_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutations of the product that each target is there to find."""
    monkeypatch.setattr("engine.wire.messages.UNDECODABLE", (ValueError,))
    with pytest.raises(RecursionError):
        feed(lambda data: parsers.message(bytes([data[0], 0]) + b"\xff" + data), 2000)
    monkeypatch.setattr("engine.replica.connection.check_proof", lambda *_: None)
    with conversation.server() as target, pytest.raises(conversation.DefectError):
        # the wrong key, then OPEN, WRITE
        target(bytes([1, 1, 1, KINDS.index(FrameType.OPEN), 0, 0, 1, 0, 1, 5, 1]))
