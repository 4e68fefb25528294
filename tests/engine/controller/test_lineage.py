from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.controller.lineage import kept, key, merge_cost, mergeable, reconcile, returning, shape
from engine.wire.messages import SnapshotEntry


def entry(name: str, created: str = "t", **changes: object) -> SnapshotEntry:
    fields: dict[str, object] = {
        "name": name, "parent": "", "created": created, "user_created": True, "removed": False, "live": True,
        "children": 1, "size": 1, "allocated": 1,
    }  # fmt: skip
    return SnapshotEntry(**(fields | changes))  # type: ignore[arg-type]


def removed(name: str, created: str = "t") -> SnapshotEntry:
    return entry(name, created, removed=True)


A, B, C = entry("a"), entry("b"), entry("c")


def test_equal_members_are_left_alone() -> None:
    verdict = reconcile({"r1": [A, B], "r2": [A, B], "r3": [A, removed("x"), B]})
    assert (verdict.remove, verdict.leave) == ({}, ())


def test_the_newest_that_only_some_have_was_never_acknowledged() -> None:
    verdict = reconcile({"r1": [A, B], "r2": [A], "r3": [A, B]})
    assert (verdict.remove, verdict.leave) == ({"r1": ("b",), "r3": ("b",)}, ())


def test_a_removal_that_some_have_heard_of_is_finished() -> None:
    verdict = reconcile({"r1": [A, B], "r2": [removed("a"), B]})
    assert (verdict.remove, verdict.leave) == ({"r1": ("a",)}, ())


def test_what_no_crash_explains_costs_the_member_that_lacks_something() -> None:
    verdict = reconcile({"r1": [B], "r2": [A, B], "r3": [A, B]})
    assert (verdict.remove, verdict.leave) == ({}, ("r1",))


def test_the_time_tells_two_of_one_name_apart() -> None:
    verdict = reconcile({"r1": [A, entry("b", "1")], "r2": [A, entry("b", "2")]})
    assert (verdict.remove, verdict.leave) == ({"r1": ("b",), "r2": ("b",)}, ())


def test_what_only_a_returning_replica_has_goes() -> None:
    assert returning([A, B], [A, B]) == ()
    assert returning([A, B], [A, C, B]) == ("c",)
    assert returning([removed("a"), B], [A, B]) == ("a",)
    assert returning([A], [A, entry("b", "2")]) == ("b",)


def test_what_a_returning_replica_lacks_takes_a_rebuild() -> None:
    assert returning([A, B], [A]) is None
    assert returning([A, B], [A, removed("b")]) is None
    assert returning([A, entry("b", "2")], [A, entry("b", "1")]) is None
    # the members went back to a, and this one did not
    assert returning([A, entry("b", live=False)], [A, B]) is None


names = st.sampled_from("abcdef")
listings = st.lists(
    st.builds(lambda name, created, gone, live: entry(name, created, removed=gone, live=live),
              names, st.sampled_from("12"), st.booleans(), st.booleans()),
    unique_by=lambda one: one.name, max_size=6,
)  # fmt: skip


def after(listing: list[SnapshotEntry], names: tuple[str, ...]) -> list[SnapshotEntry]:
    return [one for one in listing if one.name not in names]


@given(st.dictionaries(st.sampled_from(["r1", "r2", "r3"]), listings, min_size=1))
def test_whoever_stays_is_equal_and_settling_again_changes_nothing(members: dict[str, list[SnapshotEntry]]) -> None:
    verdict = reconcile(members)
    assert len(verdict.leave) < len(members)
    settled = {
        name: after(listing, verdict.remove.get(name, ()))
        for name, listing in members.items()
        if name not in verdict.leave
    }
    assert len({shape(listing) for listing in settled.values()}) == 1
    # nothing that everybody has is ever removed
    common = set.intersection(*(set(kept(listing)) for listing in members.values()))
    for name, listing in members.items():
        gone = {key(one) for one in listing if one.name in verdict.remove.get(name, ())}
        assert not gone & common


@given(listings, listings)
def test_a_returning_replica_is_equal_or_told_so(member: list[SnapshotEntry], absent: list[SnapshotEntry]) -> None:
    extra = returning(member, absent)
    if extra is not None:
        assert shape(after(absent, extra)) == shape(member)
        assert not {key(one) for one in absent if one.name in extra} & set(kept(member))


def test_what_can_be_merged_away() -> None:
    listing = [
        entry("a", removed=True, children=2),
        entry("b", removed=True, parent="a"),
        entry("c", parent="b", allocated=7),
        entry("d", removed=True, parent="c"),
        entry("e", removed=True, live=False, children=0, parent="a", allocated=5),
    ]
    # not what two build on, nor what the head does
    assert mergeable(listing) == ["b", "e"]
    assert merge_cost(listing) == 1 + 7 + 5
