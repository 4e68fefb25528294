from __future__ import annotations

from engine.controller.purge import BUSY_SHARE, RATE, pause


def test_alone_a_step_is_bounded_by_the_rate() -> None:
    assert pause(RATE // 4, 0.05, busy=False) == 0.2
    # a disk that is slower than the rate needs no pause
    assert pause(RATE // 4, 0.5, busy=False) == 0.0


def test_beside_clients_steps_take_their_share_of_the_time() -> None:
    took = 0.5
    waited = pause(1 << 20, took, busy=True)
    assert abs(took / (took + waited) - BUSY_SHARE) < 1e-9
    assert pause(RATE, 0.01, busy=True) > 0.9
