from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from share_manager.bench.summary import Spread, ratio, rotated, spread, spread_of


def test_the_middle_and_the_ends() -> None:
    assert spread([3.0, 1.0, 10.0]) == Spread(3.0, 1.0, 10.0)
    assert spread([1.0, 2.0]) == Spread(1.5, 1.0, 2.0)
    with pytest.raises(ValueError, match="no values"):
        spread([])


def test_what_is_missing_is_left_out() -> None:
    assert spread_of([None, 2.0, None]) == Spread(2.0, 2.0, 2.0)
    assert spread_of([None]) is None


def test_nothing_is_divided_by_zero() -> None:
    assert ratio(1.0, 2.0) == 0.5
    assert ratio(1.0, 0.0) is None


@given(st.lists(st.integers(), max_size=6), st.integers(-20, 20))
def test_rotation_loses_nothing_and_comes_round(items: list[int], by: int) -> None:
    turned = rotated(items, by)
    assert sorted(turned) == sorted(items)
    assert rotated(turned, -by) == items
