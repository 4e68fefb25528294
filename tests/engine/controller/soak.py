"""The simulation for as long as wanted: `python -m tests.engine.controller.soak FIRST COUNT [STEPS]`."""

from __future__ import annotations

import sys
from random import Random

from tests.engine.controller.simulation import run


def main(first: int, count: int, steps: int) -> int:
    acknowledged = crashes = 0
    for seed in range(first, first + count):
        try:
            world = run(Random(seed), steps, 1 + seed % 3)
        except AssertionError as error:
            print(f"seed {seed}, {steps} steps: {error}")
            return 1
        acknowledged += world.judge.acknowledged
        crashes += world.crashes
    print(f"{count} lives, {acknowledged} requests acknowledged, {crashes} replica crashes, nothing lost")
    return 0


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:]]
    sys.exit(main(numbers[0], numbers[1], numbers[2] if len(numbers) > 2 else 400))
