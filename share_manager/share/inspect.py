"""Status of any volume in a data directory, whether a share manager runs for it or not."""

from __future__ import annotations

from engine.errors import EngineError, RecordMissingError
from share_manager.errors import ShareManagerError
from share_manager.paths import VolumePaths
from share_manager.share.control import ask_status
from share_manager.share.leftovers import Leftovers, observe
from share_manager.share.luks import read_header
from share_manager.share.state import read_state
from share_manager.share.status import EngineInfo, GaneshaInfo, ReplicaInfo, ShareStatus
from share_manager.volumes import lock_holder, read_record


async def volume_status(paths: VolumePaths) -> ShareStatus:
    """Raises RecordError, RuntimeProblem (a share manager that does not answer)."""
    answer = await ask_status(paths.control)
    if answer is not None:
        return answer
    found = observe(paths)
    state = read_state(paths.state)
    try:
        record = read_record(paths)
    except RecordMissingError:
        if not paths.secret.exists():
            raise
        # its record is on a record server, and nobody runs here who could tell more
        return ShareStatus(volume=paths.volume, state=_state(paths, found), kind="share")
    pids = {name: process.pid for name, process in state.processes.items()} if state else {}
    alive = {process.pid for process in found.replicas}
    return ShareStatus(
        volume=paths.volume,
        state=_state(paths, found),
        kind=state.kind if state and not found.empty else "",
        endpoint=state.endpoint or None if state and found.ganesha else None,
        uuid=record.uuid,
        epoch=record.epoch,
        size_bytes=record.size,
        encrypted=read_header(paths) is not None,
        device=found.loops[0] if found.loops else None,
        mountpoint=str(paths.mountpoint) if paths.mountpoint in found.mounts else None,
        engine=EngineInfo(
            pid=found.engine[0].pid if found.engine else None,
            state="orphaned" if found.engine else "stopped",
            block_file=str(paths.block_file) if found.block_file else "",
        ),
        ganesha=GaneshaInfo(pid=found.ganesha[0].pid if found.ganesha else None),
        replicas=tuple(
            ReplicaInfo(
                name=replica.name,
                address=replica.address,
                directory=replica.directory,
                pid=pids.get(replica.name) if pids.get(replica.name) in alive else None,
                state="in_sync" if replica.name in record.in_sync else "out",
            )
            for replica in record.replicas
        ),
    )


def _state(paths: VolumePaths, found: Leftovers) -> str:
    if lock_holder(paths) is not None:
        # somebody holds the volume and has no socket: it is only just starting, or changes the stopped volume
        return "starting" if paths.run.exists() else "stopped"
    return "stopped" if found.empty else "orphaned"


async def all_status(paths: list[VolumePaths]) -> list[ShareStatus]:
    """One that cannot be read says so and hides none of the others."""
    found = []
    for one in paths:
        try:
            found.append(await volume_status(one))
        except (EngineError, ShareManagerError) as error:
            found.append(ShareStatus(volume=one.volume, state="error", last_failure=str(error)))
    return found
