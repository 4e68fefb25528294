"""fio's numbers are read from output that fio 3.33 printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from share_manager.bench import fio
from share_manager.bench.model import CELLS, QUICK_CELLS, Cell, Operation, Pattern

DATA = Path(__file__).parent / "data"


def test_a_read_is_read() -> None:
    sample = fio.parse((DATA / "fio-randread-1-0.json").read_text(), Operation.READ)
    assert sample.per_second * 4096 == pytest.approx(sample.bytes_per_second, rel=0.01)
    assert sample.operations == pytest.approx(sample.per_second, rel=0.01)
    assert sample.latency_us is not None
    assert sample.latency_us == pytest.approx(1e6 / sample.per_second, rel=0.3)
    assert sample.p99_us is not None


def test_a_write_with_fsync_takes_as_long_as_both() -> None:
    output = (DATA / "fio-randwrite-1-1.json").read_text()
    sample = fio.parse(output, Operation.WRITE_FSYNC)
    assert (sample.operations, round(sample.per_second), round(sample.bytes_per_second)) == (7268, 7261, 29739988)
    assert sample.latency_us is not None
    assert sample.latency_us == pytest.approx(1e6 / sample.per_second, rel=0.1)
    assert sample.p99_us is None
    assert fio.parse(output, Operation.WRITE).latency_us == pytest.approx(84.128, abs=0.001)


def test_what_fio_says_before_its_json_is_passed_over() -> None:
    output = (DATA / "fio-randwrite-32-0.json").read_text()
    assert fio.parse("note: something\n" + output, Operation.WRITE) == fio.parse(output, Operation.WRITE)


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("", "not fio's JSON"),
        ("fio: no", "not fio's JSON"),
        ('{"jobs": []}', "not fio's JSON"),
        ('{"jobs": [{"error": 5}]}', "error 5"),
        ('{"jobs": [{"error": 0, "read": {"total_ios": 0}}]}', "no request"),
        ('{"jobs": [{"error": 0, "read": {"total_ios": 3, "lat_ns": null}}]}', "not fio's JSON"),
    ],
)
def test_no_numbers_is_an_error(output: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        fio.parse(output, Operation.READ)


def test_a_read_is_not_found_among_writes() -> None:
    with pytest.raises(ValueError, match="no request"):
        fio.parse((DATA / "fio-randwrite-1-1.json").read_text(), Operation.READ)


def test_the_command_says_what_the_cell_says() -> None:
    cell = Cell(Pattern.SEQUENTIAL, 128 << 10, 32, Operation.WRITE_FSYNC)
    argv = fio.cell_argv(cell, Path("/dev/a:b"), 1 << 30, 0.5)
    for part in ("--rw=write", "--bs=131072", "--iodepth=32", "--fsync=1", "--direct=1", "--runtime=500ms"):
        assert part in argv
    assert r"--filename=/dev/a\:b" in argv


def test_the_cells_are_those_that_the_issue_names() -> None:
    assert len(set(CELLS)) == 12
    assert set(QUICK_CELLS) < set(CELLS)
