"""The engine process as its supervisor sees it: how it is started, when it is ready, and why it ended."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import trio

from engine.client import EngineClient, EngineStatus, EngineUnreachableError
from engine.frontend.fuse_device import FuseDevice
from engine.launch import EngineConfig, EngineExit, Takeover, engine_argv
from engine.record import VolumeRecord
from share_manager.errors import FencedOffError, NoReplicaAvailableError, ShareManagerError, TimeoutProblem
from share_manager.paths import VolumePaths
from share_manager.share.child import Child, start_child
from share_manager.share.records import Records
from share_manager.share.state import StateFile

START_TIMEOUT = 60.0
STOP_TIMEOUT = 20.0
READY_STATES = ("ready", "equalising", "waiting")


def failure(engine: Child, volume: str) -> ShareManagerError:
    """Why an engine that ended did so, as an error."""
    if engine.returncode == EngineExit.FENCED:
        return FencedOffError(volume, engine.reason())
    if engine.returncode == EngineExit.NO_REPLICA:
        return NoReplicaAvailableError(volume, engine.reason())
    return engine.died()


async def wait_ready(
    engine: Child, client: EngineClient, volume: str, on_status: Callable[[EngineStatus], None] = lambda _: None
) -> None:
    """Raises NoReplicaAvailableError, FencedOffError, ProcessDiedError, TimeoutProblem."""
    pause = 0.01
    with trio.move_on_after(START_TIMEOUT):
        while engine.returncode is None:
            with contextlib.suppress(EngineUnreachableError):
                status = await client.status(timeout=1.0)
                on_status(status)
                if status.state in READY_STATES:
                    return
            await trio.sleep(pause)
            pause = min(pause * 1.5, 0.1)
        # what it printed last may still be on its way
        with trio.move_on_after(1.0):
            await engine.closed.wait()
        raise failure(engine, volume)
    raise TimeoutProblem("attaching the volume", START_TIMEOUT)


def _instances(status: EngineStatus | None) -> dict[str, str]:
    return {replica.name: replica.instance for replica in status.replicas} if status else {}


class Successor:
    """An engine that has loaded everything and waits for its predecessor to leave. `ended`: it serves, or failed."""

    def __init__(self, child: Child, word: int, state: StateFile, control: Path) -> None:
        self.child = child
        self.ended = trio.Event()
        self._word = word
        self._state = state
        self._control = control

    async def prepared(self) -> None:
        """Raises ProcessDiedError, TimeoutProblem."""
        with trio.move_on_after(START_TIMEOUT):
            while self.child.said_event("standing_by") is None:
                if self.child.closed.is_set() or self.child.returncode is not None:
                    await self.child.wait()
                    raise self.child.died()
                await trio.sleep(0.01)
            return
        raise TimeoutProblem("the start of the new engine", START_TIMEOUT)

    async def take_over(self, before: EngineStatus | None) -> Child:
        """Its predecessor, of which `before` was the last known, is gone."""
        with contextlib.suppress(BrokenPipeError):  # it died: whoever waits for it to become ready sees that
            os.write(self._word, msgspec.json.encode(Takeover(instances=_instances(before))) + b"\n")
        self._close()
        self._state.process("engine", self.child.pid)
        return self.child

    async def begin(self, epoch: int, doubted: tuple[str, ...] = ()) -> Child:
        """It attaches this epoch, which no engine has had."""
        self._control.unlink(missing_ok=True)
        with contextlib.suppress(BrokenPipeError):
            os.write(self._word, msgspec.json.encode(Takeover(instances={}, epoch=epoch, doubted=doubted)) + b"\n")
        self._close()
        self._state.process("engine", self.child.pid)
        return self.child

    async def abandon(self) -> None:
        """It leaves when the word cannot come any more."""
        self._close()
        self.ended.set()
        with trio.CancelScope(shield=True):
            await self.child.stop(STOP_TIMEOUT)
            await self.child.aclose()

    def why(self) -> str:
        return self.child.reason() or "see its log"

    def _close(self) -> None:
        if self._word >= 0:
            os.close(self._word)
            self._word = -1


class EngineStarter:
    """Starts the engines of one attachment, one after the other, on the same file."""

    def __init__(
        self,
        paths: VolumePaths,
        record: VolumeRecord,
        fuse: FuseDevice,
        state: StateFile,
        frontend: str,
        records: Records,
        right_lasts: float = 0.0,
    ) -> None:
        self._paths = paths
        self._record = record
        self._fuse = fuse
        self._state = state
        self._frontend = frontend
        self._records = records
        self._right_lasts = right_lasts

    def claimed(self, record: VolumeRecord) -> None:
        """The epoch of all engines from now on."""
        self._record = record

    async def start(self, incarnation: int, before: EngineStatus | None = None) -> Child:
        """The first engine, or the one that takes over where `before` was the last known of its predecessor."""
        self._paths.engine_control.unlink(missing_ok=True)
        config = self._config(incarnation, resume=before is not None)
        engine = await self._run(msgspec.structs.replace(config, instances=_instances(before)))
        self._state.process("engine", engine.pid)
        return engine

    async def prepare(self, incarnation: int, *, resume: bool = True) -> Successor:
        """The engine that is to take over from one that still runs, or to be the first of an epoch. It is what is
        installed now."""
        read, write = os.pipe()
        try:
            config = self._config(incarnation, resume=resume)
            child = await self._run(msgspec.structs.replace(config, standby_fd=read), read)
        except BaseException:
            os.close(write)
            raise
        finally:
            os.close(read)
        return Successor(child, write, self._state, self._paths.engine_control)

    def _config(self, incarnation: int, *, resume: bool) -> EngineConfig:
        paths = self._paths
        config = EngineConfig(
            record="",
            secret_file=str(paths.secret),
            epoch=self._record.epoch,
            incarnation=incarnation,
            resume=resume,
            frontend=self._frontend,
            fuse_fd=self._fuse.fd,
            block_file=str(paths.block_file),
            control=str(paths.engine_control),
            right_lasts=self._right_lasts,
        )
        return self._records.configure(config)

    async def _run(self, config: EngineConfig, *pass_fds: int) -> Child:
        argv = engine_argv(config, self._paths.run / "engine.json")
        log = self._paths.log / "engine.log"
        fds = [fd for fd in (self._fuse.fd, config.lifeline_fd, *pass_fds) if fd >= 0]
        return await start_child("the engine", argv, log, pass_fds=fds)
