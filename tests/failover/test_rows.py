"""One round of the row that no other test has, as `python -m tests.failover` runs ten; and what the command refuses."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import Progress
from tests.failover import nodes
from tests.failover.ground import Ground
from tests.failover.measure import Measured
from tests.lab.guest import CHECKOUT, Guest
from tests.lab.network import Lab
from tests.lab.stalls import Stalls


@pytest.mark.system
def test_a_partition_in_which_both_sides_have_a_client_and_believe(
    lab: Lab, one: Guest, two: Guest, stalls: Stalls, progress: Progress
) -> None:
    three = Guest(lab, "apart")
    options = ("--lease-lifetime", "15", "--grace-period", "30")
    measured = Measured(row="partition", what="", goal=None)
    try:
        nodes.partition(Ground(lab, one, two, three, options, progress), 1, measured)
    finally:
        three.close()
    stalls.add("serving node's network cut", measured.stall[0])
    assert len(measured.opened) == len(measured.locked) == 1


@pytest.mark.parametrize("arguments", [("--row", "nothing"), ("--rounds", "0")])
def test_what_makes_no_sense_is_refused_in_one_line(arguments: tuple[str, ...]) -> None:
    argv = [sys.executable, "-m", "tests.failover", *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, cwd=CHECKOUT, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
