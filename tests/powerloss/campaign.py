"""One run: a guest works on logged disks until its power is cut, then every chosen point of the logs is tried."""

from __future__ import annotations

import contextlib
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from engine.record import VolumeRecord
from tests.lab.guest import CHECKOUT, Guest
from tests.lab.network import Lab
from tests.powerloss import workload
from tests.powerloss.check import check
from tests.powerloss.disks import LOG_SIZE, PowerLossError, make_disk, make_volume
from tests.powerloss.inside import Outcome, Plan
from tests.powerloss.writelog import FUA, Disk, Entry, copy_sparse

VOLUME_SIZE = 16 << 20
Say = Callable[[str], None]


class Point(msgspec.Struct, frozen=True, eq=False):
    """Where all logs are cut. `written` of an instant says which unflushed writes the disks had got by then."""

    positions: tuple[int, ...]
    acknowledged: int
    record: VolumeRecord
    written: tuple[int, ...] | None = None


class Figures(msgspec.Struct):
    operations: int = 0
    seconds: float = 0.0
    entries: int = 0
    flushes: int = 0
    possible: int = 0
    points: int = 0
    unflushed_blocks: int = 0
    records: int = 0
    equalised: int = 0
    resynced: int = 0
    lost: list[str] = []

    def add(self, other: Figures) -> Figures:
        return Figures(*(mine + theirs for mine, theirs in zip(_values(self), _values(other), strict=True)))

    def __str__(self) -> str:
        return (
            f"{self.operations} operations in {self.seconds:.1f} s, {self.entries} log entries with {self.flushes} "
            f"flushes; {self.points} of {self.possible} points replayed, {self.unflushed_blocks} unflushed blocks "
            f"kept at random, {self.records} files verified, {self.equalised} regions equalised, "
            f"{self.resynced} replicas brought back, {len(self.lost)} points with a loss"
        )


def _values(figures: Figures) -> tuple[Any, ...]:
    return msgspec.structs.astuple(figures)


class Machine:
    """The images of one run and the guest that writes them."""

    def __init__(self, lab: Lab, plan: Plan, name: str = "outage") -> None:
        self.plan = plan
        self.lab = lab
        self.directory = lab.directory / f"power-{name}"
        self.name = name
        self.names = [f"r{i + 1}" for i in range(plan.replicas)]

    def disk(self, name: str) -> Path:
        return self.directory / f"{name}.img"

    def log(self, name: str) -> Path:
        return self.directory / f"{name}.log"

    def work(self) -> Outcome:
        """Boot, run the workload, cut the power."""
        self.directory.mkdir()
        volume = self.directory / "volume.img"
        make_volume(volume, self.plan.size)
        disks: list[Path] = []
        for name in self.names:
            make_disk(
                self.disk(name),
                volume,
                name=self.plan.volume,
                replica=name,
                uuid=self.plan.uuid,
                size=self.plan.size,
            )
            # the guest writes to a copy: the replay begins with what was there before
            copy_sparse(self.disk(name), self.disk(name).with_suffix(".live"))
            with self.log(name).open("wb") as log:
                log.truncate(LOG_SIZE)
            disks += [self.disk(name).with_suffix(".live"), self.log(name)]
        guest = Guest(self.lab, self.name, memory="512M", disks=disks)
        try:
            guest.start()
            done = guest.run(
                *("env", f"PYTHONPATH={CHECKOUT}", "PYTHONDONTWRITEBYTECODE=1", sys.executable),
                *("-m", "tests.powerloss.inside", msgspec.json.encode(self.plan).decode()),
                timeout=1800.0,
            )
        finally:
            guest.close()
        return msgspec.json.decode(done.stdout, type=Outcome)


def points_of(logs: Sequence[Sequence[Entry]], outcome: Outcome) -> list[Point]:
    """All positions at which the logs can be cut together.

    With one disk, behind every flush and every mark. With several, at every instant whose two marks stand side by
    side in all logs, and, between two such instants, wherever only one disk had been flushed meanwhile.
    """
    marks = [{entry.mark: at for at, entry in enumerate(log) if entry.mark} for log in logs]
    acked = [_acknowledged(log) for log in logs]
    found: list[Point] = []
    last: Point | None = None
    for instant in outcome.instants:
        begin, end = f"<{instant.number}", f"{instant.number}>"
        if not all(begin in of and end in of and of[end] == of[begin] + 1 for of in marks):
            continue
        positions = tuple(of[begin] for of in marks)
        if positions[0] < marks[0]["begin"]:
            continue
        point = Point(
            positions,
            acked[0][positions[0]],
            msgspec.convert(instant.record, VolumeRecord, strict=False),
            tuple(instant.written),
        )
        if last is not None and last.record == point.record:
            found += _between(logs, last, point, acked)
        found.append(point)
        last = point
    return found


def _between(logs: Sequence[Sequence[Entry]], before: Point, after: Point, acked: Sequence[list[int]]) -> list[Point]:
    moved = [
        index
        for index, (log, first, last) in enumerate(zip(logs, before.positions, after.positions, strict=True))
        if any(entry.sectors or entry.settles for entry in log[first:last])
    ]
    if len(moved) != 1:
        return []
    index = moved[0]
    found = []
    for at in range(before.positions[index] + 2, after.positions[index]):
        if logs[index][at - 1].settles:
            positions = list(after.positions)
            positions[index] = at
            found.append(Point(tuple(positions), acked[index][at], before.record))
    return found


def _of_one_operation(disk: Disk) -> bool:
    """Whether what the next flush brings was written before a further operation could begin."""
    for entry in disk.entries[disk.position :]:
        if entry.settles:
            return True
        if entry.mark.startswith("ack:") or entry.flags & FUA:
            return False
    return True


def _acknowledged(log: Sequence[Entry]) -> list[int]:
    """By position: how many operations were acknowledged before it."""
    found = [0]
    for entry in log:
        found.append(int(entry.mark[4:]) if entry.mark.startswith("ack:") else found[-1])
    return found


def chosen(points: Sequence[Point], rich: Sequence[Point], most: int) -> list[Point]:
    """At most that many of them, evenly spread, half of them out of the `rich` ones; in their order."""
    picked = dict.fromkeys(spread(rich, most // 2))
    picked |= dict.fromkeys(spread([point for point in points if point not in picked], most - len(picked)))
    return [point for point in points if point in picked]


def spread(points: Sequence[Point], most: int) -> Sequence[Point]:
    if len(points) <= most:
        return points
    return [points[int((i + 0.5) * len(points) / most)] for i in range(most)]


def replay(machine: Machine, outcome: Outcome, most: int, say: Say = lambda line: None) -> Figures:
    plan = machine.plan
    directory = machine.directory / "replay"
    directory.mkdir()
    rng = Random(plan.seed)
    figures = Figures(operations=outcome.acknowledged, seconds=outcome.seconds)
    states = workload.states(plan.seed, outcome.acknowledged + 1)
    with contextlib.ExitStack() as stack:
        disks = {}
        for name in machine.names:
            disk = disks[name] = Disk(machine.disk(name), machine.log(name), directory / f"{name}.durable")
            stack.callback(disk.close)
        logs = [disk.entries for disk in disks.values()]
        figures.entries = sum(map(len, logs))
        figures.flushes = sum(entry.settles for log in logs for entry in log)
        points = points_of(logs, outcome)
        figures.possible = len(points)
        sums = [list(accumulate((entry.sectors for entry in log), initial=0)) for log in logs]
        rich = [
            point
            for point in points
            if point.written and any(w > s[at] for w, s, at in zip(point.written, sums, point.positions, strict=True))
        ]
        told = time.monotonic()
        for number, point in enumerate(chosen(points, rich, most)):
            left = {}
            for index, (name, disk) in enumerate(disks.items()):
                disk.advance(point.positions[index])
                extra: list[Entry] = []
                if point.written is not None:
                    extra = disk.unflushed(point.written[index] - disk.certain)
                elif plan.replicas == 1 and _of_one_operation(disk):
                    extra = disk.unflushed()
                left[name] = directory / f"{name}.left"
                figures.unflushed_blocks += disk.cut(left[name], extra, rng)
            key = bytes.fromhex(plan.secret)
            try:
                verdict = check(left, point.record, key, directory, states, point.acknowledged, number % plan.replicas)
            except PowerLossError as error:
                figures.lost.append(f"positions {point.positions}, {point.acknowledged} acknowledged: {error}")
                say(figures.lost[-1])
            else:
                figures.records += verdict.files
                figures.equalised += verdict.dirty_regions
                figures.resynced += verdict.resynced
            figures.points += 1
            if time.monotonic() - told > 10:
                told = time.monotonic()
                say(str(figures))
    return figures


def plan(seed: int, replicas: int, operations: int, outages: tuple[tuple[int, int], ...] = (), **more: str) -> Plan:
    return Plan(
        seed=seed,
        operations=operations,
        replicas=replicas,
        volume="vol1",
        uuid=str(uuid.UUID(int=Random(seed).getrandbits(128), version=4)),
        size=VOLUME_SIZE,
        secret=Random(seed).randbytes(32).hex(),
        outages=outages,
        **more,
    )
