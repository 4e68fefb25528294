from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from share_manager.bench.flush import FLUSH_TARGETS
from share_manager.bench.measure import Outcome, Plan
from share_manager.bench.model import CELLS, FlushSample, Sample, Workload
from share_manager.bench.nfs.targets import NFS_TARGETS
from share_manager.bench.report import Report, compact, filesystem_of, print_report, report, summarise
from share_manager.bench.summary import Spread
from share_manager.bench.targets import BLOCK_TARGETS, FILE_TARGETS

MIB = 1 << 20


def sample(rate: float, cpu: float | None = None) -> Sample:
    return Sample(operations=10, per_second=rate, bytes_per_second=rate * 4096, cpu_us=cpu)


def plan(directory: Path) -> Plan:
    return Plan(directory, 1 << 30, 3, 3, CELLS[:2], BLOCK_TARGETS[:3], FILE_TARGETS[:2])


def outcome() -> Outcome:
    return Outcome(
        cells={
            ("plain", CELLS[0]): [sample(100.0), sample(80.0), sample(120.0)],
            ("loop", CELLS[0]): [sample(50.0)] * 3,
            ("engine-1", CELLS[0]): [sample(24.0, 12.0), sample(25.0, 13.0), sample(26.0, 20.0)],
        },
        workloads={("directory", Workload.CREATE): [sample(500.0)]},
        unavailable={"ext4-loop": "no [such] thing"},
    )


def test_nfs_rows_are_compared_with_their_own_mount_options(tmp_path: Path) -> None:
    asked = replace(plan(tmp_path), files=(FILE_TARGETS[0], *NFS_TARGETS))
    rates = {target.name: 100.0 * (number + 1) for number, target in enumerate(asked.files)}
    outcome = Outcome(workloads={(name, Workload.OVERWRITE): [sample(rate)] for name, rate in rates.items()})
    found = {one.target: one.measured.ratios for one in report(asked, outcome).workloads}
    assert found["nfs-engine-3"] == {"nfs-stock": rates["nfs-engine-3"] / rates["nfs-stock"]}
    assert found["nfs-serve"].keys() == {"nfs-stock"}
    assert found["nfs-engine-3-nodirsync"].keys() == {"nfs-stock-nodirsync"}
    out = io.StringIO()
    print_report(report(asked, outcome), Console(file=out, width=110))
    assert "NFS:" in out.getvalue()
    assert "files:" not in out.getvalue().split("NFS: stream")[1]


def test_a_flush_is_compared_with_its_two_parts(tmp_path: Path) -> None:
    asked = replace(plan(tmp_path), flushes=FLUSH_TARGETS)
    samples = [FlushSample(150.0, 50.0, 300.0), FlushSample(100.0, 50.0, 150.0), FlushSample(50.0, 50.0, 120.0)]
    (found,) = report(asked, Outcome(flushes={"fsync-3": samples}, unavailable={"fsync-1": "gone"})).flushes
    assert (found.target, found.replicas) == ("fsync-3", 3)
    assert found.expected_us == Spread(150.0, 100.0, 200.0)
    assert found.ratio == Spread(1.2, 1.0, 1.5)
    out = io.StringIO()
    print_report(report(asked, Outcome(flushes={"fsync-3": samples})), Console(file=out, width=110))
    assert "1.20" in out.getvalue()


def test_ratios_are_of_medians_to_the_first_two_targets(tmp_path: Path) -> None:
    found = report(plan(tmp_path), outcome())
    engine = next(one.measured for one in found.cells if one.target == "engine-1")
    assert engine.ratios == {"plain": 0.25, "loop": 0.5}
    assert engine.per_second == Spread(25.0, 24.0, 26.0)
    assert engine.cpu_us == Spread(13.0, 12.0, 20.0)
    assert next(one.measured for one in found.cells if one.target == "plain").ratios == {"plain": 1.0, "loop": 2.0}


def test_a_base_that_was_not_measured_gives_no_ratio() -> None:
    assert summarise([sample(1.0)], {"plain": [], "loop": [sample(2.0)]}).ratios == {"loop": 0.5}


def test_json_says_all_of_it(tmp_path: Path) -> None:
    found = report(plan(tmp_path), outcome())
    assert msgspec.json.decode(msgspec.json.encode(found), type=Report) == found
    raw = msgspec.json.decode(msgspec.json.encode(found))
    assert raw["format"] == 1
    assert raw["cells"][0]["cell"] == {"pattern": "random", "block_size": 4096, "depth": 1, "operation": "read"}
    assert raw["cells"][0]["measured"]["per_second"] == {"median": 100.0, "min": 80.0, "max": 120.0}


def test_tables_show_medians_ratios_and_why_a_target_is_missing(tmp_path: Path) -> None:
    out = io.StringIO()
    print_report(report(plan(tmp_path), outcome()), Console(file=out, width=110))
    text = out.getvalue()
    assert "4 KiB random, depth 1: operations/s" in text
    assert "25.0 0.25 0.50" in text
    assert "24.0..26.0" in text
    assert "13/-" in text or " 13 " in text
    assert "not measured: no [such] thing" in text


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0.0"), (7.26, "7.3"), (845.2, "845"), (999.6, "1.00k"), (9120, "9.12k"), (12345, "12.3k"), (208e3, "208k")],
)
def test_three_digits(value: float, shown: str) -> None:
    assert compact(value) == shown


def test_the_filesystem_is_that_of_the_nearest_mount() -> None:
    mountinfo = (
        "1 0 8:1 / / rw shared:1 - ext4 /dev/a rw\n"
        "2 1 0:5 / /a rw - tmpfs none rw\n"
        "3 1 0:6 / /a\\040b rw shared:2 master:3 - xfs /dev/b rw\n"
    )
    assert filesystem_of(Path("/a/c"), mountinfo) == "tmpfs"
    assert filesystem_of(Path("/a b/c"), mountinfo) == "xfs"
    assert filesystem_of(Path("/ab"), mountinfo) == "ext4"
