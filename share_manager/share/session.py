"""What `serve` and `attach` have around them: privileges, signals, the volume, the runtime directory."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable

import msgspec
import trio

from engine.frontend import DEFAULT_FRONTEND
from engine.record import VolumeRecord
from share_manager import units
from share_manager.errors import AddressError, NotRootError, PortInUseError, ShareManagerError
from share_manager.events import Reporter
from share_manager.paths import VolumePaths
from share_manager.share import leftovers
from share_manager.share.state import RunState, StateFile
from share_manager.volumes import create_volume, delete_volume, open_volume

DEFAULT_SIZE = 10 << 30
DEFAULT_REPLICAS = 3


class VolumeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """None: as it is, or the default for a new volume."""

    size: int | None = None
    replicas: int | None = None
    frontend: str = DEFAULT_FRONTEND


def require_root(command: str) -> None:
    if os.geteuid() != 0:
        raise NotRootError(command)


def check_port(address: str, port: int, option: str = "--port") -> None:
    """Raises PortInUseError, AddressError."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
            probe.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortInUseError(address, port, option) from None
            raise AddressError(address, port, error.strerror or str(error)) from None


def reachable_host(bind: str) -> str:
    """What a client writes for an address to listen on."""
    return socket.gethostname() if bind in ("0.0.0.0", "::") else bind


@contextlib.asynccontextmanager
async def leave_on_signals(report: Reporter, on_first: Callable[[], None]) -> AsyncIterator[None]:
    """SIGINT, SIGTERM or SIGHUP cancels the block, once; a second one changes nothing, for the order must hold."""
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as work:

                async def listen() -> None:
                    asked = False
                    async for number in signals:
                        name = signal.Signals(number).name
                        if asked:
                            report.emit("still_stopping", f"{name}: still leaving, in order")
                            continue
                        asked = True
                        report.emit("stopping", f"{name}: leaving", signal=name)
                        on_first()
                        work.cancel()

                nursery.start_soon(listen)
                yield
            nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def runtime(paths: VolumePaths, kind: str) -> AsyncIterator[StateFile]:
    """The runtime directory, made empty and removed at the end."""
    paths.run.mkdir(parents=True, mode=0o700, exist_ok=True)
    state = StateFile(paths.state, RunState(volume=paths.volume, data_dir=str(paths.data_dir), kind=kind))
    state.process("share-manager", os.getpid())
    try:
        yield state
    finally:
        with trio.CancelScope(shield=True):
            await leftovers.clear(paths)


async def clear_leftovers(paths: VolumePaths, report: Reporter) -> None:
    """Raises LeftoverError."""

    def tell(step: str) -> None:
        report.emit("clearing", f"left over from an earlier run: {step}", step=step)

    if await leftovers.clear(paths, tell):
        report.emit("cleared", "what an earlier run left behind is gone")


def open_or_create(paths: VolumePaths, options: VolumeOptions, report: Reporter) -> tuple[VolumeRecord, bool]:
    """The volume's record, and whether it was made now."""
    if paths.directory.exists():
        return open_volume(paths, size=options.size, replicas=options.replicas), False
    size = DEFAULT_SIZE if options.size is None else options.size
    replicas = DEFAULT_REPLICAS if options.replicas is None else options.replicas
    record = create_volume(paths, size=size, replicas=replicas)
    report.emit(
        "created",
        f"volume {paths.volume} created: {units.format_size(size)}, {replicas} replicas",
        volume=paths.volume,
        size_bytes=size,
        replicas=replicas,
    )
    return record, True


def undo_creation(paths: VolumePaths) -> None:
    """For a volume whose very first start failed: nobody has written to it."""
    with contextlib.suppress(ShareManagerError):
        delete_volume(paths)
