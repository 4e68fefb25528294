"""Whether what was seen of a block is what a register could have shown.

A history is a list of eras, each the operations between one attachment of the volume and the next. Within an era the
block is an atomic register: every operation takes effect at one moment between its start and its end, and one whose
outcome is unknown at some moment before the era's end, or never. Between two eras everything above the replicas was
lost, and perhaps some replicas' caches: the block then holds what the last flush made durable, or any later value.

The search is exact: at each end of an operation, all orders of what is under way that explain it are followed
(Wing and Gong 1993, with Lowe's just-in-time linearisation).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

Value = int


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """Of one block; a flush is one of every block. `start` and `end` in nanoseconds; `end` is None when the outcome is
    unknown. `value` was written or read."""

    kind: Literal["read", "write", "flush"]
    start: int
    end: int | None
    value: Value = 0


class State(msgspec.Struct, frozen=True):
    """`value` now. `durable`: what a loss of all caches may leave, in the order of writing, `value` last.
    `done`: operations under way that have taken effect."""

    value: Value
    durable: tuple[Value, ...]
    done: frozenset[int] = frozenset()


class NotLinearizableError(Exception):
    """`operation` cannot be explained by any order."""

    def __init__(self, era: int, operation: Operation, possible: frozenset[Value]) -> None:
        super().__init__(era, operation, possible)
        self.era = era
        self.operation = operation
        self.possible = possible

    def __str__(self) -> str:
        return f"era {self.era}: {self.operation} cannot be; the block could hold {sorted(self.possible)}"


def check(eras: Sequence[Sequence[Operation]], initial: Value = 0) -> None:
    """Raises NotLinearizableError."""
    states = {State(initial, (initial,))}
    for number, operations in enumerate(eras):
        states = _after_crash(_Era(number, operations).run(states))


def _after_crash(states: Iterable[State]) -> set[State]:
    """The value that is found was the newest once, and what had come after it is gone."""
    return {
        State(value, state.durable[: position + 1]) for state in states for position, value in enumerate(state.durable)
    }


class _Era:
    def __init__(self, number: int, operations: Sequence[Operation]) -> None:
        self._number = number
        self._operations = [operation for operation in operations if operation.kind != "flush"]
        flushes = [
            operation.start for operation in operations if operation.kind == "flush" and operation.end is not None
        ]
        # what had ended before this moment is durable when the era ends
        self._flushed = max(flushes, default=None)
        self._open: set[int] = set()

    def run(self, states: set[State]) -> set[State]:
        if self._flushed is not None:
            states = {State(state.value, (state.value,)) for state in states}
        for _, ends, index in self._events():
            if not ends:
                self._open.add(index)
                continue
            explained = self._explain(states, index)
            if not explained:
                possible = frozenset(state.value for state in self._reachable(states))
                raise NotLinearizableError(self._number, self._operations[index], possible)
            self._open.remove(index)
            states = {State(state.value, state.durable, state.done - {index}) for state in explained}
        return self._reachable(states)

    def _events(self) -> list[tuple[int, bool, int]]:
        """Starts before ends of the same nanosecond. A read of unknown outcome says nothing."""
        events = []
        for index, operation in enumerate(self._operations):
            if operation.end is not None:
                events += [(operation.start, False, index), (operation.end, True, index)]
            elif operation.kind == "write":
                events.append((operation.start, False, index))
        return sorted(events)

    def _explain(self, states: set[State], index: int) -> set[State]:
        """The states in which operation `index` has taken effect, by way of any others that are under way."""
        explained: set[State] = set()
        seen = set(states)
        todo = list(states)
        while todo:
            state = todo.pop()
            if index in state.done:
                explained.add(state)
                continue
            new = [after for after in self._steps(state) if after not in seen]
            seen.update(new)
            todo += new
        return explained

    def _reachable(self, states: set[State]) -> set[State]:
        seen = set(states)
        todo = list(states)
        while todo:
            new = [after for after in self._steps(todo.pop()) if after not in seen]
            seen.update(new)
            todo += new
        return seen

    def _steps(self, state: State) -> Iterable[State]:
        for index in self._open - state.done:
            operation = self._operations[index]
            done = state.done | {index}
            if operation.kind == "write":
                covered = self._flushed is not None and operation.end is not None and operation.end < self._flushed
                durable = (operation.value,) if covered else (*state.durable, operation.value)
                yield State(operation.value, durable, done)
            elif operation.value == state.value:
                yield State(state.value, state.durable, done)
