"""`share-manager attach`: a volume as a block file."""

from __future__ import annotations

from typing import Annotated

import trio
from cyclopts import Parameter

from engine.frontend import DEFAULT_FRONTEND
from share_manager import units
from share_manager.cli.common import DEFAULT_DATA_DIR, DataDir, Frontend, Steps, VolumeName, reporter, terminal
from share_manager.paths import VolumePaths
from share_manager.share.blockdev import BlockFile
from share_manager.share.session import VolumeOptions, require_root
from share_manager.volumes import make_data_dir


def attach(
    volume: VolumeName,
    /,
    *,
    size: Annotated[
        str | None, Parameter(help="Size of a new volume, in Ki, Mi, Gi or Ti (10Gi); an existing one must have it.")
    ] = None,
    replicas: Annotated[int | None, Parameter(help="Copies of a new volume, 1 to 9 (3).")] = None,
    frontend: Frontend = DEFAULT_FRONTEND,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: Steps = "text",
) -> None:
    """Attach a volume as a block file until Ctrl-C or SIGTERM: no filesystem, no NFS.

    Prints the path of the file when it is ready. Replicas are repaired meanwhile, and a dead engine is replaced
    in place. Where that cannot be (pyfuse3, kernels before 6.9) the command ends with an error, for the file is gone.

    For example:

    share-manager attach vol1 --size 10Gi

    share-manager attach vol1 --output json
    """
    units.parse_name(volume)
    wanted = None if size is None else units.check_size(units.parse_size(size, "--size"), "none", "--size")
    units.check_replicas(replicas)
    require_root("attach")
    console = terminal() if output == "text" else None
    block = BlockFile(
        VolumePaths(make_data_dir(data_dir), volume),
        VolumeOptions(size=wanted, replicas=replicas, frontend=frontend),
        reporter(output, console),
    )
    if console is None:
        trio.run(block.run)
        return
    # imported late: most runs have no terminal
    from share_manager.cli.live import LiveView

    trio.run(block.run, LiveView(console).run)
