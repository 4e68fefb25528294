"""Records what clients of the block file see, one attachment after the other, while faults go on below."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable

import msgspec
import trio

from share_manager.share.attachment import Attachment
from tests.chaos.faults import KINDS
from tests.chaos.field import Field, Tell, field, workplace
from tests.chaos.inflict import Inflictor
from tests.linearizability.checker import Operation
from tests.linearizability.clients import Act

SIZE = 16 << 20
# the others need a filesystem, or stand still for long
KINDS_HERE = [kind for kind in KINDS if kind.name != "fill a replica's disk" and kind.seconds[1] <= 5.0]


class Recorder:
    """Clients on one attachment after the other; each is an era."""

    def __init__(self, on: Field, inflictor: Inflictor, seed: int) -> None:
        self.eras: list[list[Act]] = []
        self.errors: list[str] = []
        self._field = on
        self._inflictor = inflictor
        self._seed = seed
        self._begun = trio.Event()
        self._ending = trio.Event()

    async def run(self, seconds: float) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._inflict, seconds)
            await self._field.attached(self._era, with_loop=False)
            nursery.cancel_scope.cancel()

    async def _inflict(self, seconds: float) -> None:
        await self._begun.wait()
        await self._inflictor.run(seconds)
        self._ending.set()

    async def _era(self, attachment: Attachment) -> bool:
        number = len(self.eras)
        self.eras.append([])
        argv = [str(self._field.paths.block_file), f"{self._seed} {number}", str((number + 1) << 32)]
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "tests.linearizability.clients", *argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            self._begun.set()
            await self._ending.wait()
            assert await self._field.wait_whole(120), "the replicas did not come back"
            # all that was written before is looked at once more
            await trio.sleep(1.0)
        finally:
            with trio.CancelScope(shield=True):
                assert process.stdin is not None
                assert process.stdout is not None
                await process.stdin.aclose()
                written = b""
                with trio.move_on_after(60) as patience:
                    async for chunk in process.stdout:
                        written += chunk
                process.kill()
                await process.wait()
                await process.stdout.aclose()
                assert not patience.cancelled_caught, "the clients hang"
                self.eras[number] = [msgspec.json.decode(line, type=Act) for line in written.splitlines()]
        return True


def history(eras: Iterable[Iterable[Act]], block: int) -> list[list[Operation]]:
    """What concerns one block."""
    found = []
    for era in eras:
        operations = []
        for act in era:
            if act.kind == "flush":
                operations.append(Operation(kind="flush", start=act.start, end=act.end))
            elif act.first <= block < act.first + len(act.values):
                value = act.values[block - act.first]
                kind = "read" if act.kind == "read" else "write"
                operations.append(Operation(kind=kind, start=act.start, end=act.end, value=value))  # type: ignore[arg-type]
        found.append(operations)
    return found


async def record(seconds: float, seed: int, tell: Tell) -> tuple[list[list[Act]], int, list[str]]:
    """What was seen by attachment, the number of faults, and where replicas differ in the end."""
    with workplace() as (directory, mark):
        async with field(directory, mark, replicas=3, size=SIZE, tell=tell) as on:
            inflictor = Inflictor(on, seed, KINDS_HERE, tell, pace=2.0)
            recorder = Recorder(on, inflictor, seed)
            await recorder.run(seconds)
    return recorder.eras, len(inflictor.faults), on.differences
