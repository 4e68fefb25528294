"""Shares for the tests, and what every test under fire checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.lab.network import Lab
from tests.lab.share import Share

MakeShare = Callable[..., Share]

# for tests that wait for the end of a grace period: the least that clients renew in time
SHORT_GRACE = ("--lease-lifetime", "10", "--grace-period", "10")


@pytest.fixture
def make_share(lab: Lab) -> Iterator[MakeShare]:
    """Makes shares that are gone when the test is over. Their leftovers fail the test."""
    yield from shares(lab)


def shares(lab: Lab) -> Iterator[MakeShare]:
    made: list[Share] = []

    def make(name: str, **settings: object) -> Share:
        made.append(Share(lab, name, **settings))  # type: ignore[arg-type]
        return made[-1]

    try:
        yield make
    finally:
        problems = []
        for share in made:
            try:
                share.close()
            except AssertionError as error:
                problems.append(str(error))
    if problems:
        pytest.fail("\n".join(problems))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/system/" in item.nodeid:
            item.add_marker(pytest.mark.system)
