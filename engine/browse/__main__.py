"""`python -m engine.browse CONFIG.json`: a mounted directory with the snapshots of an attached volume as files.

Says that it is ready on stdout; leaves when it is unmounted, at SIGTERM, and with its parent. The mount is left to
whoever started it: as long as it is there, it can be found by its place.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

import msgspec
import pyfuse3
import structlog
import trio

from engine import logs
from engine.browse.files import SnapshotFiles
from engine.launch import BrowseConfig

log = structlog.get_logger()

_WORKERS = 16
_LOOK_EVERY = 0.5


def _say(**event: object) -> None:
    with contextlib.suppress(OSError):
        os.write(1, msgspec.json.encode(event) + b"\n")


async def _serve(config: BrowseConfig) -> None:
    parent = os.getppid()
    async with trio.open_nursery() as nursery:
        files = SnapshotFiles(Path(config.control), nursery, config.only)
        # no others than root: these are the volume's bytes
        pyfuse3.init(files, config.mountpoint, {f"fsname={config.source}", "ro"})
        try:
            async with trio.open_nursery() as serving:

                async def leave() -> None:
                    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                        async for _ in signals:
                            serving.cancel_scope.cancel()

                async def follow_parent() -> None:
                    # the kernel's own signal for this comes when a thread of the parent ends
                    while os.getppid() == parent:  # noqa: ASYNC110 - nobody tells
                        await trio.sleep(_LOOK_EVERY)
                    serving.cancel_scope.cancel()

                async def loop() -> None:
                    await pyfuse3.main(min_tasks=1, max_tasks=_WORKERS)
                    serving.cancel_scope.cancel()

                serving.start_soon(leave)
                serving.start_soon(follow_parent)
                serving.start_soon(loop)
                _say(event="ready", mountpoint=config.mountpoint, pid=os.getpid())
        finally:
            pyfuse3.close(unmount=False)
            nursery.cancel_scope.cancel()


def main(argv: list[str]) -> int:
    try:
        config = msgspec.json.decode(Path(argv[1]).read_bytes(), type=BrowseConfig)
    except (IndexError, OSError, msgspec.MsgspecError) as error:
        _say(event="error", message=str(error))
        return 1
    logs.configure(process="browse")
    status = 0
    try:
        trio.run(_serve, config)
    except* (RuntimeError, OSError) as group:
        _say(event="error", message=f"cannot mount snapshots at {config.mountpoint}: {group.exceptions[0]}")
        status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv))
