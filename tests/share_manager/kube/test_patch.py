from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from share_manager.kube.patch import applied, changes

LEAVES = st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=2)
OBJECTS = st.recursive(
    st.dictionaries(st.sampled_from("abc"), LEAVES, max_size=3),
    lambda inner: st.dictionaries(st.sampled_from("abc"), LEAVES | inner, max_size=3),
)


@given(OBJECTS, OBJECTS)
def test_a_patch_makes_the_one_of_the_other(before: dict[str, Any], after: dict[str, Any]) -> None:
    patch = changes(before, after)
    made = applied(before, patch)
    assert _without_empty(made) == _without_empty(after)
    assert (patch == {}) == (before == after)


def _without_empty(value: Any) -> Any:
    """An empty object and none at all are the same to the API."""
    if not isinstance(value, dict):
        return value
    cleaned = {name: _without_empty(inner) for name, inner in value.items()}
    return {name: inner for name, inner in cleaned.items() if inner != {}}


def test_what_is_gone_is_null() -> None:
    assert changes({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"d": 4}}) == {"a": None, "b": {"c": None, "d": 4}}


def test_lists_are_replaced_whole() -> None:
    assert changes({"a": [1, 2]}, {"a": [2]}) == {"a": [2]}
