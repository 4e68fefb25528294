"""What the workload owes and what it finds lost, without any filesystem."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.chaos.model import Change, Directory, File, differing


def synced(content: bytes) -> File:
    file = File()
    file.write(0, content)
    file.sync()
    return file


def test_synced_bytes_that_are_missing_or_changed_are_lost() -> None:
    file = synced(b"abcdef")
    assert file.lost(b"abcdef") == 0
    assert file.lost(b"abcdefgh") == 0
    assert file.lost(b"abc") == 3
    assert file.lost(b"") == 6
    assert file.lost(b"abXdeX") == 2


def test_what_was_written_since_the_sync_may_be_anything() -> None:
    file = synced(b"abcdef")
    file.write(2, b"XY")
    assert bytes(file.now) == b"abXYef"
    assert file.owed() == 4
    assert file.lost(b"abXYef") == file.lost(b"abcdef") == file.lost(b"ab\0\0ef") == 0
    assert file.lost(b"abXYeZ") == 1


def test_an_append_owes_what_was_before_it() -> None:
    file = synced(b"abc")
    file.write(3, b"def")
    assert file.lost(b"abc") == file.lost(b"abcd") == file.lost(b"abc\0\0\0") == 0
    assert file.lost(b"ab") == 1


def test_after_a_truncation_nothing_is_owed_until_the_next_sync() -> None:
    file = synced(b"abc")
    file.truncate(1)
    assert (file.lost(b""), file.owed()) == (0, 0)
    file.sync()
    assert file.lost(b"") == 1


def test_what_a_crash_left_is_not_owed_before_it_is_synced_again() -> None:
    file = synced(b"abc")
    file.write(0, b"XYZ")
    file.adopt(b"XYc")
    assert bytes(file.now) == b"XYc"
    assert file.lost(b"abc") == 0
    file.sync()
    assert file.lost(b"abc") == 2


@given(st.binary(max_size=50), st.lists(st.tuples(st.integers(0, 60), st.binary(min_size=1, max_size=20)), max_size=5))
def test_any_prefix_of_the_writes_since_a_sync_is_no_loss(start: bytes, writes: list[tuple[int, bytes]]) -> None:
    file = synced(start)
    states = [bytes(file.now)]
    for offset, data in writes:
        file.write(offset, data)
        states.append(bytes(file.now))
    assert all(file.lost(state) == 0 for state in states)


@given(st.binary(max_size=40), st.binary(max_size=40))
def test_differing_counts_what_is_missing(one: bytes, other: bytes) -> None:
    assert differing(one, other) == differing(other, one)
    assert (differing(one, other) == 0) == (one == other)


def directory(*names: str, pending: Change | None = None) -> Directory:
    made = Directory()
    for name in names:
        made.begin(Change(new=name))
        made.done()
    if pending is not None:
        made.begin(pending)
    return made


@pytest.mark.parametrize(
    ("pending", "possible"),
    [
        (None, ["ab"]),
        (Change(new="c"), ["ab", "abc"]),
        (Change(old="a"), ["ab", "b"]),
        (Change(old="a", new="c"), ["ab", "bc"]),
        (Change(old="a", new="b"), ["ab", "b"]),
    ],
)
def test_a_change_of_names_that_was_cut_off_happened_or_did_not(pending: Change | None, possible: list[str]) -> None:
    for found in possible:
        model = directory("a", "b", pending=pending)
        assert model.recover(set(found)) == set()
        assert set(model.files) == set(found)


@pytest.mark.parametrize(
    ("pending", "found", "wrong"),
    [
        (None, "a", "b"),
        (None, "abc", "c"),
        (Change(new="c"), "bc", "a"),
        (Change(old="a"), "a", "b"),
    ],
)
def test_other_names_are_wrong_and_then_taken_as_they_are(pending: Change | None, found: str, wrong: str) -> None:
    model = directory("a", "b", pending=pending)
    assert model.recover(set(found)) == set(wrong)
    assert set(model.files) == set(found)


def test_a_rename_carries_the_content() -> None:
    model = directory("a", "b")
    model.files["a"].write(0, b"content")
    model.begin(Change(old="a", new="b"))
    assert model.recover({"b"}) == set()
    assert bytes(model.files["b"].now) == b"content"


def test_a_change_that_the_journal_did_not_take_is_taken_back_only_if_it_is_not_there() -> None:
    for change in (Change(new="c"), Change(old="a"), Change(old="a", new="b")):
        model = directory("a", "b", pending=change)
        model.done()
        after = set(model.files)
        assert not model.undo_unconfirmed(after)
        # the next change is what met the error
        model.begin(Change(new="d"))
        assert not model.undo_unconfirmed(after | {"d"})
        assert not model.undo_unconfirmed({"x"})
        assert model.undo_unconfirmed({"a", "b"})
        assert model.recover({"a", "b"}) == set()
