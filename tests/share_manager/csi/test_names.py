"""Names of CSI become ids that Kubernetes, a Service and an export can have."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from share_manager.csi.errors import InvalidArgumentError
from share_manager.csi.names import is_volume_id, volume_id

LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
ALLOWED = st.text(
    st.characters(
        codec="utf-8",
        exclude_characters=[chr(code) for code in (*range(0x09), 0x0B, 0x0C, *range(0x0E, 0x20), *range(0x7F, 0xA0))],
    ),
    min_size=1,
    max_size=128,
).filter(lambda name: len(name.encode()) <= 128)
LABELS = st.from_regex(LABEL, fullmatch=True)


@given(ALLOWED)
def test_every_name_becomes_a_label(name: str) -> None:
    assert LABEL.fullmatch(volume_id(name))
    assert volume_id(name) == volume_id(name)


@given(LABELS)
def test_a_label_stays_as_it_is(name: str) -> None:
    assert is_volume_id(name)
    assert volume_id(name) == name


@given(st.lists(ALLOWED | LABELS, unique=True, max_size=20))
def test_different_names_have_different_ids(names: list[str]) -> None:
    assert len({volume_id(name) for name in names}) == len(names)


@pytest.mark.parametrize(
    ("name", "begin"),
    [
        ("My Volume", "my-volume-"),
        ("0abc", "v-0abc-"),
        ("--", "v-"),
        ("Ü\n", "v-"),
        ("a" * 64, "a" * 40 + "-"),
        ("a.b", "a-b-"),
    ],
)
def test_words_of_the_name_are_kept(name: str, begin: str) -> None:
    assert volume_id(name).startswith(begin)


@pytest.mark.parametrize("name", ["", "a" * 129, "ü" * 65, "a\x00b", "a\x1f", "a\x7f", "a\x85b", "\x08"])
def test_names_that_the_specification_forbids_are_refused(name: str) -> None:
    with pytest.raises(InvalidArgumentError):
        volume_id(name)
