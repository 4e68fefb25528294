from __future__ import annotations

from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engine.controller.simulation import run


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.randoms(use_true_random=False), st.integers(1, 3), st.booleans())
def test_no_interleaving_loses_or_invents_data(rng: Random, replicas: int, partitions: bool) -> None:
    run(rng, 120, replicas, partitions)


@pytest.mark.parametrize("replicas", [2, 3])
def test_damage_of_one_disk_is_never_read_and_is_repaired(replicas: int) -> None:
    flips = repairs = 0
    for seed in range(200):
        try:
            world = run(Random(seed), 300, replicas, partitions=False, flips=True, membership=False)
        except AssertionError as error:
            error.add_note(f"seed {seed}")
            raise
        flips += world.flips
        repairs += world.repairs
        # the last reads found what was left
        assert not world.damaged
    assert flips > 150
    assert repairs > 30


@pytest.mark.parametrize("block", range(10))
def test_long_lives_keep_every_promise(block: int) -> None:
    acknowledged = crashes = reads = rebuilds = 0
    for seed in range(block * 200, block * 200 + 200):
        try:
            world = run(Random(seed), 400, 1 + seed % 3)
        except AssertionError as error:
            error.add_note(f"seed {seed}")
            raise
        acknowledged += world.judge.acknowledged
        crashes += world.crashes
        reads += world.judge.reads
        rebuilds += world.rebuilds
    # the simulation itself must not have run dry
    assert acknowledged > 2000
    assert crashes > 500
    assert reads > 500
    assert rebuilds > 100
