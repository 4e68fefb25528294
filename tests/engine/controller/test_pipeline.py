from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from engine.controller.actions import Action
from engine.controller.core import Core
from engine.controller.pipeline import Pipeline
from engine.controller.stream import Stream
from engine.errors import ProtocolError
from engine.ops import WRITE, BlockRequest, Data
from engine.wire.frame import REPLY, Frame, FrameReader, FrameType, Status, encode_frame, encode_written

BLOCK = 4096
NAMES = ("r1", "r2")


class Asked(BlockRequest):
    def __init__(self, offset: int) -> None:
        super().__init__(WRITE, offset, BLOCK, bytes([offset // BLOCK]) * BLOCK)
        self.answers: list[tuple[int, Data]] = []

    def finish(self, error: int, data: Data) -> None:
        self.answers.append((error, data))


class Peer:
    """A replica that takes everything and answers what it is told to."""

    def __init__(self, bit: int) -> None:
        ours, self.sock = socket.socketpair()
        ours.setblocking(False)
        self.stream = Stream(bit, ours, FrameReader())
        self.odd: list[Frame] = []
        self.broken: list[Exception] = []
        self.stream.odd = self.odd.append
        self.stream.broken = self.broken.append
        self._reader = FrameReader()

    def received(self) -> list[Frame]:
        self._reader.received(self.sock.recv_into(self._reader.space()))
        return self._reader.frames()

    def close(self) -> None:
        self.stream.sock.close()
        self.sock.close()


class Setting:
    def __init__(self) -> None:
        self.actions: list[Action] = []
        self.stirred = 0
        self.pings: list[tuple[int, int]] = []
        core = Core(size=1 << 30, replicas=NAMES, in_sync=NAMES)
        core.begin(())
        self.pipeline = Pipeline(core, self.actions.append, self._stir, self._ping)
        self.peers = [Peer(core.bit(name)) for name in NAMES]
        for peer in self.peers:
            self.pipeline.connect(peer.stream)

    def _stir(self) -> None:
        self.stirred += 1

    def _ping(self, stream: Stream, seq: int, header: bytes) -> bool:
        self.pings.append((stream.bit, seq))
        return stream.bit == 1

    def write(self, *numbers: int) -> list[Asked]:
        asked = [Asked(number * BLOCK) for number in numbers]
        for one in asked:
            self.pipeline.submit(one)
        self.pipeline.drain()
        return asked

    def answer(self, peer: Peer, data: bytes) -> None:
        peer.sock.sendall(data)
        self.pipeline.readable(peer.stream)
        self.pipeline.drain()


@pytest.fixture
def setting() -> Iterator[Setting]:
    made = Setting()
    yield made
    for peer in made.peers:
        peer.close()


def test_writes_go_to_all_and_one_frame_answers_many(setting: Setting) -> None:
    first, second = setting.peers
    asked = setting.write(1, 2, 3)
    frames = first.received()
    assert frames == second.received()
    assert [(kind, offset, bytes(payload)) for kind, _, _, offset, _, payload in frames] == [
        (WRITE, one.offset, one.payload) for one in asked
    ]
    seqs = [frame[2] for frame in frames]
    setting.answer(first, b"".join(encode_written(seqs)))
    assert [one.answers for one in asked] == [[], [], []]
    setting.answer(second, b"".join(encode_written(seqs[:2])))
    setting.answer(second, encode_frame(WRITE | REPLY, seqs[2]))
    assert [one.answers for one in asked] == [[(0, b"")]] * 3
    assert setting.pipeline.operations[WRITE].count == 3
    assert setting.pipeline.operations[WRITE].bytes == 3 * BLOCK


def test_a_damaged_written_ends_the_connection_and_answers_nothing(setting: Setting) -> None:
    first, _ = setting.peers
    (asked,) = setting.write(1)
    seq = first.received()[0][2]
    setting.answer(first, encode_frame(FrameType.WRITTEN | REPLY, seq, seq.to_bytes(8, "little") + b"?"))
    assert [type(error) for error in first.broken] == [ProtocolError]
    assert asked.answers == []


def test_a_written_that_names_a_read_is_no_answer_to_it(setting: Setting) -> None:
    core = setting.pipeline.core
    core.submit(4, 0, BLOCK, b"", Asked(0))
    setting.pipeline.drain()
    (mask,) = (request.wait for request in core.inflight.values())
    peer = setting.peers[mask - 1]
    seq = peer.received()[0][2]
    setting.answer(peer, b"".join(encode_written([seq])))
    assert "answered a read" in core.reason(NAMES[mask - 1])


def test_what_is_no_plain_success_goes_to_the_owner(setting: Setting) -> None:
    first, _ = setting.peers
    setting.write(1)
    seq = first.received()[0][2]
    refused = encode_frame(WRITE | REPLY, seq, b"full", status=Status.NO_SPACE)
    call = encode_frame(FrameType.STATUS | REPLY, 1 << 63 | 1)
    setting.answer(first, refused + call + encode_frame(FrameType.PING, 5))
    assert [(frame[0], frame[1]) for frame in first.odd] == [
        (WRITE | REPLY, Status.NO_SPACE),
        (FrameType.STATUS | REPLY, 0),
        (FrameType.PING, 0),
    ]


def test_a_closed_connection_is_told(setting: Setting) -> None:
    first, _ = setting.peers
    first.sock.close()
    setting.pipeline.readable(first.stream)
    assert "closed" in str(first.broken[0])


def test_pings_go_another_way_where_there_is_one(setting: Setting) -> None:
    first, second = setting.peers
    for _ in range(9):
        setting.pipeline.core.tick(0.25)
    setting.pipeline.drain()
    assert {bit for bit, _ in setting.pings} == {1, 2}
    assert [frame[0] for frame in second.received()] == [FrameType.PING]
    first.sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        first.received()


def test_who_reads_nothing_is_sent_the_rest_later(setting: Setting) -> None:
    first, second = setting.peers
    asked = setting.write(*range(200))
    assert first.stream.blocked.is_set()
    seqs: list[int] = []
    for peer in (first, second):
        seqs = []
        while len(seqs) < len(asked):
            seqs += [frame[2] for frame in peer.received()]
            peer.stream.pump()
    assert len(set(seqs)) == len(asked)
