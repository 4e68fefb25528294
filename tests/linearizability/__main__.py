"""`python -m tests.linearizability --minutes 10`: see docs/testing.md. Exit status 1: a history is not linearizable."""

from __future__ import annotations

import secrets
import sys
from pathlib import Path

import msgspec
import trio
from cyclopts import App

from tests.linearizability.checker import NotLinearizableError, check
from tests.linearizability.clients import BLOCKS
from tests.linearizability.recorder import history, record

app = App(name="python -m tests.linearizability", help="Is each block a register, whatever fails below?")


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@app.default
def main(*, minutes: float = 1.0, seed: int | None = None, keep: Path | None = None) -> int:
    """Record what clients of a block file see while faults go on below, and check it.

    Parameters
    ----------
    minutes
        How long.
    seed
        Of the faults and of what the clients do; a new one by default.
    keep
        A file into which a history that fails is written.
    """
    seed = secrets.randbelow(1 << 32) if seed is None else seed
    tell(f"seed {seed}")
    recorded, faults, problems = trio.run(record, minutes * 60, seed, tell)
    for block in BLOCKS:
        try:
            check(history(recorded, block))
        except NotLinearizableError as error:
            problems.append(f"block {block}: {error}")
    acts = [act for era in recorded for act in era]
    unknown = sum(act.end is None for act in acts)
    print(
        f"{len(acts) - unknown} operations, {unknown} of unknown outcome, "
        f"{len(recorded)} attachments, {faults} faults: " + ("; ".join(problems) or "linearizable")
    )
    if problems and keep is not None:
        keep.write_bytes(msgspec.json.encode(recorded))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(app())
