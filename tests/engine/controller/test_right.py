"""Never two share managers answer clients of one volume: in every order of a few events, and in many at random."""

from __future__ import annotations

import pickle
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.controller.right import Right
from engine.replica.right import Confirmations
from tests.conftest import Progress
from tests.engine.controller.serving import Action, Rules, TwoServeError, World

DRIFT = 0.01
# what leads somewhere is taken more often
WEIGHTS = {
    "time": 4,
    "deliver": 12,
    "ask": 8,
    "apply": 16,
    "permit": 8,
    "ready": 8,
    "open": 5,
    "join": 3,
    "server-dies": 2,
    "orphan": 4,
}


def live(rng: Random, replicas: int, length: int, rules: Rules) -> World:
    speeds = [1 + rng.choice((-DRIFT, 0, DRIFT)) for _ in range(replicas + 3)]
    world = World(replicas, speeds, rules, step=rng.choice((0.1, 0.5)))
    for _ in range(length):
        actions = world.actions()
        world.do(rng.choices(actions, [WEIGHTS.get(str(action[0]), 0.4) for action in actions])[0])
    return world


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.randoms(use_true_random=False), st.integers(1, 3))
def test_no_interleaving_lets_two_serve(rng: Random, replicas: int) -> None:
    live(rng, replicas, 150, Rules())


def test_long_lives_in_which_one_serves_after_the_other() -> None:
    after_another = sum(live(Random(seed), 1 + seed % 3, 400, Rules()).both_served for seed in range(400))
    # the simulation itself must not have run dry
    assert after_another > 40


@pytest.mark.parametrize(
    "rules",
    [Rules(age=2.5), Rules(restarts_forget=True), Rules(lifeline=False)],
    ids=["too-young", "restarts-forget", "leaves-while-its-server-answers"],
)
def test_each_rule_is_needed(rules: Rules) -> None:
    with pytest.raises(TwoServeError):
        for seed in range(3000):
            live(Random(seed), 1 + seed % 3, 400, rules)


def joining(rules: Rules) -> World:
    """A second replica, out of sync, is opened: the answer takes long, and the right is renewed meanwhile."""
    world = World(2, [1.0] * 5, rules)
    world.record = (0, frozenset({0}))
    for action in (("attach",), ("open", 0, 0), ("deliver", 0), ("deliver", 0), ("ready", 0)):
        world.do(action)
    world.do(("open", 0, 1))
    world.do(("deliver", 0))
    opened = world.messages.pop()
    for _ in range(4):
        world.do(("time",))
    renew(world, 0)
    world.messages.append(opened)
    world.do(("deliver", 0))
    return world


def renew(world: World, holder: int) -> None:
    for action in (("ask", holder, 0), ("deliver", 0), ("deliver", 0)):
        world.do(action)
    if ("permit", holder) in world.actions():
        world.do(("permit", holder))
        world.do(("apply", holder))


def taken_over_from_the_second(world: World) -> None:
    """Another holder reaches only the second replica, and serves as soon as it may."""
    holder = len(world.holders)
    world.do(("attach",))
    for action in (("give-up", holder, 0), ("open", holder, 1), ("deliver", 0), ("deliver", 0), ("ready", holder)):
        world.do(action)
    for _ in range(20):
        for action in (("ask", holder, 1), ("deliver", 0), ("deliver", 0)):
            world.do(action)
        if ("permit", holder) in world.actions():
            world.do(("permit", holder))
            world.do(("apply", holder))
            return
        world.do(("time",))
    raise AssertionError("it never served")


@pytest.mark.parametrize("flushes", [True, False])
def test_what_was_granted_while_a_replica_was_opened_is_covered_by_its_flush(flushes: bool) -> None:
    world = joining(Rules(joins_flush=flushes))
    world.do(("join", 0, 1))
    for _ in world.messages:
        world.do(("deliver", 0))
        world.do(("deliver", 0))
        break
    world.do(("record-join", 0, 1))
    if flushes:
        taken_over_from_the_second(world)
    else:
        with pytest.raises(TwoServeError):
            taken_over_from_the_second(world)


@pytest.mark.parametrize("members_only", [False, True])
def test_who_is_about_to_become_a_member_has_to_confirm_as_well(members_only: bool) -> None:
    world = joining(Rules(in_sync_only=members_only))
    world.do(("join", 0, 1))
    world.do(("deliver", 0))
    world.do(("deliver", 0))
    for _ in range(4):
        world.do(("time",))
    renew(world, 0)
    world.do(("record-join", 0, 1))
    if members_only:
        with pytest.raises(TwoServeError):
            taken_over_from_the_second(world)
    else:
        taken_over_from_the_second(world)


@pytest.mark.parametrize("permit", [0.2, 60.0])
def test_who_is_stopped_between_calculating_and_opening_does_not_open(permit: float) -> None:
    world = served(Rules(permit=permit))
    renew_then: list[Action] = [("ask", 0, 0), ("deliver", 0), ("deliver", 0), ("permit", 0), ("attach",)]
    for action in (*renew_then, ("open", 1, 0), ("deliver", 0), ("deliver", 0), ("ready", 1)):
        world.do(action)
    while not world.holders[1].served:
        world.do(("time",))
        renew(world, 1)
    if permit < 1:
        world.do(("apply", 0))
    else:
        with pytest.raises(TwoServeError):
            world.do(("apply", 0))


def explore(world: World, kinds: set[str], longest: int) -> int:
    """Every order of these kinds of actions; how many worlds were seen."""
    seen: set[bytes] = set()
    front = [pickle.dumps(world)]
    for _ in range(longest):
        following: list[bytes] = []
        for state in front:
            for action in pickle.loads(state).actions():
                if action[0] in kinds:
                    then: World = pickle.loads(state)
                    then.do(action)
                    packed = pickle.dumps(then)
                    if packed not in seen:
                        seen.add(packed)
                        following.append(packed)
        front = following
    return len(seen)


def served(rules: Rules) -> World:
    """One holder serves, by what one replica has confirmed."""
    world = World(1, [1.0] * 4, rules, step=1.0)
    first: list[Action] = [("attach",), ("open", 0, 0), ("deliver", 0), ("deliver", 0), ("ready", 0)]
    for action in (*first, ("ask", 0, 0), ("deliver", 0), ("deliver", 0), ("permit", 0), ("apply", 0)):
        world.do(action)
    return world


KINDS = {"time", "deliver", "ask", "ready", "permit", "apply"}


def challenged(rules: Rules) -> World:
    """The first holder renews while the next one opens the replica: who is first there is open."""
    world = served(rules)
    for action in (("ask", 0, 0), ("attach",), ("open", 1, 0)):
        world.do(action)
    return world


def test_every_order_of_a_takeover(progress: Progress) -> None:
    worlds = explore(challenged(Rules(lasts=1.0, age=1.5, permit=0.0)), KINDS, 10)
    progress(f"every order of a takeover: {worlds} worlds")
    assert worlds > 1000


ORPHANED = {*KINDS, "server-dies", "orphan"}


def orphaned(rules: Rules) -> World:
    """The first holder's share manager was killed, and the next holder is on its way."""
    world = served(rules)
    for action in (("kill", 0), ("attach",), ("open", 1, 0)):
        world.do(action)
    return world


def test_every_order_of_a_takeover_from_a_share_manager_that_was_killed(progress: Progress) -> None:
    """What a dead share manager leaves is given up when its server is dead, and not before."""
    worlds = explore(orphaned(Rules(lasts=1.0, age=1.5, permit=0.0)), ORPHANED, 10)
    progress(f"every order of a death: {worlds} worlds")
    assert worlds > 5000
    with pytest.raises(TwoServeError):
        explore(orphaned(Rules(lasts=1.0, age=1.5, permit=0.0, lifeline=False)), ORPHANED, 10)


def test_nobody_waits_for_a_share_manager_whose_server_is_dead() -> None:
    world = served(Rules())
    for action in (("kill", 0), ("server-dies", 0), ("orphan", 0), ("deliver", 0), ("attach",), ("open", 1, 0)):
        world.do(action)
    while world.messages:
        world.do(("deliver", 0))
    world.do(("ready", 1))
    renew(world, 1)
    assert world.holders[1].served
    assert world.now < world.holders[0].gate


def test_every_order_of_a_takeover_that_comes_too_early_shows_it() -> None:
    with pytest.raises(TwoServeError):
        explore(challenged(Rules(lasts=2.0, age=1.0, permit=0.0)), KINDS, 9)


def test_the_right_lasts_from_when_the_slowest_was_asked() -> None:
    right = Right(3.0, 2.0)
    right.confirmed(1, 10.0)
    assert not right.extend(0b11)
    right.confirmed(2, 9.0)
    assert right.extend(0b11)
    assert right.until == 12.0
    right.confirmed(1, 11.0)
    assert not right.extend(0b11)
    # one that is required from now on takes nothing back
    assert not right.extend(0b111)
    assert right.until == 12.0
    assert not right.extend(0)


def test_only_who_is_behind_others_is_a_laggard() -> None:
    right = Right(3.0, 2.0)
    assert right.laggards(0b111, 0b111) == []
    for bit in (1, 2, 4):
        right.met(bit, 9.0)
    for bit, asked in ((2, 11.0), (4, 11.0)):
        right.confirmed(bit, asked)
    assert right.laggards(0b111, 0b111) == []
    right.confirmed(4, 11.5)
    # also one that never confirmed anything
    assert right.laggards(0b111, 0b111) == [(1, 2.5)]
    assert right.laggards(0b111, 0b110) == [(1, 2.5)]
    assert right.laggards(0b110, 0b111) == []
    # the last one in sync is not left for one that is not
    assert right.laggards(0b111, 0b001) == []
    # back again
    right.met(1, 11.4)
    assert right.laggards(0b111, 0b111) == []


def test_a_replica_tells_how_long_ago_an_older_epoch_was_confirmed() -> None:
    confirmations = Confirmations(100.0, 4, closed=True)
    confirmations.opened(5, 101.0)
    assert confirmations.age(102.0) is None
    confirmations.confirmed(110.0)
    # another engine of the same attachment
    confirmations.opened(5, 111.0)
    confirmations.opened(6, 113.0)
    assert confirmations.age(113.5) == 2.5
    # epoch 6 ends in order, and had waited for 5 or had not served
    confirmations.closed()
    confirmations.opened(7, 120.0)
    assert confirmations.age(120.0) == 9.0


def test_a_replica_that_was_restarted_counts_from_its_start() -> None:
    confirmations = Confirmations(100.0, 4, closed=False)
    confirmations.opened(5, 101.5)
    assert confirmations.age(101.5) == 1.5
    confirmations.confirmed(105.0)
    confirmations.opened(6, 106.0)
    assert confirmations.age(106.0) == 1.0
