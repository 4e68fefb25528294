"""The simulation for as long as wanted: `python -m tests.engine.controller.soak FIRST COUNT [STEPS]`.

`... soak every REPLICAS WRITES FLUSHES READS SETTLES RETURNS FAULTS LONGEST` tries every sequence of so much instead.
"""

from __future__ import annotations

import sys
from random import Random

from tests.engine.controller.exhaustive import BrokenPromiseError, Budget, explore, start, subsets
from tests.engine.controller.simulation import run


def main(first: int, count: int, steps: int) -> int:
    acknowledged = crashes = rebuilds = resumed = 0
    for seed in range(first, first + count):
        try:
            world = run(Random(seed), steps, 1 + seed % 3)
        except AssertionError as error:
            print(f"seed {seed}, {steps} steps: {error}")
            return 1
        acknowledged += world.judge.acknowledged
        crashes += world.crashes
        rebuilds += world.rebuilds
        resumed += world.resumed
    print(
        f"{count} lives, {acknowledged} requests acknowledged, {crashes} replica crashes, {rebuilds} new replicas, "
        f"{resumed} rebuilds resumed, nothing lost"
    )
    return 0


def every(replicas: int, budget: Budget, longest: int) -> int:
    try:
        for in_sync in subsets([f"r{i + 1}" for i in range(replicas)]):
            if in_sync:
                report = explore(
                    start(replicas, in_sync), budget, longest=longest, say=lambda r: print(f"  {r}", flush=True)
                )
                print(f"{' '.join(in_sync)} in sync: {report}")
    except BrokenPromiseError as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "every":
        replicas, *budget, longest = (int(word) for word in sys.argv[2:])
        sys.exit(every(replicas, Budget(*budget), longest))
    numbers = [int(word) for word in sys.argv[1:]]
    sys.exit(main(numbers[0], numbers[1], numbers[2] if len(numbers) > 2 else 400))
