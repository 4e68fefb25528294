"""Real histories of the block file, while replicas and the engine are killed, paused, cut off, and lose power."""

from __future__ import annotations

import msgspec
import pytest

from tests.conftest import Progress
from tests.linearizability.checker import NotLinearizableError, Operation, check
from tests.linearizability.clients import BLOCKS, KINDS
from tests.linearizability.recorder import history, record


def assert_a_stale_read_would_be_found(eras: list[list[Operation]]) -> None:
    """With what an early read returned in place of what the last one did."""
    longest = max(eras, key=len)
    reads = [each for each in longest if each.kind == "read" and each.end is not None and each.value]
    first = min(reads, key=lambda each: each.start)
    last = max((each for each in reads if each.value != first.value), key=lambda each: each.start)
    forged = [msgspec.structs.replace(each, value=first.value) if each is last else each for each in longest]
    with pytest.raises(NotLinearizableError):
        check([forged if era is longest else era for era in eras])


@pytest.mark.system
async def test_every_block_is_a_register_whatever_fails_below(progress: Progress) -> None:
    told: list[str] = []
    recorded, faults, differences = await record(25.0, 1, told.append)
    assert differences == []
    for block in BLOCKS:
        eras = history(recorded, block)
        try:
            check(eras)
        except NotLinearizableError as error:
            pytest.fail(f"block {block}: {error}\n" + "\n".join(told))
        assert_a_stale_read_would_be_found(eras)
    acts = [act for era in recorded for act in era]
    known = [act for act in acts if act.end is not None]
    progress(
        f"linearizable: {len(known)} operations, {len(acts) - len(known)} of unknown outcome, "
        f"{len(recorded)} attachments, {faults} faults"
    )
    for kind in KINDS:
        assert sum(act.kind == kind for act in known) > 50
    assert faults > 5
