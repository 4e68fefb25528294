"""Scrub: what the disks of all in-sync replicas have now, against their checksums and against each other.

The volume is looked at region by region, while nobody writes there, so writes in flight are no differences; then, the
same way, each snapshot where its own image holds something, so every layer's blocks are read once. A replica tells the
CRC-32C of each block as its disk has it, and what its own checksums say of that.
"""

from __future__ import annotations

import struct
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import msgspec
import structlog
import trio

from engine.controller.connection import ReplicaRefusedError, ReplicaUnreachableError
from engine.controller.driver import Controller
from engine.controller.progress import Progress
from engine.errors import BusyError, EngineError
from engine.operations import Scrub, Scrubbed, ScrubFinding
from engine.store.digest import BAD, GOOD, HELD, UNREADABLE, UNSUMMED, VERDICT
from engine.store.sums import BLOCK
from engine.wire import messages
from engine.wire.frame import FrameType

log = structlog.get_logger()

# findings that a result names; all are counted
MAX_FINDINGS = 1000
# how long one region may take with all that waits for it
PATIENCE = 60.0


class Seen(NamedTuple):
    """One block as one replica has it; `flags` as in `engine.store.digest`."""

    crc: int
    flags: int

    @property
    def verdict(self) -> int:
        return self.flags & VERDICT


class Judgement(NamedTuple):
    """Who has a block wrong and who right. Without `right` nobody can tell: `wrong` are those who might be."""

    wrong: tuple[str, ...]
    right: tuple[str, ...]


def judge(seen: Mapping[str, Seen]) -> Judgement | None:
    """None when all is well.

    One whose own checksum denies what its disk has is never believed. Of the others more than half must agree: several
    disks do not lose a block in the same way. Where two parties are equal, one whose checksum confirms what it has goes
    before one without, and nobody can tell between two with a checksum each.
    """
    if all(one.verdict in (GOOD, UNSUMMED) for one in seen.values()) and len({one.crc for one in seen.values()}) == 1:
        return None
    truth = _majority([one.crc for one in seen.values() if one.verdict in (GOOD, UNSUMMED)])
    if truth is None:
        confirmed = {one.crc for one in seen.values() if one.verdict == GOOD}
        truth = confirmed.pop() if len(confirmed) == 1 else None
    if truth is None:
        suspects = [name for name, one in seen.items() if one.verdict in (BAD, UNREADABLE)]
        return Judgement(tuple(suspects or seen), ())
    fine = {name for name, one in seen.items() if one.crc == truth and one.verdict in (GOOD, UNSUMMED)}
    return Judgement(tuple(name for name in seen if name not in fine), tuple(name for name in seen if name in fine))


def _majority(votes: list[int]) -> int | None:
    for crc, count in Counter(votes).most_common(1):
        if 2 * count > len(votes):
            return crc
    return None


def kind(one: Seen, judgement: Judgement) -> str:
    """What is wrong with a block of a replica that the judgement names."""
    if one.verdict == UNREADABLE:
        return "unreadable"
    return "checksum" if one.verdict == BAD else "differs"


class Run(NamedTuple):
    """Blocks `first` to `last` - 1 of a region in which the same is wrong with the same replicas."""

    first: int
    last: int
    judgement: Judgement
    kinds: tuple[str, ...]


def runs(digests: Mapping[str, list[Seen]]) -> Iterator[Run]:
    """What is wrong in a region, as far as the image that was looked at is concerned."""
    current: Run | None = None
    count = min((len(blocks) for blocks in digests.values()), default=0)
    for block in range(count):
        seen = {name: blocks[block] for name, blocks in digests.items()}
        found = judge(seen)
        # what only images below hold is looked at with those
        if found is not None and any(one.flags & HELD for one in seen.values()):
            kinds = tuple(kind(seen[name], found) for name in found.wrong)
            if current is not None and current.last == block and current[2:] == (found, kinds):
                current = current._replace(last=block + 1)
                continue
            if current is not None:
                yield current
            current = Run(block, block + 1, found, kinds)
    if current is not None:
        yield current


class _Region(NamedTuple):
    digests: dict[str, list[Seen]]
    more: int


class _Scrub:
    def __init__(self, controller: Controller, request: Scrub, progress: Progress) -> None:
        self._controller = controller
        self._request = request
        self._progress = progress
        self._findings: list[ScrubFinding] = []
        self._found: Counter[str] = Counter()
        self._verified = 0
        self._done = 0
        self._total = controller.size
        self._seen: set[str] = set()

    async def run(self) -> Scrubbed:
        controller = self._controller
        began = time.monotonic()
        while controller.core.dirty:
            self._progress.advance(0, self._total, "waits until the replicas are equal after a crash")
            await trio.sleep(0.25)
        snapshots = await self._snapshots()
        self._total *= 1 + len(snapshots)
        for snapshot in ("", *snapshots):
            await self._image(snapshot)
        if self._found["repaired"]:
            await controller.flush()
        for name in self._seen:
            controller.health[name].scrubbed_at = time.time()
        return Scrubbed(
            replicas=tuple(sorted(self._seen)),
            snapshots=len(snapshots),
            verified=self._verified,
            found=sum(self._found.values()),
            repaired=self._found["repaired"],
            undecidable=self._found["undecidable"],
            findings=tuple(self._findings),
            seconds=time.monotonic() - began,
        )

    async def _snapshots(self) -> list[str]:
        """Those that all in-sync replicas have, the oldest first."""
        names: list[str] | None = None
        for replica in self._members():
            answer = await self._controller.ask(replica, FrameType.SNAPSHOTS)
            found = messages.decode(answer[5], messages.SnapshotsReply).snapshots
            here = [entry.name for entry in found if not entry.removed]
            names = here if names is None else [name for name in names if name in here]
        return names or []

    def _members(self) -> tuple[str, ...]:
        core = self._controller.core
        return core.members(core.in_sync)

    async def _image(self, snapshot: str) -> None:
        size, region_size = self._controller.size, self._controller.core.region_size
        offset = 0
        start = self._done
        while offset < size:
            before = time.monotonic()
            length = min(region_size, size - offset)
            found = await self._region(snapshot, offset, length)
            if found is None:
                break
            bytes_read = max((len(blocks) * BLOCK for blocks in found.digests.values()), default=0)
            self._verified += sum(min(len(blocks) * BLOCK, length) for blocks in found.digests.values())
            wrong = list(runs(found.digests))
            if wrong:
                await self._treat(snapshot, offset, length, wrong)
            # only a digest tells where data goes on: what was not looked at holds nothing on any replica
            offset = max(found.more, offset + length) if not found.digests else offset + length
            self._done = start + min(offset, size)
            self._progress.advance(self._done, self._total, f"snapshot {snapshot}" if snapshot else "volume")
            await self._pause(bytes_read, time.monotonic() - before)
        self._done = start + size

    async def _pause(self, count: int, took: float) -> None:
        rate = self._request.rate
        pause = max(0.0, count / rate - took) if rate else 0.0
        if self._controller.core.inflight and count:
            pause = max(pause, took)  # whoever else wants the disks gets them half of the time
        await trio.sleep(pause)

    async def _region(self, snapshot: str, offset: int, length: int) -> _Region | None:
        """None when the snapshot is gone."""
        if snapshot:
            return await self._digests(snapshot, offset, length)
        async with self._controller.guarded(offset, length, PATIENCE):
            return await self._digests("", offset, length)

    async def _digests(self, snapshot: str, offset: int, length: int) -> _Region | None:
        members = self._members()
        first = await self._ask_all(members, snapshot, offset, length, everything=False)
        if first is None:
            return None
        held = {name: blocks for name, (blocks, _) in first.items() if blocks}
        more = min((more for _, more in first.values()), default=offset + length)
        if held and len(held) < len(first):
            rest = await self._ask_all(first.keys() - held.keys(), snapshot, offset, length, everything=True)
            if rest is None:
                return None
            held |= {name: blocks for name, (blocks, _) in rest.items()}
        self._seen |= first.keys()
        return _Region({name: held[name] for name in members if name in held}, more)

    async def _ask_all(
        self, names: Iterable[str], snapshot: str, offset: int, length: int, *, everything: bool
    ) -> dict[str, tuple[list[Seen], int]] | None:
        body = messages.Digest(snapshot=snapshot, everything=everything)
        found: dict[str, tuple[list[Seen], int]] = {}
        gone = False

        async def ask(name: str) -> None:
            nonlocal gone
            try:
                answer = await self._controller.ask(name, FrameType.DIGEST, body, offset=offset, length=length)
            except ReplicaUnreachableError:
                return  # it leaves the set for that, or has left it
            except ReplicaRefusedError as error:
                if not snapshot:
                    raise
                log.info("snapshot is not scrubbed", snapshot=snapshot, reason=str(error))
                gone = True
                return
            _, _, _, more, count, payload = answer
            sums = struct.unpack_from(f"<{count}I", payload)
            found[name] = [Seen(*pair) for pair in zip(sums, payload[4 * count :], strict=True)], more

        async with trio.open_nursery() as nursery:
            for name in names:
                nursery.start_soon(ask, name)
        return None if gone else found

    async def _treat(self, snapshot: str, offset: int, length: int, wrong: list[Run]) -> None:
        """Repair what can be decided, look again, and report."""
        if self._request.repair:
            for run in wrong:
                if run.judgement.right:
                    await self._repair(snapshot, offset, run)
            again = await self._region(snapshot, offset, length)
            still = list(runs(again.digests)) if again is not None else wrong
        else:
            still = wrong
        for run in wrong:
            for replica, what in zip(run.judgement.wrong, run.kinds, strict=True):
                if not run.judgement.right:
                    outcome = "undecidable"
                elif not self._request.repair:
                    outcome = "found"
                else:
                    left = any(
                        replica in other.judgement.wrong and other.first < run.last and run.first < other.last
                        for other in still
                    )
                    outcome = "failed" if left else "repaired"
                self._report(snapshot, offset, run, replica, what, outcome)

    def _report(self, snapshot: str, offset: int, run: Run, replica: str, what: str, outcome: str) -> None:
        finding = ScrubFinding(
            replica=replica,
            snapshot=snapshot,
            offset=offset + run.first * BLOCK,
            length=(run.last - run.first) * BLOCK,
            kind=what,
            outcome=outcome,
        )
        self._found[outcome] += 1
        health = self._controller.health[replica]
        health.damaged += 1
        health.repaired += outcome == "repaired"
        if len(self._findings) < MAX_FINDINGS:
            self._findings.append(finding)
        log.error("scrub found damage", **msgspec.structs.asdict(finding))

    async def _repair(self, snapshot: str, offset: int, run: Run) -> None:
        start = offset + run.first * BLOCK
        length = min((run.last - run.first) * BLOCK, self._controller.size - start)
        try:
            with trio.fail_after(PATIENCE):
                if snapshot:
                    await self._mend(snapshot, start, length, run.judgement)
                else:
                    by_checksum = all(what == "checksum" for what in run.kinds)
                    await self._controller.repair(
                        start, length, run.judgement.wrong, run.judgement.right, by_checksum=by_checksum
                    )
        except (EngineError, trio.TooSlowError) as error:
            log.error("a block could not be put right", snapshot=snapshot, offset=start, reason=str(error))

    async def _mend(self, snapshot: str, offset: int, length: int, judgement: Judgement) -> None:
        read = messages.ReadSnapshot(name=snapshot)
        source = judgement.right[0]
        data = (await self._controller.ask(source, FrameType.READ_SNAPSHOT, read, offset=offset, length=length))[5]
        body = messages.Mend(snapshot=snapshot, data=data, force=True)
        for replica in judgement.wrong:
            await self._controller.ask(replica, FrameType.MEND, body, offset=offset, length=length)


async def scrub(controller: Controller, request: Scrub, progress: Progress) -> Scrubbed:
    """Raises BusyError while another scrub runs, EngineError."""
    if controller.scrubbing:
        raise BusyError(controller.record.volume, "a scrub")
    controller.scrubbing = True
    try:
        return await _Scrub(controller, request, progress).run()
    finally:
        controller.scrubbing = False
