"""The faults: which there are, in which order they come (pure, from a seed), and how each is done and undone."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import trio

from engine.errors import EngineError
from share_manager.errors import CommandError, TimeoutProblem
from share_manager.share.commands import run
from tests.chaos.disk import Disk
from tests.chaos.field import POLICY, Field
from tests.chaos.flips import flip, scrub
from tests.chaos.relay import Link

ENGINE = "engine"


@dataclass(frozen=True)
class Fault:
    """One fault: of `targets` (replicas), for `seconds` where it has a length. `variant`, from 0 to 1, is its own."""

    kind: str
    targets: tuple[str, ...]
    seconds: float
    variant: float


Inject = Callable[[Field, Fault], Awaitable[bool]]
"""Does it and undoes it. False when what it was meant for was not there."""


@dataclass(frozen=True)
class Kind:
    """`weight`: how often, beside others. `seconds`: shortest and longest. `targets`: how many replicas; -1 all."""

    name: str
    inject: Inject
    weight: int
    seconds: tuple[float, float] = (0.0, 0.0)
    targets: int = 1


def schedule(seed: str, kinds: Sequence[Kind], replicas: Sequence[str]) -> Iterator[tuple[Kind, Fault]]:
    """Faults without end, the same for the same seed. Each kind comes once before any comes twice."""
    rng = Random(seed)
    first = rng.sample(list(kinds), len(kinds))
    while True:
        kind = first.pop() if first else rng.choices(kinds, [kind.weight for kind in kinds])[0]
        count = len(replicas) if kind.targets < 0 else min(kind.targets, len(replicas))
        targets = tuple(sorted(rng.sample(list(replicas), count)))
        yield kind, Fault(kind.name, targets, rng.uniform(*kind.seconds), rng.random())


class Held:
    """Processes by descriptors, so that a signal never reaches another process that got the same id."""

    def __init__(self, field: Field, names: Sequence[str]) -> None:
        pids = [field.engine_pid if name == ENGINE else field.replica_pid(name) for name in names]
        self._fds: list[int] = []
        for pid in pids:
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    self._fds.append(os.pidfd_open(pid))

    def send(self, number: signal.Signals) -> None:
        for fd in self._fds:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, number)

    def __bool__(self) -> bool:
        return bool(self._fds)

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._fds:
            os.close(fd)


def _kill(*others: str) -> Inject:
    async def inject(field: Field, fault: Fault) -> bool:
        with Held(field, [*fault.targets, *others]) as held:
            held.send(signal.SIGKILL)
            return bool(held)

    return inject


async def _kill_engine_and_replica(field: Field, fault: Fault) -> bool:
    """One a moment after the other, in either order: what one had in flight meets a world without the other."""
    names = [ENGINE, *fault.targets]
    if fault.variant < 0.5:
        names.reverse()
    if field.engine_pid is None:
        return False
    for name in names:
        with Held(field, [name]) as held:
            held.send(signal.SIGKILL)
        await trio.sleep(0.2 * (fault.variant % 0.5))
    return True


def _stop(*names: str) -> Inject:
    async def inject(field: Field, fault: Fault) -> bool:
        with Held(field, [*fault.targets, *names]) as held:
            try:
                held.send(signal.SIGSTOP)
                await trio.sleep(fault.seconds)
            finally:
                held.send(signal.SIGCONT)
            return bool(held)

    return inject


async def _linked(field: Field, fault: Fault, **how: bool | float) -> bool:
    try:
        for name in fault.targets:
            await field.relays.set(Link(name=name, **how))  # type: ignore[arg-type]
        await trio.sleep(fault.seconds)
    finally:
        for name in fault.targets:
            await field.relays.set(Link(name=name))
    return True


async def _partition(field: Field, fault: Fault) -> bool:
    return await _linked(field, fault, there=False, back=False)


async def _half_cut(field: Field, fault: Fault) -> bool:
    if fault.variant < 0.5:
        return await _linked(field, fault, there=False)
    return await _linked(field, fault, back=False)


async def _delay(field: Field, fault: Fault) -> bool:
    return await _linked(field, fault, delay=0.005 + 0.25 * fault.variant**2)


async def _reset(field: Field, fault: Fault) -> bool:
    return await _linked(field, fault, reset=True)


async def _full_disk(field: Field, fault: Fault) -> bool:
    """What the filesystem does not use goes back to the disks first, so that writes need new blocks."""
    attachment = field.attachment
    if attachment is not None:
        with contextlib.suppress(CommandError, TimeoutProblem):
            await run("fstrim", str(field.paths.mountpoint), timeout=15)
    async with _disks(field, fault) as disks:
        try:
            for disk in disks:
                _on_disk(disk.fill)
            await trio.sleep(fault.seconds)
        finally:
            for disk in disks:
                _on_disk(disk.free)
    return True


def _on_disk(act: Callable[[], None]) -> None:
    """On a disk that may have failed by itself meanwhile, as ext4 does when it is full at a bad moment."""
    try:
        act()
    except OSError as error:
        if error.errno not in (errno.EIO, errno.ENXIO, errno.EROFS, errno.ESHUTDOWN):
            raise


@contextlib.asynccontextmanager
async def _disks(field: Field, fault: Fault) -> AsyncIterator[list[Disk]]:
    """The targets' disks, with which nothing else is done meanwhile."""
    disks = [field.disks[name] for name in fault.targets]
    async with contextlib.AsyncExitStack() as stack:
        for disk in disks:
            await stack.enter_async_context(disk.lock)
        yield disks


def _power_cut(*others: str) -> Inject:
    async def inject(field: Field, fault: Fault) -> bool:
        """The processes die, and what they had not synced goes with the page cache of their disks."""
        async with _disks(field, fault) as disks:
            with Held(field, [*fault.targets, *others]) as held:
                held.send(signal.SIGSTOP)
                for disk in disks:
                    _on_disk(disk.cut)
                held.send(signal.SIGKILL)
            with trio.CancelScope(shield=True):
                await trio.sleep(fault.seconds)
                for disk in disks:
                    await disk.release(partial(kill, field, disk.name))
                    await disk.mount()
        return True

    return inject


def kill(field: Field, *names: str) -> None:
    with Held(field, names) as held:
        held.send(signal.SIGKILL)


async def _record_away(field: Field, fault: Fault) -> bool:
    """The store of the volume record does not answer."""

    def hold() -> None:
        fd = os.open(field.paths.record.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            # in a thread: whoever claims the next epoch in this process waits for the lock with its whole loop
            time.sleep(fault.seconds)
        finally:
            os.close(fd)

    await trio.to_thread.run_sync(hold)
    return True


async def _flip(field: Field, fault: Fault) -> bool:
    """While all replicas are well, for only a good one can repair another; then it is looked for."""
    (name,) = fault.targets
    if not await field.wait_whole(30):
        return False
    pid = field.replica_pid(name)
    if pid is None:
        return False
    image = field.disks[name].place / "replica" / "volume-head-000.img"
    # between the look at what has a checksum and the flip the replica must not write
    os.kill(pid, signal.SIGSTOP)
    try:
        await _stopped(pid)
        offset = await trio.to_thread.run_sync(flip, image, Random(fault.variant))
    finally:
        os.kill(pid, signal.SIGCONT)
    # an engine that is killed meanwhile repairs it when it is read, or in the campaign's last scrub
    with contextlib.suppress(EngineError):
        await scrub(field)
    return offset is not None


async def _stopped(pid: int) -> None:
    with trio.fail_after(5):
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            await trio.sleep(0.001)


REPLICA_DEADLINE = 8.0
ENGINE_DEADLINE = POLICY.engine_silence

KINDS = (
    Kind("kill a replica", _kill(), 10),
    Kind("kill the engine", _kill(ENGINE), 8, targets=0),
    Kind("kill two replicas", _kill(), 4, targets=2),
    Kind("kill the engine and a replica", _kill_engine_and_replica, 5),
    Kind("kill all replicas", _kill(), 2, targets=-1),
    Kind("kill everything", _kill(ENGINE), 3, targets=-1),
    Kind("pause a replica shortly", _stop(), 8, (0.2, 4.0)),
    Kind("pause a replica beyond its deadline", _stop(), 3, (REPLICA_DEADLINE + 1, REPLICA_DEADLINE + 5)),
    Kind("pause the engine shortly", _stop(ENGINE), 5, (0.2, 5.0), targets=0),
    Kind("pause the engine beyond its deadline", _stop(ENGINE), 1, (ENGINE_DEADLINE + 1, ENGINE_DEADLINE + 4), 0),
    Kind("cut off a replica shortly", _partition, 6, (0.3, 5.0)),
    Kind("cut off a replica beyond its deadline", _partition, 3, (REPLICA_DEADLINE + 1, REPLICA_DEADLINE + 6)),
    Kind("cut off two replicas", _partition, 2, (1.0, 12.0), targets=2),
    Kind("half-cut a replica", _half_cut, 4, (1.0, 12.0)),
    Kind("delay a replica", _delay, 4, (2.0, 6.0)),
    Kind("reset a replica's connections", _reset, 4),
    Kind("fill a replica's disk", _full_disk, 4, (2.0, 6.0)),
    Kind("power cut of a replica", _power_cut(), 5, (0.0, 3.0)),
    Kind("power cut of everything", _power_cut(ENGINE), 3, (0.0, 1.0), targets=-1),
    Kind("record store away", _record_away, 2, (1.0, 5.0), targets=0),
    Kind("flip a bit", _flip, 4),
)
