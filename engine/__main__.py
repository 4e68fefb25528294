"""The engine process: `python -m engine CONFIG.json` (see `engine.launch.EngineConfig`).

Its exit statuses are `engine.launch.EngineExit`. After a failure it leaves at once,
with its unanswered requests unanswered: whoever else holds the FUSE descriptor decides what becomes of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog
import trio

from engine import logs
from engine.allocator import keep_freed_memory
from engine.control import ControlServer, control_socket
from engine.controller.driver import Controller, attach
from engine.errors import EngineError, FencedError, NoReplicaError
from engine.frontend import NO_FRONTEND, frontend
from engine.launch import EngineConfig, EngineExit, Takeover
from engine.record import FileRecordStore, RecordStore
from engine.records import RecordsClient, RemoteRecordStore, release_lease
from engine.secret import read_secret

log = structlog.get_logger()

_PR_SET_IO_FLUSHER = 57
_FLUSH_FIRST = 2.0


def _io_flusher() -> None:
    """Memory that this process needs must not wait for the write-back that it serves (prctl(2), Linux 5.6)."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0)


def exit_status(error: EngineError) -> int:
    if isinstance(error, FencedError):
        return EngineExit.FENCED
    return EngineExit.NO_REPLICA if isinstance(error, NoReplicaError) else EngineExit.ERROR


def _report(error: BaseException) -> None:
    """For the supervisor, which may be gone."""
    _say(event="error", **{"class": type(error).__name__}, message=str(error))


async def _serve(controller: Controller, config: EngineConfig) -> bool:
    """Until asked to leave; whether that was because everybody above is dead."""
    chosen = frontend(config.frontend)
    controller.has_file = chosen.name != NO_FRONTEND
    stop, orphaned = trio.Event(), trio.Event()

    async def wait_for_signal() -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for number in signals:
                log.info("asked to detach")
                # by SIGINT it is told that a successor goes on with what the replicas confirmed to us
                controller.right.kept = number == signal.SIGINT
                # while requests are still taken: whoever waits for our successor waits only for what comes after it
                with trio.move_on_after(_FLUSH_FIRST), contextlib.suppress(OSError):
                    await controller.flush()
                stop.set()

    async def wait_for_orphaning() -> None:
        while True:
            await trio.lowlevel.wait_readable(config.lifeline_fd)
            if not os.read(config.lifeline_fd, 4096):
                break
        log.warning("nobody is left who could answer clients: detaching")
        orphaned.set()
        stop.set()

    async def leave_on_failure() -> None:
        await controller.failed.wait()
        assert controller.failure is not None
        leave(controller.failure)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait_for_signal)
        if config.lifeline_fd >= 0:
            nursery.start_soon(wait_for_orphaning)
        async with controller.running():
            nursery.start_soon(leave_on_failure)
            async with chosen.serve(controller, config.fuse_fd, resume=config.resume) as session:
                server = ControlServer(controller, chosen.name, config.block_file, session)
                async with control_socket(Path(config.control), server):
                    _say(event="ready", block_file=config.block_file, pid=os.getpid())
                    async with trio.open_nursery() as waits:

                        async def until(event: trio.Event) -> None:
                            await event.wait()
                            waits.cancel_scope.cancel()

                        waits.start_soon(until, stop)
                        waits.start_soon(until, session.ended)
        nursery.cancel_scope.cancel()
    return orphaned.is_set()


def _say(**event: object) -> None:
    with contextlib.suppress(OSError):
        os.write(1, msgspec.json.encode(event) + b"\n")


def _stand_by(config: EngineConfig) -> EngineConfig | None:
    """Wait for the predecessor's end, with all modules loaded; None when the word does not come. Raises OSError."""
    frontend(config.frontend)
    _say(event="standing_by", pid=os.getpid())
    line = b""
    while not line.endswith(b"\n"):
        chunk = os.read(config.standby_fd, 65536)
        if not chunk:
            return None
        line += chunk
    os.close(config.standby_fd)
    told = msgspec.json.decode(line, type=Takeover)
    epoch = told.epoch or config.epoch
    return msgspec.structs.replace(config, instances=told.instances, epoch=epoch, doubted=told.doubted)


def open_store(config: EngineConfig) -> RecordStore:
    """Raises EngineError."""
    if not config.records:
        return FileRecordStore(Path(config.record))
    key = read_secret(Path(config.records_secret_file))
    return RemoteRecordStore(RecordsClient(config.records, key), config.record)


def leave(error: EngineError) -> None:
    """End now: no answer may leave this process any more."""
    log.error("leaving", error=str(error), kind=type(error).__name__)
    _report(error)
    os._exit(exit_status(error))


def main(argv: list[str], open_store: Callable[[EngineConfig], RecordStore] = open_store) -> int:
    """`open_store` may raise EngineError."""
    try:
        config = msgspec.json.decode(Path(argv[1]).read_bytes(), type=EngineConfig)
        if config.standby_fd >= 0:
            told = _stand_by(config)
            if told is None:
                return EngineExit.CLEAN
            config = told
        store = open_store(config)
        key = read_secret(Path(config.secret_file))
        controller = attach(
            store,
            key,
            epoch=config.epoch,
            incarnation=config.incarnation,
            instances=config.instances if config.resume else None,
            open_timeout=config.open_timeout,
            doubted=config.doubted,
            request_timeout=config.request_timeout,
            reconnect_interval=config.reconnect_interval,
            resync_rate=config.resync_rate,
            right_lasts=config.right_lasts,
        )
    except (IndexError, OSError, msgspec.MsgspecError) as error:
        _report(error)
        return 1
    except EngineError as error:
        _report(error)
        return exit_status(error)
    logs.configure(process="engine", volume=controller.record.volume, epoch=config.epoch)
    _io_flusher()
    keep_freed_memory()
    # the data path makes no cycles; a collection in the middle of a round would only cost latency
    gc.freeze()
    try:
        if trio.run(_serve, controller, config) and config.records and config.lease_instance:
            client = RecordsClient(config.records, read_secret(Path(config.records_secret_file)))
            release_lease(client, config.record, config.lease_instance)
    except* EngineError as group:
        failure: BaseException = group
        while isinstance(failure, BaseExceptionGroup):
            failure = failure.exceptions[0]
        assert isinstance(failure, EngineError)
        leave(failure)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
