"""A campaign: faults in two lanes and a workload on top, for a time; then all is mended, verified and compared."""

from __future__ import annotations

import contextlib
import errno
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec
import trio

from share_manager.errors import RuntimeProblem
from share_manager.share.attachment import Attachment
from share_manager.share.commands import run
from share_manager.share.filesystem import FilesystemOptions, Mounted, mounted
from share_manager.share.onvolume import on_volume
from tests.chaos.faults import KINDS, Kind
from tests.chaos.field import Field, Tell, field, workplace
from tests.chaos.files import Act, Cut, Order, Said, Totals
from tests.chaos.flips import scrub
from tests.chaos.inflict import Inflictor
from tests.chaos.report import Report, by_kind, summarise

SIZE = 192 << 20
_MENDED = 180.0
_ORDER = 300.0
_PATIENCE = 30.0
# seconds until what a fault did is felt
_SOON = 1.0


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """`seconds` of faults; mending and verifying come on top. `logs`: where the logs are copied to. `pace` divides
    the pauses between faults."""

    seconds: float
    seed: int
    replicas: int = 3
    kinds: Sequence[Kind] = KINDS
    logs: Path | None = None
    pace: float = 1.0


class Files:
    """The workload's process."""

    def __init__(self, process: trio.Process, cut: Cut, tell: Tell) -> None:
        self.cut = cut
        self._process = process
        self._tell = tell
        self._serial = 0
        self._answers: dict[int, str] = {}
        self._news = trio.Event()
        self.totals = Totals()
        self.stalls: list[tuple[float, float]] = []
        self.wrong: list[str] = []
        self.broken = ""
        self.full = False
        self.progressed = 0.0
        self._outage = 0.0

    async def listen(self) -> None:
        """Raises RuntimeError when it ends, which it never should."""
        assert self._process.stdout is not None
        rest = b""
        async for chunk in self._process.stdout:
            *whole, rest = (rest + chunk).split(b"\n")
            for line in whole:
                self._heard(msgspec.json.decode(line, type=Said))
            self._news.set()
            self._news = trio.Event()
        raise RuntimeError("the workload's process ended")

    def _heard(self, said: Said) -> None:
        match said.event:
            case "done":
                self._answers[said.serial] = self.broken = said.message
                self.full = said.error == errno.ENOSPC
            case "totals":
                assert said.totals is not None
                if said.totals.operations > self.totals.operations:
                    self.progressed = time.monotonic()
                self.totals = said.totals
            case "stall":
                self.stalls.append((said.start, said.end))
                if said.end - said.start > 2:
                    self._tell(f"workload: {said.message} took {said.end - said.start:.2f} s")
            case "broken":
                self.broken = said.message
                self.full = said.error == errno.ENOSPC
                self._outage = self._outage or time.monotonic()
                self._tell(f"workload: {said.message}")
            case "wrong":
                self.wrong.append(said.message)
                self._tell(f"WRONG: {said.message}")

    async def order(self, act: Act, where: Path | None = None, *, journal_failed: bool = False) -> None:
        """Raises RuntimeProblem when it met an I/O error."""
        self._serial += 1
        serial = self._serial
        order = Order(serial, act, str(where or ""), journal_failed)
        assert self._process.stdin is not None
        await self._process.stdin.send_all(msgspec.json.encode(order) + b"\n")
        with trio.fail_after(_ORDER):
            while serial not in self._answers:
                await self._news.wait()
        if message := self._answers.pop(serial):
            raise RuntimeProblem(f"the workload met an error: {message}")
        if self._outage:
            self.stalls.append((self._outage, time.monotonic()))
            self._outage = 0.0


@contextlib.asynccontextmanager
async def files(seed: int, directory: Path, tell: Tell) -> AsyncIterator[Files]:
    cut = directory / "cut"
    with (directory / "files.log").open("wb") as errors:
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "tests.chaos.files", str(seed), str(cut)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
    made = Files(process, Cut(cut), tell)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(made.listen)
            yield made
            nursery.cancel_scope.cancel()
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            for stream in (process.stdin, process.stdout):
                assert stream is not None
                await stream.aclose()


class Campaign:
    def __init__(self, options: Options, on: Field, files: Files, tell: Tell) -> None:
        self.options = options
        self.field = on
        self.files = files
        self.tell = tell
        self.inflictor = Inflictor(on, options.seed, options.kinds, tell, options.pace)
        self.problems: list[str] = []
        self.fsck = "no e2fsck ran"
        self._journal_failed = False
        self._began = trio.Event()
        self._ending = trio.Event()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._inflict)
            await self.field.attached(self._use, with_loop=True)
            nursery.cancel_scope.cancel()
        self._judge()

    # the workload's side

    async def _use(self, attachment: Attachment) -> bool:
        self.files.cut.set(False)
        attachment.before_abort.append(lambda: self.files.cut.set(True))
        async with self._mounted(attachment) as on, trio.open_nursery() as nursery:
            nursery.start_soon(self._watch, attachment, on)
            await self.files.order("go", on.data, journal_failed=self._journal_failed)
            self._journal_failed = False
            self._began.set()
            await self._keep_going(on)
            if not await self.field.wait_whole(_MENDED):
                self.problems.append(f"not all replicas were in sync {_MENDED:.0f} s after the last fault")
            if self.files.broken:
                await self.files.order("go", on.data)
            await self.files.order("stop")
            await self.files.order("verify", on.data)
            nursery.cancel_scope.cancel()
        status, output = await run("e2fsck", "-fn", attachment.device, ok=range(256), timeout=300)
        self.fsck = f"e2fsck -fn: {'clean' if status == 0 else f'status {status}'}"
        if status:
            self.problems.append(f"e2fsck: {output.strip()}")
        async with self._mounted(attachment) as on:
            await self.files.order("verify", on.data)
        # of the flipped bits some were in what nobody has read
        left = await scrub(self.field)
        if left.undecidable:
            self.problems.append(f"the scrub could not decide {left.undecidable} differences")
        return True

    async def _keep_going(self, on: Mounted) -> None:
        """Until the end. A full disk stops the writers, but not the attachment: they go on when there is room again."""
        while not self._ending.is_set():
            with trio.move_on_after(1.0):
                await self._ending.wait()
            if self.files.full:
                try:
                    await self.files.order("go", on.data)
                except RuntimeProblem:
                    if not self.files.full:
                        raise

    def _mounted(self, attachment: Attachment) -> contextlib.AbstractAsyncContextManager[Mounted]:
        paths, record = self.field.paths, self.field.record
        return mounted(
            attachment.device,
            volume=paths.volume,
            volume_uuid=record.uuid,
            marker=paths.formatting,
            inherited=paths.inherited_uuids,
            target=paths.mountpoint,
            options=FilesystemOptions(),
            report=self.field.report,
            give_up=attachment.break_off,
        )

    async def _watch(self, attachment: Attachment, on: Mounted) -> None:
        """As `serve` does: a filesystem that failed ends the attachment. An unexplained error is a problem."""
        broken_since = 0.0
        while True:
            await trio.sleep(0.5)
            if fault := await on_volume(on.fault):
                # by itself, not because the volume below was taken from it
                self._journal_failed = self._journal_failed or attachment.broken is None
                attachment.break_off(fault)
            unexplained = self.files.broken and not self.files.full
            broken_since = (broken_since or trio.current_time()) if unexplained else 0.0
            if broken_since and trio.current_time() - broken_since > _PATIENCE:
                self.problems.append(f"an error that nothing explains: {self.files.broken}")
                attachment.break_off(self.files.broken)

    async def _inflict(self) -> None:
        await self._began.wait()
        await self.inflictor.run(self.options.seconds)
        self.tell("no more faults; waiting until all is mended")
        self._ending.set()

    def _judge(self) -> None:
        for fault in self.inflictor.faults:
            overlapping = [
                end - start for start, end in self.files.stalls if end >= fault.start and start <= fault.end + _SOON
            ]
            fault.stall = max(overlapping, default=0.0)
            fault.survived = self.files.progressed > fault.end


async def campaign(options: Options, tell: Tell) -> Report:
    """Raises AssertionError when it leaves something behind on the machine."""
    began = trio.current_time()

    def timed(line: str) -> None:
        tell(f"{trio.current_time() - began:8.2f} {line}")

    with workplace() as (directory, mark):
        try:
            async with (
                field(directory, mark, replicas=options.replicas, size=SIZE, tell=timed) as on,
                files(options.seed, directory, timed) as workload,
            ):
                run_ = Campaign(options, on, workload, timed)
                await run_.run()
        finally:
            if options.logs is not None:
                for log in [*directory.glob("*.log"), *directory.glob("data/volumes/*/log/*")]:
                    options.logs.mkdir(parents=True, exist_ok=True)
                    shutil.copy(log, options.logs)
    return _report(options, run_)


def _report(options: Options, done: Campaign) -> Report:
    on, totals = done.field, done.files.totals
    problems = [*done.problems, *done.files.wrong, *on.differences]
    counts = on.events.counts
    return Report(
        seed=options.seed,
        replicas=options.replicas,
        seconds=options.seconds,
        faults=by_kind(done.inflictor.faults),
        injected=len(done.inflictor.faults),
        survived=sum(fault.survived for fault in done.inflictor.faults),
        missed=done.inflictor.missed,
        totals=totals,
        stalls=summarise([end - start for start, end in done.files.stalls]),
        attachments=on.attachments,
        engines_resumed=counts["engine_resumed"],
        replicas_restarted=counts["replica_started"],
        events=dict(counts),
        compared_bytes=on.record.size,
        fsck=done.fsck,
        problems=problems,
    )
