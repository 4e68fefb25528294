"""`python -m tests.powerloss`: loss of power at many points of many runs, with figures. Needs root.

Every run boots a guest, works, cuts the power, and tries chosen points of what the disks had got. The exit status is 1
when a point lost anything.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time

import structlog

from tests.lab.network import Lab
from tests.powerloss.campaign import Figures, Machine, plan, replay


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.powerloss", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="begin no run after that long")
    parser.add_argument("--operations", type=int, default=200, help="durable operations of each run")
    parser.add_argument("--points", type=int, default=200, help="points tried of each run, at most")
    parser.add_argument(
        "--replicas", type=int, choices=(1, 2, 3), help="of every run; by default three, every fourth run one"
    )
    parser.add_argument("--io", choices=("auto", "direct", "buffered"), help="of the replicas; by default in turns")
    parser.add_argument("--seed", type=int, default=1, help="of the first run; the next has the next")
    parser.add_argument(
        "--sabotage", choices=("flush", "intent"), default="", help="break the product, to see it noticed"
    )
    wanted = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    total, runs = Figures(), 0
    began = time.monotonic()
    while not runs or time.monotonic() - began < wanted.seconds:
        replicas = wanted.replicas or (1 if runs % 4 == 3 else 3)
        n = wanted.operations
        outages = ((n // 4, n // 2), (n * 5 // 8, n * 3 // 4)) if replicas > 1 else ()
        chosen = plan(
            wanted.seed + runs,
            replicas,
            n,
            outages,
            io=wanted.io or ("direct", "auto")[runs % 2],
            sabotage=wanted.sabotage,
        )
        lab = Lab()
        try:
            with lab:
                machine = Machine(lab, chosen)
                figures = replay(machine, machine.work(), wanted.points, print)
        finally:
            lab.discard()
        runs += 1
        print(f"seed {chosen.seed}, {replicas} replicas, io {chosen.io}: {figures}", flush=True)
        total = total.add(figures)
    print(f"{runs} runs in {time.monotonic() - began:.0f} s: {total}")
    return 1 if total.lost else 0


if __name__ == "__main__":
    sys.exit(main())
