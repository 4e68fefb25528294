"""What the home of a share of several nodes keeps on its node, and what it must not believe of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from engine.errors import RecordError
from engine.records import Lease, RecordsClient
from ganesha import list_records
from ganesha.recovery import record_parts
from share_manager.cluster import ENCRYPTED, UNFORMATTED
from share_manager.events import ListSink, Reporter
from share_manager.paths import VolumePaths
from share_manager.share.gone import GONE, GoneClients, encode
from share_manager.share.luks import Header, read_header, write_header
from share_manager.share.node import NodeHome, NodeOptions


class Records:
    """Marks only."""

    address = "tcp:127.0.0.1:1"

    def __init__(self, **marks: str) -> None:
        self.marks = marks
        self.away = False

    def another(self) -> Records:
        return self

    def read_mark(self, volume: str, name: str) -> str | None:
        if self.away:
            raise RecordError("away")
        return self.marks.get(name)

    def set_mark(self, volume: str, name: str, text: str | None) -> None:
        if self.away:
            raise RecordError("away")
        if text is None:
            del self.marks[name]
        else:
            self.marks[name] = text


def home(paths: VolumePaths, records: Records) -> NodeHome:
    paths.directory.mkdir(parents=True, exist_ok=True)
    client = cast(RecordsClient, cast(Any, records))
    return NodeHome(paths, client, Path("/secret"), NodeOptions(node="a"), Reporter(ListSink()))


async def test_a_new_volume_may_be_half_formatted_until_it_is_served_once(tmp_path: Path) -> None:
    paths, records = VolumePaths(tmp_path, "vol1"), Records(**{UNFORMATTED: "new"})
    node = home(paths, records)
    await node.before_mount()
    assert paths.formatting.exists()
    records.away = True
    with pytest.raises(RecordError):
        await node.may_export()
    records.away = False
    await node.may_export()
    assert records.marks == {}


async def test_what_a_node_remembers_of_a_format_that_it_began_long_ago_counts_for_nothing(tmp_path: Path) -> None:
    """Another node has made the filesystem since, and clients have written to it."""
    paths = VolumePaths(tmp_path, "vol1")
    node = home(paths, Records())
    paths.formatting.write_text("ext4\n")
    await node.before_mount()
    assert not paths.formatting.exists()
    await node.may_export()


async def test_clients_that_are_gone_are_forgotten_until_the_volume_is_served_again(tmp_path: Path) -> None:
    paths = VolumePaths(tmp_path, "vol1")
    records = Records(**{GONE: encode(GoneClients(epoch=4, names=("worker-3",)))})
    root = tmp_path / "recovery"
    for host in ("worker-3", "worker-4"):
        root.joinpath("v4recov", *record_parts("127.0.0.2", f"Linux NFSv4.2 {host}")).mkdir(parents=True)
    node = home(paths, records)
    node.handover.lease = Lease(epoch=5)
    await node.before_export(root)
    assert len(list_records(root)) == 2
    node.handover.lease = Lease(epoch=4)
    await node.before_export(root)
    assert [record.client_id for record in list_records(root)] == ["Linux NFSv4.2 worker-4"]


async def test_that_a_volume_is_encrypted_is_known_to_all_nodes_before_a_client_is_served(tmp_path: Path) -> None:
    records = Records(**{UNFORMATTED: "new"})
    first = VolumePaths(tmp_path / "a", "vol1")
    node = home(first, records)
    await node.before_mount()
    # encrypted here, and then another node was faster
    write_header(first, Header(uuid="1234", finished=True))
    await node.before_mount()
    assert read_header(first) == Header(uuid="1234", finished=True)
    await node.may_export()
    assert records.marks == {ENCRYPTED: "1234"}
    second = VolumePaths(tmp_path / "b", "vol1")
    await home(second, records).before_mount()
    assert read_header(second) == Header(uuid="1234", finished=True)
    # made anew under the same name, without encryption
    del records.marks[ENCRYPTED]
    await home(second, records).before_mount()
    assert read_header(second) is None
