"""What a run has made so far, in a file of the runtime directory: for `status`, and for whoever clears up after it."""

from __future__ import annotations

from pathlib import Path

import msgspec

from engine.durable import replace_file
from share_manager.share.procfs import ProcessId, identify


class RunState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`kind`: serve or attach. `processes` by name: share-manager, engine, ganesha, r1.. `gate_port`: there are rules
    for it in the present network namespace; 0 for none."""

    volume: str
    data_dir: str
    kind: str
    processes: dict[str, ProcessId] = {}
    device: str = ""
    private_device: str = ""
    endpoint: str = ""
    epoch: int = 0
    gate_port: int = 0


class StateFile:
    """Rewritten whole at each change. /run is gone after a power cut, and so is all that it speaks of."""

    def __init__(self, path: Path, state: RunState) -> None:
        self._path = path
        self.state = state

    def update(self, **changes: object) -> None:
        self.state = msgspec.structs.replace(self.state, **changes)
        replace_file(self._path, msgspec.json.encode(self.state), mode=0o600)

    def process(self, name: str, pid: int | None) -> None:
        processes = dict(self.state.processes)
        found = None if pid is None else identify(pid)
        if found is None:
            processes.pop(name, None)
        else:
            processes[name] = found
        self.update(processes=processes)


def read_state(path: Path) -> RunState | None:
    """None when there is none that can be read: what is left is then found by looking."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=RunState)
    except (OSError, msgspec.DecodeError, msgspec.ValidationError):
        return None
