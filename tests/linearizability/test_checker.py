"""The checker: it agrees with trying every order, accepts what a register did, and rejects known bad histories."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.linearizability.checker import NotLinearizableError, Operation, check


def read(value: int, start: int, end: int | None) -> Operation:
    return Operation(kind="read", value=value, start=start, end=end)


def write(value: int, start: int, end: int | None) -> Operation:
    return Operation(kind="write", value=value, start=start, end=end)


def flush(start: int, end: int | None) -> Operation:
    return Operation(kind="flush", start=start, end=end)


def fits(eras: Sequence[Sequence[Operation]]) -> bool:
    try:
        check(eras)
    except NotLinearizableError:
        return False
    return True


@pytest.mark.parametrize(
    "eras",
    [
        pytest.param([[write(1, 0, 1), read(0, 2, 3)]], id="an acknowledged write is not read"),
        pytest.param([[read(7, 0, 1)]], id="a value that nobody wrote"),
        pytest.param([[read(1, 0, 1), write(1, 2, 3)]], id="a value from the future"),
        pytest.param([[write(1, 0, 1), write(2, 2, 3), read(1, 4, 5)]], id="a value that was overwritten"),
        pytest.param([[write(1, 0, 9), read(1, 1, 2), read(0, 3, 4)]], id="a second read goes back in time"),
        pytest.param(
            [[write(1, 0, 9), write(2, 0, 9), read(1, 10, 11), read(2, 12, 13)]], id="two orders of two writes"
        ),
        pytest.param([[write(1, 0, None), read(1, 1, 2), read(0, 3, 4)]], id="an unknown write is taken back"),
        pytest.param([[write(1, 0, 1), flush(2, 3)], [read(0, 4, 5)]], id="a flushed write is lost in a crash"),
        pytest.param([[write(1, 0, 1)], [read(0, 2, 3), read(1, 4, 5)]], id="a lost write comes back"),
        pytest.param([[], [write(1, 0, 1), flush(2, 3)], [], [read(0, 4, 5)]], id="flushed two crashes ago"),
        pytest.param(
            [[write(1, 0, 1)], [read(1, 2, 3), flush(4, 5)], [read(0, 6, 7)]], id="what a crash left, then flushed"
        ),
        pytest.param([[read(0, 0, 1)], [read(1, 2, 3)], [write(1, 4, 5)]], id="written in a later era"),
        pytest.param([[write(1, 0, None)], [write(2, 2, 3), read(1, 4, 5)]], id="an unknown write after its era"),
        pytest.param([[write(1, 0, 1), read(-1, 2, 3)]], id="a torn block"),
    ],
)
def test_a_known_bad_history_is_rejected(eras: list[list[Operation]]) -> None:
    with pytest.raises(NotLinearizableError):
        check(eras)


@pytest.mark.parametrize(
    "eras",
    [
        pytest.param([[write(1, 0, 3), read(0, 1, 2)]], id="read before a write that is under way"),
        pytest.param([[write(1, 0, 9), write(2, 0, 9), read(2, 10, 11)]], id="two writes in either order"),
        pytest.param([[write(1, 0, None), read(0, 1, 2), read(1, 3, 4)]], id="an unknown write takes effect late"),
        pytest.param([[write(1, 0, None), read(0, 1, 2)]], id="an unknown write never takes effect"),
        pytest.param([[write(1, 0, 1)], [read(0, 2, 3)]], id="a write that was not flushed is lost in a crash"),
        pytest.param([[write(1, 0, 1), flush(0, 3)], [read(0, 4, 5)]], id="a flush that began before the write ended"),
        pytest.param([[write(1, 0, 1), flush(2, None)], [read(0, 4, 5)]], id="a flush that was not answered"),
        pytest.param([[write(1, 0, 1)], [read(1, 2, 3)], [read(0, 4, 5)]], id="kept in one crash, lost in the next"),
        pytest.param([[write(1, 0, None)], [read(1, 2, 3)]], id="an unknown write is there after the crash"),
    ],
)
def test_what_is_allowed_is_accepted(eras: list[list[Operation]]) -> None:
    check(eras)


def orders(operations: Sequence[Operation]) -> Iterator[tuple[Operation, ...]]:
    """Every choice of unknown writes, in every order that respects time."""
    known = [operation for operation in operations if operation.kind != "flush" and operation.end is not None]
    unknown = [operation for operation in operations if operation.kind == "write" and operation.end is None]
    for count in range(len(unknown) + 1):
        for chosen in combinations(unknown, count):
            for order in permutations([*known, *chosen]):
                if not any(
                    later.end is not None and later.end < earlier.start
                    for i, earlier in enumerate(order)
                    for later in order[i + 1 :]
                ):
                    yield order


def by_force(eras: Sequence[Sequence[Operation]], past: tuple[int, ...] = (0,)) -> bool:
    """`past` are the values that the block may still go back to, the present one last."""
    if not eras:
        return True
    first, *rest = eras
    flushed = max((each.start for each in first if each.kind == "flush" and each.end is not None), default=None)
    for order in orders(first):
        values = list(past)
        floor = len(past) - 1 if flushed is not None else 0
        for operation in order:
            if operation.kind == "read" and operation.value != values[-1]:
                break
            if operation.kind == "write":
                values.append(operation.value)
                if flushed is not None and operation.end is not None and operation.end < flushed:
                    floor = len(values) - 1
        else:
            kept = values[floor:]
            if any(by_force(rest, tuple(kept[: i + 1])) for i in range(len(kept))):
                return True
    return False


@st.composite
def anything(draw: st.DrawFn) -> list[list[Operation]]:
    """A few operations that a register may or may not have done; written values are unique."""
    eras: list[list[Operation]] = []
    value = 0
    for _ in range(draw(st.integers(1, 3))):
        era = []
        for _ in range(draw(st.integers(0, 4))):
            kind = draw(st.sampled_from(["read", "write", "flush"]))
            start = draw(st.integers(0, 7))
            end = start + draw(st.integers(1, 5)) if draw(st.integers(0, 4)) else None
            value += kind == "write"
            number = value if kind == "write" else draw(st.integers(0, 3))
            era.append(Operation(kind=kind, start=start, end=end, value=number))  # type: ignore[arg-type]
        eras.append(era)
    return eras


@settings(max_examples=400, deadline=None)
@given(anything())
def test_it_agrees_with_trying_every_order(eras: list[list[Operation]]) -> None:
    assert fits(eras) == by_force(eras)


@dataclass
class UnderWay:
    kind: Literal["read", "write", "flush"]
    start: int
    value: int
    happened: bool = False
    floor: int = 0
    """For a flush: how much of what is volatile it will have made durable."""


@st.composite
def lived(draw: st.DrawFn) -> list[list[Operation]]:
    """What several clients of a real register with a cache saw, crashes included."""
    eras = []
    value = clock = 0
    volatile = [0]
    for _ in range(draw(st.integers(1, 3))):
        era: list[Operation] = []
        under_way: list[UnderWay] = []
        for _ in range(draw(st.integers(0, 60))):
            clock += 1
            choice = draw(st.integers(0, 2))
            if choice == 0 and len(under_way) < 5:
                value += 1
                kind = draw(st.sampled_from(["read", "write", "flush"]))
                under_way.append(UnderWay(kind, clock, value, floor=len(volatile) - 1))  # type: ignore[arg-type]
            elif choice == 1 and under_way:
                one = draw(st.sampled_from(under_way))
                if one.kind == "write" and not one.happened:
                    volatile.append(one.value)
                elif one.kind == "read":
                    one.value = one.value if one.happened else volatile[-1]
                one.happened = True
            elif under_way:
                one = draw(st.sampled_from(under_way))
                if one.happened:
                    under_way.remove(one)
                    era.append(Operation(kind=one.kind, start=one.start, end=clock, value=one.value))
                    if one.kind == "flush":
                        for other in under_way:
                            other.floor = max(0, other.floor - one.floor)
                        del volatile[: one.floor]
        era += [Operation(kind=one.kind, start=one.start, end=None, value=one.value) for one in under_way]
        eras.append(era)
        volatile = volatile[: 1 + draw(st.integers(0, len(volatile) - 1))]
    return eras


@settings(max_examples=60, deadline=None)
@given(lived())
def test_whatever_a_register_does_is_accepted(eras: list[list[Operation]]) -> None:
    check(eras)


@settings(max_examples=60, deadline=None)
@given(lived(), st.data())
def test_a_read_of_what_was_never_written_is_found_in_any_history(
    eras: list[list[Operation]], data: st.DataObject
) -> None:
    places = [
        (i, j)
        for i, era in enumerate(eras)
        for j, operation in enumerate(era)
        if operation.kind == "read" and operation.end is not None
    ]
    if places:
        i, j = data.draw(st.sampled_from(places))
        old = eras[i][j]
        eras[i][j] = read(10**9, old.start, old.end)
        assert not fits(eras)
