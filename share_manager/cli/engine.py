"""`share-manager engine`: the process that keeps a volume's replicas equal."""

from __future__ import annotations

from typing import Annotated

import trio
from cyclopts import App, Parameter

from share_manager import units
from share_manager.cli.common import DEFAULT_DATA_DIR, DataDir, Steps, VolumeName, reporter
from share_manager.share.control import ask
from share_manager.share.operations import tell_upgraded
from share_manager.share.requests import EngineUpgraded, UpgradeEngine
from share_manager.volumes import find_volume

app = App(name="engine", help="Replace the engine of a volume in use.")


@app.command
def upgrade(
    volume: VolumeName,
    /,
    *,
    reattach: Annotated[
        bool,
        Parameter(negative=(), help="Where it cannot be done in place, replace mount and server too; clients wait."),
    ] = False,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: Steps = "text",
) -> None:
    """Replace the engine process by the release that is installed now, while the volume stays in use.

    Clients see a short pause and no error. Needs the `device` frontend and Linux 6.9 or later.

    For example:

    share-manager engine upgrade vol1
    """
    paths = find_volume(data_dir, units.parse_name(volume))
    done = trio.run(ask, paths, UpgradeEngine(reattach=reattach), EngineUpgraded)
    tell_upgraded(done, reporter(output))
