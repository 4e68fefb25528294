"""Lies that once stopped an engine, or would have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from engine.wire import messages
from engine.wire.frame import REPLY, Frame, FrameType, Status, encode_frame
from tests.fuzz.hostile import Liar, life
from tests.fuzz.source import Source

Lie = Callable[[Frame], bytes | None]


class Scripted(Liar):
    """Lies about answers of one type. The lie returns what is sent instead, None for the truth, nothing as `b""`."""

    def __init__(self, path: Path, behind: Path, kind: FrameType, lie: Lie) -> None:
        super().__init__(path, behind, Source(b""))
        self.kind = kind
        self.lie = lie

    def answers(self, frame: Frame) -> Iterator[bytes]:
        said = self.lie(frame) if frame[0] == self.kind | REPLY else None
        if said is None:
            yield from super().answers(frame)
        else:
            self.lies += 1
            yield said


def opened(**changes: object) -> Lie:
    def lie(frame: Frame) -> bytes:
        reply = msgspec.structs.replace(messages.decode(frame[5], messages.OpenReply), **changes)
        return encode_frame(frame[0], frame[2], messages.encode(reply))

    return lie


def stale(frame: Frame) -> bytes:
    token = messages.encode(messages.Token(epoch=0, incarnation=1))
    return encode_frame(frame[0], frame[2], token, status=Status.STALE_EPOCH)


LIES: dict[str, tuple[FrameType, Lie]] = {
    "no regions": (FrameType.OPEN, opened(region_size=0)),
    "regions of another size": (FrameType.OPEN, opened(region_size=4096)),
    "regions that no request can copy": (FrameType.OPEN, opened(region_size=1 << 40)),
    "opens and is stale": (FrameType.OPEN, stale),
    "writes and is stale": (FrameType.WRITE, stale),
    "nothing": (FrameType.OPEN, lambda frame: b""),
    "nested": (FrameType.HELLO, lambda frame: encode_frame(frame[0], frame[2], b"\x81\xa1x" + b"\x91" * 5000)),
    "no snapshots": (FrameType.SNAPSHOTS, lambda frame: encode_frame(frame[0], frame[2], b"\x80")),
    "no text": (FrameType.AUTH, lambda frame: encode_frame(frame[0], frame[2], b"\x81\xa7replica\xa1\xff")),
}


@pytest.mark.parametrize("name", LIES)
async def test_a_replica_that_lies_costs_only_itself(tmp_path: Path, name: str) -> None:
    liar = await life(tmp_path, lambda at, real: Scripted(at, real, *LIES[name]))
    assert liar.lies > 0


@pytest.mark.parametrize("said", [None, b"", b"\xff" * 4096], ids=["nothing", "no map", "more than there is"])
async def test_a_map_that_cannot_be_costs_only_its_replica(tmp_path: Path, said: bytes | None) -> None:
    class Dirty(Scripted):
        def answers(self, frame: Frame) -> Iterator[bytes]:
            if frame[0] == FrameType.OPEN | REPLY:
                yield opened(dirty_regions=1)(frame) or b""
            else:
                yield from super().answers(frame)

    def lie(frame: Frame) -> bytes:
        return b"" if said is None else encode_frame(frame[0], frame[2], said, length=len(said))

    liar = await life(tmp_path, lambda at, real: Dirty(at, real, FrameType.BITMAP, lie))
    assert liar.lies > 0
