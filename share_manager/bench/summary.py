"""Medians with their spread, and ratios."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import TypeVar

import msgspec

_T = TypeVar("_T")


class Spread(msgspec.Struct, frozen=True):
    """Middle and ends of repeated measurements."""

    median: float
    min: float
    max: float


def spread(values: Sequence[float]) -> Spread:
    """Raises ValueError on no values."""
    if not values:
        raise ValueError("no values")
    return Spread(statistics.median(values), min(values), max(values))


def spread_of(values: Iterable[float | None]) -> Spread | None:
    """The spread of those that are there."""
    present = [value for value in values if value is not None]
    return spread(present) if present else None


def ratio(value: float, base: float) -> float | None:
    """None where the base is zero."""
    return value / base if base else None


def rotated(items: Sequence[_T], by: int) -> list[_T]:
    """`items` starting at another one each time, so that none always follows the same neighbour."""
    if not items:
        return []
    by %= len(items)
    return [*items[by:], *items[:by]]
