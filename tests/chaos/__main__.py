"""`python -m tests.chaos --minutes 10`, or `nodes --minutes 10`: see docs/testing.md.

Exit status 0: nothing was lost. 1: something was.
"""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Literal

import msgspec
import trio
from cyclopts import App

from tests.chaos import node_faults
from tests.chaos import nodes as on_nodes
from tests.chaos.campaign import Options, campaign
from tests.chaos.faults import KINDS
from tests.chaos.report import Report, lines

app = App(name="python -m tests.chaos", help="Random faults under a filesystem that knows what must be in it.")


@app.default
def main(
    *,
    minutes: float = 1.0,
    seed: int | None = None,
    replicas: int = 3,
    only: str = "",
    logs: Path | None = None,
    output: Literal["text", "json"] = "text",
) -> int:
    """Inflict faults on a volume for a time, and see what is left of it.

    Parameters
    ----------
    minutes
        How long faults are inflicted; mending and verifying come on top.
    seed
        Of the order of faults and of the workload; a new one by default.
    replicas
        How many.
    only
        Only kinds of fault with this in their names.
    logs
        A directory into which the logs of all processes are copied.
    output
        json: one object at the end, on standard output; what happens goes to standard error in both cases.
    """
    if os.geteuid() != 0:
        print("the campaign mounts filesystems: run it as root", file=sys.stderr)
        return 2
    chosen = [kind for kind in KINDS if only in kind.name]
    if not chosen or replicas < 2 or minutes <= 0:
        print("nothing to do: there must be a kind of fault, two replicas and some time", file=sys.stderr)
        return 2
    seed = secrets.randbelow(1 << 32) if seed is None else seed
    options = Options(seconds=minutes * 60, seed=seed, replicas=replicas, kinds=chosen, logs=logs)
    tell(f"seed {seed}")
    report = trio.run(_run, options)
    if report is None:
        return 130
    print(msgspec.json.encode(report).decode() if output == "json" else "\n".join(lines(report)))
    return 0 if report.ok else 1


@app.command
def nodes(
    *,
    minutes: float = 1.0,
    seed: int | None = None,
    only: str = "",
    lease: int = 20,
    grace: int = 30,
    output: Literal["text", "json"] = "text",
) -> int:
    """Inflict faults on three nodes that share a volume, under kernel clients, and see what is left of it.

    Parameters
    ----------
    minutes
        How long faults are inflicted; mending and verifying come on top.
    seed
        Of the order of faults; a new one by default.
    only
        Only kinds of fault with this in their names.
    lease
        --lease-lifetime of the share, in seconds.
    grace
        --grace-period of the share, in seconds.
    output
        json: one object at the end, on standard output; what happens goes to standard error in both cases.
    """
    if os.geteuid() != 0:
        print("the campaign boots guests and mounts filesystems: run it as root", file=sys.stderr)
        return 2
    chosen = [kind for kind in node_faults.KINDS if only in kind.name]
    if not chosen or minutes <= 0:
        print("nothing to do: there must be a kind of fault and some time", file=sys.stderr)
        return 2
    seed = secrets.randbelow(1 << 32) if seed is None else seed
    tell(f"seed {seed}")
    began = time.monotonic()

    def timed(line: str) -> None:
        tell(f"{time.monotonic() - began:8.2f} {line}")

    signal.signal(signal.SIGTERM, _interrupt)
    share = ("--lease-lifetime", str(lease), "--grace-period", str(grace))
    options = on_nodes.Options(seconds=minutes * 60, seed=seed, kinds=chosen, share=share)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            report = on_nodes.campaign(options, timed)
    except KeyboardInterrupt:
        return 130
    if not report.ok:
        tell(said.getvalue())
    print(msgspec.json.encode(report).decode() if output == "json" else "\n".join(on_nodes.lines(report)))
    return 0 if report.ok else 1


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(f"signal {number}")


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


async def _run(options: Options) -> Report | None:
    """None when a signal ended it."""
    report: Report | None = None
    async with trio.open_nursery() as nursery:

        async def leave() -> None:
            with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
                async for number in signals:
                    tell(f"{signal.Signals(number).name}: leaving")
                    nursery.cancel_scope.cancel()

        nursery.start_soon(leave)
        report = await campaign(options, tell)
        nursery.cancel_scope.cancel()
    return report


if __name__ == "__main__":
    sys.exit(app())
