from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from share_manager.cluster import new_record
from share_manager.errors import UsageError
from share_manager.node.hosted import Directory, Hosted, Preparation, changes, hosted_by, prepare

RECORD = new_record("vol1", "0a1b", 1 << 30, [("a", "tcp:192.0.2.1:7500"), ("b", "tcp:192.0.2.2:7500")])


def hosted(**changes: object) -> Hosted:
    (one,) = hosted_by("a", [msgspec.structs.replace(RECORD, **changes)], Path("/data")).values()
    return one


def test_a_node_hosts_what_the_records_place_on_it() -> None:
    one = hosted()
    assert (one.name, one.directory, one.address) == ("r1", "/data/replicas/vol1/r1", "tcp:192.0.2.1:7500")
    assert hosted_by("c", [RECORD], Path("/data")) == {}


@pytest.mark.parametrize(
    ("epoch", "in_sync", "expected"),
    [
        (0, ("r1", "r2"), Preparation.CREATE),
        (1, ("r2",), Preparation.CREATE_REBUILDING),
        # its disk is not mounted, say: an empty replica would pass for complete
        (1, ("r1", "r2"), Preparation.REFUSE),
    ],
)
def test_a_directory_is_made_only_where_nothing_can_have_been(
    epoch: int, in_sync: tuple[str, ...], expected: Preparation
) -> None:
    one = hosted(epoch=epoch, in_sync=in_sync)
    assert prepare(one, Directory.ABSENT) is expected
    assert prepare(one, Directory.OURS) is Preparation.SERVE
    assert prepare(one, Directory.FOREIGN) is Preparation.REFUSE


def test_what_is_no_longer_wanted_stops_and_what_has_moved_is_started_again() -> None:
    one = hosted()
    wanted = {one.key: one}
    assert changes(wanted, {}) == ([], [one.key])
    assert changes(wanted, wanted) == ([], [])
    assert changes(wanted, {one.key: msgspec.structs.replace(one, member=False, fresh=False)}) == ([], [])
    assert changes(wanted, {one.key: msgspec.structs.replace(one, address="tcp:192.0.2.9:1")}) == ([one.key], [one.key])
    assert changes({}, wanted) == ([one.key], [])


def test_two_replicas_on_one_node_are_refused() -> None:
    with pytest.raises(UsageError, match="lost together"):
        new_record("vol1", "0a1b", 1 << 30, [("a", "tcp:192.0.2.1:1"), ("a", "tcp:192.0.2.1:2")])
