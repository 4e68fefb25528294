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
from pathlib import Path

import msgspec
import structlog
import trio

from engine import logs
from engine.control import ControlServer, control_socket
from engine.controller.driver import Controller, attach
from engine.errors import EngineError, FencedError, NoReplicaError
from engine.frontend import frontend
from engine.launch import EngineConfig, EngineExit
from engine.record import FileRecordStore
from engine.secret import read_secret

log = structlog.get_logger()

_PR_SET_IO_FLUSHER = 57


def _io_flusher() -> None:
    """Memory that this process needs must not wait for the write-back that it serves (prctl(2), Linux 5.6)."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0)


def exit_status(error: EngineError) -> int:
    if isinstance(error, FencedError):
        return EngineExit.FENCED
    return EngineExit.NO_REPLICA if isinstance(error, NoReplicaError) else EngineExit.ERROR


def _report(error: BaseException) -> None:
    """One line for the supervisor, which may be gone."""
    line = msgspec.json.encode({"event": "error", "class": type(error).__name__, "message": str(error)}) + b"\n"
    with contextlib.suppress(OSError):
        os.write(1, line)


async def _serve(controller: Controller, config: EngineConfig) -> None:
    chosen = frontend(config.frontend)
    stop = trio.Event()

    async def wait_for_signal() -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                log.info("asked to detach")
                stop.set()

    async def leave_on_failure() -> None:
        await controller.failed.wait()
        assert controller.failure is not None
        leave(controller.failure)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait_for_signal)
        async with controller.running():
            nursery.start_soon(leave_on_failure)
            async with chosen.serve(controller, config.fuse_fd, resume=config.resume) as session:
                server = ControlServer(controller, chosen.name, config.block_file, session)
                async with control_socket(Path(config.control), server):
                    _say_ready(config)
                    async with trio.open_nursery() as waits:

                        async def until(event: trio.Event) -> None:
                            await event.wait()
                            waits.cancel_scope.cancel()

                        waits.start_soon(until, stop)
                        waits.start_soon(until, session.ended)
        nursery.cancel_scope.cancel()


def _say_ready(config: EngineConfig) -> None:
    line = msgspec.json.encode({"event": "ready", "block_file": config.block_file, "pid": os.getpid()}) + b"\n"
    with contextlib.suppress(OSError):
        os.write(1, line)


def leave(error: EngineError) -> None:
    """End now: no answer may leave this process any more."""
    log.error("leaving", error=str(error), kind=type(error).__name__)
    _report(error)
    os._exit(exit_status(error))


def main(argv: list[str]) -> int:
    try:
        config = msgspec.json.decode(Path(argv[1]).read_bytes(), type=EngineConfig)
        store = FileRecordStore(Path(config.record))
        key = read_secret(Path(config.secret_file))
        controller = attach(
            store,
            key,
            epoch=config.epoch,
            incarnation=config.incarnation,
            instances=config.instances if config.resume else None,
            open_timeout=config.open_timeout,
            request_timeout=config.request_timeout,
            reconnect_interval=config.reconnect_interval,
        )
    except (IndexError, OSError, msgspec.MsgspecError) as error:
        _report(error)
        return 1
    except EngineError as error:
        _report(error)
        return exit_status(error)
    logs.configure(process="engine", volume=controller.record.volume, epoch=config.epoch)
    _io_flusher()
    # the data path makes no cycles; a collection in the middle of a round would only cost latency
    gc.freeze()
    try:
        trio.run(_serve, controller, config)
    except* EngineError as group:
        failure: BaseException = group
        while isinstance(failure, BaseExceptionGroup):
            failure = failure.exceptions[0]
        assert isinstance(failure, EngineError)
        leave(failure)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
