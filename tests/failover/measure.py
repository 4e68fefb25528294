"""What rounds of a row gave, what is asked of them, and how that is told. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Literal

import msgspec

Verdict = Literal["met", "median only", "missed", "no goal", "failed"]


class Goal(msgspec.Struct, frozen=True, kw_only=True):
    """The client's stall is to be below `seconds`: in each round, or in the median one only."""

    seconds: float
    of: Literal["worst", "median"] = "worst"


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of all rounds, in their order."""

    values: tuple[float, ...]
    median: float
    worst: float


class Measured(msgspec.Struct, kw_only=True):
    """Of one row. Seconds from the fault: `stall`, how long a client that appends and syncs under a lock stood still;
    `opened`, until another one could make a file; `locked`, until that one had a lock that was given back, or whose
    holder died. `refused`: names that were made and are refused when they are asked for once more, by operation.
    `problems`: what was lost or went wrong; there is none in a row that counts."""

    row: str
    what: str
    goal: Goal | None
    stall: list[float] = []
    opened: list[float] = []
    locked: list[float] = []
    refused: dict[str, int] = {}
    problems: list[str] = []

    @property
    def verdict(self) -> Verdict:
        if self.problems or not self.stall:
            return "failed"
        if self.goal is None:
            return "no goal"
        if max(self.stall) < self.goal.seconds:
            return "met"
        if statistics.median(self.stall) < self.goal.seconds:
            return "met" if self.goal.of == "median" else "median only"
        return "missed"


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """A row for programs."""

    row: str
    what: str
    rounds: int
    goal: Goal | None
    verdict: Verdict
    stall: Spread | None
    opened: Spread | None
    locked: Spread | None
    refused: dict[str, int]
    problems: list[str]


def spread(values: Sequence[float]) -> Spread | None:
    if not values:
        return None
    rounded = tuple(round(value, 3) for value in values)
    return Spread(values=rounded, median=round(statistics.median(values), 3), worst=max(rounded))


def told(measured: Measured) -> Told:
    return Told(
        row=measured.row,
        what=measured.what,
        rounds=len(measured.stall),
        goal=measured.goal,
        verdict=measured.verdict,
        stall=spread(measured.stall),
        opened=spread(measured.opened),
        locked=spread(measured.locked),
        refused=measured.refused,
        problems=measured.problems,
    )


def exit_status(rows: Sequence[Measured]) -> int:
    """0: every goal met; 3: nothing lost, but one missed; 1: something was lost or failed."""
    verdicts = {row.verdict for row in rows}
    if "failed" in verdicts:
        return 1
    return 3 if verdicts & {"missed", "median only"} else 0


def table(rows: Sequence[Measured]) -> list[str]:
    """Median and worst of each, in seconds."""
    heads = ("stall", "new open", "lock of another")
    head = f"{'':<58} {'rounds':>6}" + "".join(f" {name:>16}" for name in heads) + f" {'refused':>8}  goal"
    lines = [head]
    for row in rows:
        cells = "".join(f" {_cell(values):>16}" for values in (row.stall, row.opened, row.locked))
        goal = "" if row.goal is None else f"{row.goal.of} < {row.goal.seconds:g}: "
        lines.append(
            f"{row.what:<58} {len(row.stall):>6}{cells} {sum(row.refused.values()):>8}  {goal}{row.verdict}".rstrip()
        )
    for row in rows:
        lines += [f"{row.row}: {problem}" for problem in row.problems]
    return lines


def _cell(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} / {max(values):.2f}" if values else "-"
