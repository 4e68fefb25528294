"""How long clients stood still, by what was done to the server: collected by tests, shown at the end of the session."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from tests.lab.workloads.appender import Gap


@dataclass
class Stalls:
    """Stalls in seconds by kind of fault, in the order in which the kinds were first seen."""

    seen: dict[str, list[float]] = field(default_factory=dict)

    def add(self, kind: str, seconds: float) -> None:
        self.seen.setdefault(kind, []).append(seconds)

    def table(self) -> list[str]:
        rows = [f"{'fault':<36} {'times':>5} {'median s':>9} {'worst s':>8}"]
        for kind, values in self.seen.items():
            rows.append(f"{kind:<36} {len(values):>5} {statistics.median(values):>9.2f} {max(values):>8.2f}")
        return rows


def worst_after(gaps: list[Gap], start: float, end: float) -> float:
    """The longest of the gaps that overlap the time from `start` to `end`, 0 if there is none."""
    return max((gap["end"] - gap["start"] for gap in gaps if gap["end"] >= start and gap["start"] <= end), default=0.0)
