from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.store import index
from engine.store.index import CHUNK_BLOCKS, LayerIndex

LEVELS = 4
BLOCKS = st.integers(0, CHUNK_BLOCKS)
Change = Callable[[LayerIndex, dict[int, bytearray]], None]


def painted(number: int, at: int, end: int, level: int) -> Change:
    def change(kept: LayerIndex, model: dict[int, bytearray]) -> None:
        at_, end_ = min(at, end), max(at, end)
        if at_ == end_:
            return
        kept.paint(number, at_, end_ - at_, level)
        if number in model:
            model[number][at_:end_] = bytes((level,)) * (end_ - at_)

    return change


def put(number: int, at: int, level: int, other: int) -> Change:
    def change(kept: LayerIndex, model: dict[int, bytearray]) -> None:
        chunk = bytearray(bytes((level,)) * at + bytes((other,)) * (CHUNK_BLOCKS - at))
        model[number] = bytearray(chunk)
        assert kept.put(number, chunk) == model[number]

    return change


def lowered(number: int, count: int, level: int) -> Change:
    def change(kept: LayerIndex, model: dict[int, bytearray]) -> None:
        kept.lower(number, count, level)
        for block in range(count if number in model else 0):
            if model[number][block] == level + 1:
                model[number][block] = level

    return change


def renumbered(level: int) -> Change:
    def change(kept: LayerIndex, model: dict[int, bytearray]) -> None:
        table = bytes(value if value <= level else value - 1 for value in range(256))
        kept.renumber(table)
        for number, chunk in model.items():
            model[number] = chunk.translate(table)

    return change


def forgotten(number: int) -> Change:
    def change(kept: LayerIndex, model: dict[int, bytearray]) -> None:
        kept.forget(number)
        model.pop(number, None)

    return change


NUMBER, LEVEL = st.integers(0, 2), st.integers(0, LEVELS)
CHANGES = st.one_of(
    st.builds(painted, NUMBER, BLOCKS, BLOCKS, LEVEL),
    st.builds(put, NUMBER, BLOCKS, LEVEL, LEVEL),
    st.builds(lowered, NUMBER, BLOCKS, st.integers(1, LEVELS)),
    st.builds(renumbered, st.integers(1, LEVELS)),
    st.builds(forgotten, NUMBER),
)


@given(st.lists(CHANGES, max_size=20))
def test_it_holds_what_a_plain_table_would(changes: list[Change]) -> None:
    kept, model = LayerIndex(), dict[int, bytearray]()
    for change in changes:
        change(kept, model)
        assert {number: bytes(chunk) for number, chunk in kept.chunks.items()} == model
    mixed = sum(isinstance(chunk, bytearray) for chunk in kept.chunks.values())
    assert kept._mixed == mixed


def held(kept: LayerIndex) -> int:
    own = {id(chunk): sys.getsizeof(chunk) for chunk in kept.chunks.values()}
    return sum(own.values()) + sys.getsizeof(kept.chunks)


def test_memory_follows_what_is_written_in_pieces_and_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = LayerIndex()
    for number in range(20_000):  # 80 GiB that were never written, or at one go
        kept.put(number, bytearray(bytes((number % 3,)) * CHUNK_BLOCKS))
    assert held(kept) < 20_000 * 100
    for number in range(20_000):
        kept.paint(number, 5, 1, 9)
        kept.put(30_000 + number, bytearray(CHUNK_BLOCKS - 1) + b"\1")
    assert held(kept) < index.MAX_MIXED * 1100 + 40_000 * 100
    monkeypatch.setattr(index, "MAX_CHUNKS", 1000)
    kept.put(1, bytearray(CHUNK_BLOCKS))
    for number in range(5000):
        kept.put(number, bytearray(CHUNK_BLOCKS))
    assert len(kept.chunks) <= 20_000
