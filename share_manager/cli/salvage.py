"""`share-manager volume salvage`."""

from __future__ import annotations

import time
from typing import Annotated

from cyclopts import Parameter

from share_manager import units
from share_manager.cli.common import (
    DEFAULT_DATA_DIR,
    DataDir,
    Steps,
    VolumeName,
    confirm,
    plain_table,
    print_json,
    reporter,
    table_console,
)
from share_manager.salvage import ReplicaFinding, SalvagePlan, examine
from share_manager.salvage import salvage as carry_out
from share_manager.share.leftovers import refuse_orphan
from share_manager.volumes import find_volume, volume_lock

_WANTED = "before it is salvaged"


def salvage(
    volume: VolumeName,
    /,
    *,
    source: Annotated[str, Parameter(name="--from", help="Replica whose content becomes that of the volume.")],
    yes: Annotated[bool, Parameter(negative=(), help="Do not ask.")] = False,
    force: Annotated[
        bool, Parameter(negative=(), help="Take a replica that was being filled when that was cut off.")
    ] = False,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: Steps = "text",
) -> None:
    """Take up a volume whose in-sync replicas are lost, from one that is behind. Shows what may be lost, and asks.

    Writes that were acknowledged since that replica left are gone afterwards, and so are the locks of clients. All
    other replicas are filled anew from it when the volume is served: keep a copy of their directories if they may
    still hold something of worth.

    For example:

    share-manager volume salvage vol1 --from r2
    """
    paths = find_volume(data_dir, units.parse_name(volume))
    with volume_lock(paths, _WANTED):
        refuse_orphan(paths, _WANTED)
        plan = examine(paths, source, force=force)
        if output == "text":
            _show(plan)
        elif not yes:
            print_json(plan)
        if not yes:
            confirm(
                f"Make {source} the only copy of volume {volume} that counts?",
                f"volume salvage asks before it gives up what {source} lacks, and nobody is there to answer: add --yes",
                f"volume {volume} is left as it is",
            )
        record = carry_out(paths, plan)
    reporter(output).emit(
        "salvaged",
        f"volume {volume} is that of replica {source} now (epoch {record.epoch}); the others are filled anew when it "
        "is served",
        volume=volume,
        source=source,
        epoch=record.epoch,
        losses=plan.losses(),
        missing_regions=plan.missing_regions,
        unknown=plan.unknown,
    )


def _show(plan: SalvagePlan) -> None:
    table = plain_table()
    for heading in ("REPLICA", "RECORD", "DIRECTORY", "EPOCH", "DIRTY", "LAST WRITTEN", "CHANGED SINCE ... LEFT"):
        table.add_column(heading, overflow="fold")
    for finding in plan.replicas:
        table.add_row(finding.name, "in sync" if finding.in_sync else "out", *_cells(finding))
    console = table_console()
    console.print(table)
    console.print(f"Taking {plan.source}: {plan.losses()}.", soft_wrap=True)


def _cells(finding: ReplicaFinding) -> tuple[str, ...]:
    survey = finding.survey
    if survey is None:
        return finding.problem, "", "", "", ""
    changes = ", ".join(f"{name}: {count} MiB" for name, count in sorted(survey.changes.items()))
    return (
        "being filled" if survey.info.rebuilding else "in order",
        f"{survey.info.epoch}.{survey.info.incarnation}",
        f"{survey.dirty_regions} MiB",
        time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(survey.modified)),
        changes,
    )
