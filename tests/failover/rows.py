"""The rows of the table: what is done, and how long a client may stand still for it."""

from __future__ import annotations

import contextlib
import io
import traceback
from collections.abc import Callable
from functools import partial

import msgspec

from tests.failover import nodes, served, vault
from tests.failover.ground import Ground
from tests.failover.measure import Goal, Measured

Run = Callable[[Ground, int, Measured], None]


class Row(msgspec.Struct, frozen=True):
    name: str
    what: str
    run: Run
    goal: Goal | None = None


ROWS = (
    Row(
        "ganesha", "ganesha killed, behind a gate", partial(served.kill, victim="ganesha"), Goal(seconds=1, of="median")
    ),
    Row("engine", "engine killed, replaced in place", partial(served.kill, victim="engine"), Goal(seconds=1)),
    Row("manager", "share manager killed, standby", partial(nodes.change, kind=nodes.MANAGER), Goal(seconds=3)),
    Row("manager-restart", "share manager killed, started again", nodes.restart_manager, Goal(seconds=3)),
    Row("everything", "all processes of the node killed, standby", partial(nodes.change, kind=nodes.EVERYTHING)),
    Row("power", "node's power cut, warm standby", partial(nodes.change, kind=nodes.POWER), Goal(seconds=5)),
    Row("power-cold", "node's power cut, no standby", partial(nodes.change, kind=nodes.POWER_COLD), Goal(seconds=8)),
    Row("partition", "serving node's network cut", nodes.partition, Goal(seconds=12)),
    Row("move", "planned move", partial(nodes.change, kind=nodes.MOVE), Goal(seconds=2)),
    Row("encrypted", "engine killed, encrypted, no resend (UML)", vault.kill_engine, Goal(seconds=3)),
    Row("ganesha-client", "ganesha killed, a client dies with it", partial(served.kill, victim="ganesha", dies=True)),
    Row("power-client", "node's power cut, a client dies with it", partial(nodes.change, kind=nodes.POWER_DEAD)),
    Row("power-gone", "the same, and that client is said to be gone", partial(nodes.change, kind=nodes.POWER_GONE)),
)


def begin(row: Row) -> Measured:
    return Measured(row=row.name, what=row.what, goal=row.goal)


def run(row: Row, ground: Ground, rounds: int, measured: Measured) -> None:
    """With whatever went wrong in it: then what the parts said is told, too."""
    said = io.StringIO()
    for guest in ground.clients:
        # of an earlier row, or of its boot
        guest.kernel_log()
    try:
        with contextlib.redirect_stdout(said):
            row.run(ground, rounds, measured)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        measured.problems.append(f"{where.line}: {type(error).__name__}: {error}"[:2000])
        ground.progress(f"{said.getvalue()}\n{traceback.format_exc()}")
    if not measured.problems and len(measured.stall) != rounds:
        measured.problems.append(f"{len(measured.stall)} stalls of {rounds} rounds were seen")
