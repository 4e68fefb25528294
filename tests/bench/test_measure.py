"""The order of a run, and what a target that fails does to it: on targets that are only names."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from share_manager.bench import files, fio, measure
from share_manager.bench.measure import FioMissingError, NoRoomError, Plan
from share_manager.bench.model import CELLS, Workload
from share_manager.bench.processes import UnavailableError
from share_manager.bench.targets import BlockTarget, FileTarget, Opened, Place
from share_manager.errors import NotRootError

DATA = Path(__file__).parent / "data"


class Watch:
    def __init__(self) -> None:
        self.steps = 0
        self.events: list[str] = []

    def doing(self, what: str) -> None:
        self.events.append(what)

    def done(self, steps: int = 1) -> None:
        self.steps += steps


def block(name: str, log: list[str], fails: bool = False) -> BlockTarget:
    @contextlib.asynccontextmanager
    async def opened(place: Place) -> AsyncIterator[Opened]:
        if fails:
            raise UnavailableError("it is not here")
        log.append(f"open {name}")
        try:
            yield Opened(place.directory / name)
        finally:
            log.append(f"close {name}")

    return BlockTarget(name, name, 1, opened)


def directory(name: str) -> FileTarget:
    @contextlib.asynccontextmanager
    async def opened(place: Place, _: Opened | None) -> AsyncIterator[Opened]:
        (place.directory / name).mkdir()
        yield Opened(place.directory / name)
        (place.directory / name).rmdir()

    make: Callable[[Place, Opened | None], AbstractAsyncContextManager[Opened]] = opened
    return FileTarget(name, name, 0, None, make, (Workload.APPEND,))


def plan_with(tmp_path: Path, blocks: tuple[BlockTarget, ...], names: tuple[FileTarget, ...] = ()) -> Plan:
    return Plan(tmp_path, 1 << 20, 0.01, 2, CELLS[:2], blocks, names)


@pytest.fixture
def fio_runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """fio without fio: (target, mode) of each run; the target named `bad` fails at its first cell."""
    runs: list[tuple[str, str]] = []

    async def run(argv: list[str], target: str) -> str:
        mode = next(arg for arg in argv if arg.startswith("--rw="))[5:]
        runs.append((target, "fill" if "--end_fsync=1" in argv else mode))
        if target == "bad" and runs[-1][1] != "fill":
            raise fio.FioError(target, "I/O error")
        return (
            DATA / f"fio-rand{'read' if mode == 'randread' else 'write'}-1-{int(mode != 'randread')}.json"
        ).read_text()

    monkeypatch.setattr(fio, "run", run)
    monkeypatch.setattr("shutil.which", lambda name: name)
    return runs


@pytest.fixture
def opened_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Plan, "devices", property(lambda self: self.block))


@pytest.mark.usefixtures("opened_all")
async def test_targets_take_turns_and_change_places(tmp_path: Path, fio_runs: list[tuple[str, str]]) -> None:
    log: list[str] = []
    plan = plan_with(tmp_path, (block("a", log), block("b", log)), (directory("d"),))
    watch = Watch()
    outcome = await measure.measure(plan, watch)
    assert fio_runs == [
        *(("a", "fill"), ("b", "fill")),
        *(("a", "randread"), ("b", "randread"), ("a", "randwrite"), ("b", "randwrite")),
        *(("b", "randread"), ("a", "randread"), ("b", "randwrite"), ("a", "randwrite")),
    ]
    assert log == ["open a", "open b", "close b", "close a"]
    assert {key: len(samples) for key, samples in outcome.cells.items()} == {
        (name, cell): 2 for name in ("a", "b") for cell in plan.cells
    }
    assert len(outcome.workloads["d", Workload.APPEND]) == 2
    assert watch.steps == plan.steps
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("opened_all")
async def test_a_target_that_fails_leaves_the_others_alone(tmp_path: Path, fio_runs: list[tuple[str, str]]) -> None:
    log: list[str] = []
    plan = plan_with(tmp_path, (block("gone", log, fails=True), block("bad", log), block("good", log)))
    watch = Watch()
    outcome = await measure.measure(plan, watch)
    assert outcome.unavailable == {"gone": "it is not here", "bad": "fio on bad failed: I/O error"}
    assert {name for name, _ in outcome.cells} == {"good"}
    assert watch.steps == plan.steps
    assert fio_runs.count(("bad", "randread")) == 1


def test_what_makes_a_run_pointless_is_said_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_with(tmp_path, (block("loop", []),))
    with monkeypatch.context() as patch:
        patch.setattr("shutil.which", lambda _: None)
        with pytest.raises(FioMissingError, match="apt-get install fio"):
            measure.check(plan)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.which", lambda name: name)
        patch.setattr("os.geteuid", lambda: 1000)
        with pytest.raises(NotRootError):
            measure.check(plan)
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(measure, "SLACK", 1 << 60)
    with pytest.raises(NoRoomError, match="smaller --size"):
        measure.check(plan)


def test_a_workload_counts_and_leaves_nothing(tmp_path: Path) -> None:
    for workload in Workload:
        done = files.load(workload, tmp_path, 0.05, 8 << 20, lambda: False)
        assert done.operations >= 1
        assert done.seconds >= 0.05
        assert done.bytes == done.operations * (files.CHUNK if workload is Workload.STREAM else 4096)
    assert list(tmp_path.iterdir()) == []


def test_a_workload_that_is_stopped_ends_early(tmp_path: Path) -> None:
    for workload in Workload:
        assert files.load(workload, tmp_path, 30, 8 << 20, lambda: True).seconds < 10
