"""The power of everything fails at once: what was flushed is there, replicas are equal, the filesystems are clean."""

from __future__ import annotations

import pytest

from tests.conftest import Progress
from tests.lab.network import Lab
from tests.powerloss.campaign import Machine, plan, replay

pytestmark = pytest.mark.system


def test_three_replicas_survive_the_loss_of_power_also_while_one_comes_back(lab: Lab, progress: Progress) -> None:
    machine = Machine(lab, plan(3, 3, 40, ((10, 22),), io="direct"), "three")
    figures = replay(machine, machine.work(), 30, progress)
    progress(f"power loss, three replicas: {figures}")
    assert figures.lost == []
    # the workload was one that could have lost something
    assert figures.points == 30
    assert figures.unflushed_blocks > 20
    assert figures.equalised > 20
    assert figures.resynced > 5
    assert figures.records > 50


def test_one_replica_survives_the_loss_of_power_behind_every_flush(lab: Lab, progress: Progress) -> None:
    machine = Machine(lab, plan(4, 1, 30), "one")
    figures = replay(machine, machine.work(), 30, progress)
    progress(f"power loss, one replica: {figures}")
    assert figures.lost == []
    assert figures.points == 30
    assert figures.unflushed_blocks > 5
    assert figures.records > 50


@pytest.mark.parametrize(("sabotage", "replicas"), [("flush", 1), ("intent", 2)])
def test_a_replica_that_breaks_its_promise_is_noticed(
    lab: Lab, progress: Progress, sabotage: str, replicas: int
) -> None:
    machine = Machine(lab, plan(5, replicas, 15, io="direct", sabotage=sabotage), f"no-{sabotage}")
    figures = replay(machine, machine.work(), 8)
    progress(f"power loss without {sabotage}: {figures}")
    assert figures.lost != []
