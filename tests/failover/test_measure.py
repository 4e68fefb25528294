"""What a table says of rounds, and when it counts as met."""

from __future__ import annotations

import pytest

from tests.failover.measure import Goal, Measured, Verdict, exit_status, table, told
from tests.failover.nodes import acknowledged_by_both
from tests.lab.workloads.appender import Gap, Outcome


def measured(*stall: float, goal: Goal | None = None, problems: tuple[str, ...] = ()) -> Measured:
    return Measured(row="power", what="node's power cut", goal=goal, stall=list(stall), problems=list(problems))


@pytest.mark.parametrize(
    ("row", "verdict", "status"),
    [
        (measured(1.0, 2.0, 3.0), "no goal", 0),
        (measured(1.0, 2.0, 2.9, goal=Goal(seconds=3)), "met", 0),
        (measured(1.0, 2.0, 3.0, goal=Goal(seconds=3)), "median only", 3),
        (measured(0.5, 0.9, 6.0, goal=Goal(seconds=1, of="median")), "met", 0),
        (measured(1.0, 3.0, 3.0, goal=Goal(seconds=3)), "missed", 3),
        (measured(1.0, goal=Goal(seconds=3), problems=("EIO",)), "failed", 1),
        (measured(goal=Goal(seconds=3)), "failed", 1),
    ],
)
def test_a_goal_is_met_or_it_is_not(row: Measured, verdict: Verdict, status: int) -> None:
    assert row.verdict == verdict
    assert exit_status([measured(1.0), row]) == status
    assert any(verdict in line for line in table([row]))


def test_what_was_lost_outweighs_a_goal_that_was_missed() -> None:
    assert exit_status([measured(9.0, goal=Goal(seconds=3)), measured(1.0, problems=("lost",))]) == 1


def test_programs_get_every_round() -> None:
    row = told(measured(3.0, 1.0, 2.0))
    assert row.stall is not None
    assert (row.rounds, row.stall.values, row.stall.median, row.stall.worst) == (3, (3.0, 1.0, 2.0), 2.0, 3.0)
    assert row.opened is None


def outcome(*gaps: tuple[float, float]) -> Outcome:
    found = [Gap(start=start, end=end, sequence=1) for start, end in gaps]
    return {"acknowledged": 9, "gaps": found, "errors": [], "median_ms": 1.0, "seconds": 60.0}


@pytest.mark.parametrize(
    ("old", "new", "complaints"),
    [
        # cut off at 100, joined at 120; the new side serves from 105 on
        ([(100.2, 124.0)], [(100.1, 105.0)], 0),
        ([(103.0, 124.0)], [(100.1, 105.0)], 0),
        ([(106.0, 124.0)], [(100.1, 105.0)], 1),
        ([(100.2, 110.0)], [(100.1, 105.0)], 1),
        ([(100.2, 110.0), (111.0, 124.0)], [(100.1, 105.0)], 1),
        ([], [(100.1, 105.0)], 1),
        ([(100.2, 124.0)], [], 1),
    ],
)
def test_acknowledgements_on_both_sides_of_a_partition_are_noticed(
    old: list[tuple[float, float]], new: list[tuple[float, float]], complaints: int
) -> None:
    assert len(acknowledged_by_both(100.0, 120.0, outcome(*old), outcome(*new)["gaps"])) == complaints
