from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.launch import EngineExit
from share_manager.share.supervise import (
    RESUME_AT_MOST,
    RESUME_WINDOW,
    Backoff,
    Decision,
    Observed,
    Policy,
    decide,
    may_resume,
    next_ganesha_epoch,
)

POLICY = Policy()


@pytest.mark.parametrize(
    ("observed", "decision"),
    [
        (Observed(), Decision.NOTHING),
        (Observed(missed_calls=POLICY.null_misses - 1), Decision.NOTHING),
        (Observed(missed_calls=POLICY.null_misses), Decision.RESTART_GANESHA),
        (Observed(ganesha_exit=-9), Decision.RESTART_GANESHA),
        (Observed(right_lost_for=POLICY.right_patience - 0.1), Decision.NOTHING),
        (Observed(right_lost_for=POLICY.right_patience + 0.1), Decision.RESTART_GANESHA),
        (Observed(ganesha_exit=0), Decision.RESTART_GANESHA),
        (Observed(engine_exit=-9), Decision.REATTACH),
        (Observed(engine_exit=EngineExit.NO_REPLICA), Decision.REATTACH),
        (Observed(engine_silent_for=POLICY.engine_silence + 1), Decision.REATTACH),
        (Observed(filesystem_fault="the filesystem went ro after an error"), Decision.REATTACH),
        (Observed(engine_exit=EngineExit.FENCED), Decision.STOP_FENCED),
    ],
)
def test_decisions(observed: Observed, decision: Decision) -> None:
    assert decide(observed, POLICY)[0] is decision


faults = {
    "engine_exit": st.none() | st.sampled_from([-9, 0, 1, 3, 4]),
    "engine_silent_for": st.floats(0, 100),
    "filesystem_fault": st.none() | st.just("the filesystem went ro"),
    "ganesha_exit": st.none() | st.sampled_from([-9, 0, 2]),
    "missed_calls": st.integers(0, 5),
}
observations = st.builds(Observed, **faults)


@given(observations)
def test_the_most_fundamental_failure_decides(observed: Observed) -> None:
    decision, reason = decide(observed, POLICY)
    broken = (
        observed.engine_exit is not None
        or observed.engine_silent_for > POLICY.engine_silence
        or observed.filesystem_fault is not None
    )
    if observed.engine_exit == EngineExit.FENCED:
        assert decision is Decision.STOP_FENCED
    elif broken:
        # a new ganesha alone would serve from a page cache that cannot be trusted
        assert decision is Decision.REATTACH
    assert (decision is Decision.NOTHING) == (reason == "")


def test_the_first_repair_is_immediate_and_later_ones_wait_longer() -> None:
    backoff = Backoff(first=0.5, factor=2, most=4, stable_after=60)
    now, pauses = 100.0, []
    for _ in range(7):
        pause = backoff.failed(now)
        pauses.append(pause)
        now += pause + 1
    assert pauses == [0, 0.5, 1, 2, 4, 4, 4]
    assert backoff.quick_failures == 6


def test_a_time_without_failure_makes_the_next_repair_immediate() -> None:
    backoff = Backoff(stable_after=60)
    assert backoff.failed(0) == 0
    assert backoff.failed(1) > 0
    assert backoff.failed(100) == 0
    assert backoff.quick_failures == 0


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_pauses_are_bounded(gaps: list[float]) -> None:
    backoff = Backoff(most=30)
    for now in itertools.accumulate(gaps):
        assert 0 <= backoff.failed(now) <= 30


@given(st.lists(st.floats(0, 2**32 - 1000), min_size=2, max_size=30))
def test_ganesha_never_gets_a_number_twice(clock: list[float]) -> None:
    # the clock may stand still or go back; 2106 is not considered
    taken: list[int] = []
    last = 0
    for now in clock:
        last = next_ganesha_epoch(last, now)
        assert 0 < last < 2**32
        taken.append(last)
    assert taken == sorted(set(taken))


@pytest.mark.parametrize(
    ("status", "resumable", "resumed", "may"),
    [
        (-9, True, [], True),
        (1, True, [0.0, 1.0], True),
        (-9, False, [], False),
        (EngineExit.FENCED, True, [], False),
        (EngineExit.NO_REPLICA, True, [], False),
        (EngineExit.CLEAN, True, [], False),
        (-9, True, [95.0] * RESUME_AT_MOST, False),
        (-9, True, [100.0 - RESUME_WINDOW] * RESUME_AT_MOST, True),
    ],
)
def test_an_engine_is_replaced_in_place_only_when_nothing_acknowledged_went_with_it(
    status: int, resumable: bool, resumed: list[float], may: bool
) -> None:
    assert may_resume(status, resumable, resumed, 100.0) is may
