from __future__ import annotations

import pytest

from engine.client import CloneStatus
from share_manager.cli.live import describe_clone

MIB = 1 << 20


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (CloneStatus(origin="a@b"), "0 % copied of a@b  0 B/s"),
        (
            CloneStatus(origin="a@b", done=30 * MIB, total=40 * MIB, rate=5.0 * MIB, left=2.0),
            "75 % copied of a@b  5.0 MiB/s  2 s left",
        ),
        (CloneStatus(origin="a@b", done=1, total=2, failure="no room"), "50 % copied of a@b  no room"),
    ],
)
def test_how_far_a_clone_is(status: CloneStatus, text: str) -> None:
    assert describe_clone(status) == text
