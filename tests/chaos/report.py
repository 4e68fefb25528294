"""What a campaign did and found."""

from __future__ import annotations

import statistics
from collections import Counter

import msgspec

from tests.chaos.files import Totals


class Happened(msgspec.Struct, kw_only=True):
    """One fault. Times are monotonic seconds. `stall`: the longest operation that overlapped it."""

    kind: str
    targets: tuple[str, ...]
    start: float
    end: float
    stall: float = 0.0
    survived: bool = False


class Stalls(msgspec.Struct, frozen=True, kw_only=True):
    """In seconds: operations of the workload that took longer than `tests.chaos.files.STALL`."""

    count: int = 0
    median: float = 0.0
    worst: float = 0.0


class ByKind(msgspec.Struct, frozen=True, kw_only=True):
    injected: int
    survived: int
    median_stall: float
    worst_stall: float


class Report(msgspec.Struct, kw_only=True):
    """`problems` is empty when nothing was lost and everything ended as it must."""

    seed: int
    replicas: int
    seconds: float
    faults: dict[str, ByKind]
    injected: int
    survived: int
    missed: int
    totals: Totals
    stalls: Stalls
    attachments: int
    engines_resumed: int
    replicas_restarted: int
    events: dict[str, int]
    compared_bytes: int
    fsck: str
    problems: list[str]

    @property
    def ok(self) -> bool:
        return not self.problems


def mib(count: int) -> str:
    return f"{count / (1 << 20):.1f} MiB"


def summarise(stalls: list[float]) -> Stalls:
    if not stalls:
        return Stalls()
    return Stalls(count=len(stalls), median=round(statistics.median(stalls), 2), worst=round(max(stalls), 2))


def by_kind(faults: list[Happened]) -> dict[str, ByKind]:
    found: dict[str, ByKind] = {}
    for kind, injected in Counter(fault.kind for fault in faults).most_common():
        of_kind = [fault for fault in faults if fault.kind == kind]
        stalls = [fault.stall for fault in of_kind]
        found[kind] = ByKind(
            injected=injected,
            survived=sum(fault.survived for fault in of_kind),
            median_stall=round(statistics.median(stalls), 2),
            worst_stall=round(max(stalls), 2),
        )
    return found


def lines(report: Report) -> list[str]:
    totals, stalls = report.totals, report.stalls
    rows = [f"{'fault':<40} {'injected':>8} {'survived':>8} {'median stall':>12} {'worst stall':>12}"]
    rows += [
        f"{kind:<40} {row.injected:>8} {row.survived:>8} {row.median_stall:>10.2f} s {row.worst_stall:>10.2f} s"
        for kind, row in report.faults.items()
    ]
    events = ", ".join(f"{name} {count}" for name, count in sorted(report.events.items()))
    verdict = "nothing was lost" if report.ok else "FAILED: " + "; ".join(report.problems)
    return [
        *rows,
        f"seed {report.seed}, {report.replicas} replicas, {report.seconds:.0f} s of faults",
        f"faults injected {report.injected}, survived {report.survived}; aimed at what was not there {report.missed}",
        f"attachments {report.attachments}, engines resumed in place {report.engines_resumed}, "
        f"replicas restarted {report.replicas_restarted}",
        f"operations {totals.operations}, syncs {totals.syncs}, verified {totals.verified}; "
        f"I/O errors seen by the workload {totals.errors}",
        f"bytes written {mib(totals.written_bytes)}, synced {mib(totals.synced_bytes)}, "
        f"verified {mib(totals.verified_bytes)}",
        f"bytes lost {totals.lost_bytes}, names lost {totals.lost_names}, bytes read wrong {totals.wrong_bytes}; "
        f"names that ext4 confirmed while its journal failed {totals.unconfirmed_names}",
        f"stalls {stalls.count}, median {stalls.median:.2f} s, worst {stalls.worst:.2f} s",
        f"compared between replicas: {mib(report.compared_bytes)} each; {report.fsck}",
        f"events: {events}",
        verdict,
    ]
