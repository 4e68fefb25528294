"""`python -m tests.failover`: see docs/failover.md. How long clients stand still, by what is done to a share."""

from __future__ import annotations

import os
import signal
import sys
import time
from types import FrameType
from typing import Annotated, Literal

import msgspec
from cyclopts import App, Parameter

from tests.failover.ground import ground
from tests.failover.measure import Measured, exit_status, table, told
from tests.failover.rows import ROWS, begin, run

NAMES = [row.name for row in ROWS]
STARTED = time.monotonic()

app = App(name="python -m tests.failover", help="How long clients stand still, by what is done to a share.")


@app.default
def main(
    *,
    rounds: int = 10,
    row: Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())] = None,
    lease: int = 20,
    grace: int = 30,
    output: Literal["text", "json"] = "text",
) -> int:
    """Do each of these things that many times under a real kernel client, and measure.

    Exit status: 0 all goals met, 1 something was lost or failed, 2 wrong usage, 3 a goal missed, 130 interrupted.

    Parameters
    ----------
    rounds
        Of each row.
    row
        Which rows: ganesha, engine, manager, manager-restart, everything, power, power-cold, partition, move,
        encrypted, ganesha-client, power-client, power-gone. All by default.
    lease
        --lease-lifetime of the shares, in seconds.
    grace
        --grace-period of the shares, in seconds.
    output
        json: one object at the end, on standard output. What happens is told on standard error in both cases.
    """
    unknown = [name for name in row or () if name not in NAMES]
    if unknown or rounds < 1:
        tell(f"no such row: {', '.join(unknown)}; there are {', '.join(NAMES)}" if unknown else "no round, nothing")
        return 2
    if os.geteuid() != 0:
        tell("this boots guests and mounts filesystems: run it as root")
        return 2
    signal.signal(signal.SIGTERM, _interrupt)
    done: list[Measured] = []
    interrupted = False
    try:
        with ground(("--lease-lifetime", str(lease), "--grace-period", str(grace)), tell) as made:
            for one in ROWS:
                if row is None or one.name in row:
                    done.append(begin(one))
                    run(one, made, rounds, done[-1])
                    tell(f"{one.name}: {done[-1].verdict}; {' '.join(done[-1].problems)}".rstrip("; "))
    except KeyboardInterrupt:
        interrupted = True
        if done and len(done[-1].stall) < rounds:
            done[-1].problems.append("interrupted")
    if output == "json":
        shown = {"rounds": rounds, "lease": lease, "grace": grace, "rows": [told(one) for one in done]}
        print(msgspec.json.encode(shown).decode())
    else:
        print("\n".join(table(done)))
    return 130 if interrupted else exit_status(done)


def tell(line: str) -> None:
    print(f"{time.monotonic() - STARTED:7.1f} {line}", file=sys.stderr, flush=True)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(f"signal {number}")


if __name__ == "__main__":
    sys.exit(app(sys.argv[1:]))
