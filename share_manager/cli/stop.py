"""`share-manager stop`."""

from __future__ import annotations

import signal
from typing import Annotated

import trio
from cyclopts import Parameter

from share_manager import units
from share_manager.cli.common import DEFAULT_DATA_DIR, DataDir, Steps, VolumeName, reporter
from share_manager.errors import InvalidValueError, TimeoutProblem, VolumeBusyError
from share_manager.events import Reporter
from share_manager.paths import VolumePaths
from share_manager.share.leftovers import send
from share_manager.share.network import remove_rules
from share_manager.share.session import clear_leftovers, require_root
from share_manager.share.state import read_state
from share_manager.volumes import find_volume, lock_holder, volume_lock


def stop(
    volume: VolumeName,
    /,
    *,
    timeout: Annotated[float, Parameter(help="Seconds to wait for the share to leave.")] = 180.0,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: Steps = "text",
) -> None:
    """Ask a running share to leave in order, or clear what a killed one left behind.

    Client records stay on the volume, so clients reclaim their locks at the next `serve`.

    For example:

    share-manager stop vol1
    """
    paths = find_volume(data_dir, units.parse_name(volume))
    if timeout <= 0:
        raise InvalidValueError("--timeout", str(timeout), "a number of seconds above 0")
    require_root("stop")
    trio.run(_stop, paths, timeout, reporter(output))


async def _stop(paths: VolumePaths, timeout: float, report: Reporter) -> None:
    holder = lock_holder(paths)
    if holder is not None:
        state = read_state(paths.state)
        manager = state.processes.get("share-manager") if state else None
        if manager is None or manager.pid != holder:
            # it changes the volume, or has only just begun: not ours to interrupt
            raise VolumeBusyError(paths.volume, holder, "in a moment")
        report.emit("stopping", f"asking process {holder} to leave", pid=holder)
        send(manager, signal.SIGTERM)
        with trio.move_on_after(timeout) as waited:
            while lock_holder(paths) is not None:  # noqa: ASYNC110 - another process holds it
                await trio.sleep(0.05)
        if waited.cancelled_caught:
            raise TimeoutProblem(f"leaving of process {holder} (it is still leaving)", timeout)
    with volume_lock(paths, "first"):
        left = read_state(paths.state)
        await clear_leftovers(paths, report)
        if left is not None and left.gate_port:
            # until now they keep the port silent
            remove_rules(left.gate_port)
    report.emit("stopped", "stopped", volume=paths.volume)
