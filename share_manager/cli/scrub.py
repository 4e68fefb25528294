"""`share-manager volume scrub`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import trio
from cyclopts import Parameter

from engine.operations import OperationProgress, Scrub, Scrubbed
from share_manager import units
from share_manager.cli.common import (
    DEFAULT_DATA_DIR,
    DataDir,
    Table,
    VolumeName,
    plain_table,
    print_json,
    progress_bar,
    quiet_reporter,
    table_console,
    terminal,
)
from share_manager.errors import StorageError
from share_manager.maintenance import engine_of
from share_manager.paths import VolumePaths
from share_manager.volumes import find_volume

OnProgress = Callable[[OperationProgress], None]


def scrub(
    volume: VolumeName,
    /,
    *,
    rate: Annotated[
        str,
        Parameter(help="Bytes of the volume to look at in a second, in Ki, Mi, Gi or Ti; 0 for as fast as it goes."),
    ] = "64Mi",
    repair: Annotated[bool, Parameter(help="Repair what is found, where it is known which replica is right.")] = True,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: Table = "table",
) -> int:
    """Read a volume and its snapshots from the disks of all replicas and repair what is not as it was written.

    Works while the volume is served, and leaves the disks to clients first. Exit status 6 when damage is left.

    For example:

    share-manager volume scrub vol1

    share-manager volume scrub vol1 --no-repair --rate 0 --output json
    """
    paths = find_volume(data_dir, units.parse_name(volume))
    request = Scrub(rate=0 if rate == "0" else units.parse_size(rate, "--rate"), repair=repair)
    with progress_bar(terminal() if output == "table" else None, f"scrub {volume}") as on_progress:
        found = trio.run(_run, paths, request, on_progress)
    if output == "json":
        print_json(found)
    else:
        show(volume, found)
    return StorageError.exit_status if found.found > found.repaired else 0


async def _run(paths: VolumePaths, request: Scrub, on_progress: OnProgress | None) -> Scrubbed:
    async with engine_of(paths, quiet_reporter(), "before it is scrubbed") as client:
        return await client.run(request, Scrubbed, on_progress)


def show(volume: str, found: Scrubbed) -> None:
    console = table_console()
    if found.findings:
        table = plain_table()
        for heading in ("REPLICA", "IMAGE", "OFFSET", "LENGTH", "DAMAGE", "OUTCOME"):
            table.add_column(heading, overflow="fold")
        for one in found.findings:
            image = f"snapshot {one.snapshot}" if one.snapshot else "head"
            table.add_row(one.replica, image, str(one.offset), str(one.length), one.kind, one.outcome)
        console.print(table)
        if found.found > len(found.findings):
            console.print(f"... and {found.found - len(found.findings)} more")
    left = found.found - found.repaired
    console.print(
        f"volume {volume}: {found.verified / (1 << 30):.1f} GiB read on {', '.join(found.replicas)} "
        f"in {found.seconds:.0f} s, {found.found} damaged, {found.repaired} repaired, {left} left"
        + (f" ({found.undecidable} where nobody can tell which replica is right)" if found.undecidable else "")
    )
