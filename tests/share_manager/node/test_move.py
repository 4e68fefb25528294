"""Which nodes a volume can be moved to."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.records import Presence, RecordsClient
from share_manager import cluster
from share_manager.errors import MoveFailedError, UsageError
from share_manager.events import ListSink, Reporter
from tests.engine.records.served import use
from tests.share_manager.node.test_claims import RECORD


async def test_one_that_comes_up_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(client: RecordsClient) -> None:
        client.create_record(RECORD)
        client.announce("vol1", Presence(node="b", instance="1", state="starting"))
        waited: list[float] = []

        def stands_by(seconds: float) -> None:
            waited.append(seconds)
            client.announce("vol1", Presence(node="b", instance="1", state="standby"))

        monkeypatch.setattr("share_manager.cluster.time.sleep", stands_by)
        # it is asked to, and nobody is there to do it
        with pytest.raises(MoveFailedError, match="not within"):
            cluster.move(client, "vol1", "b", 0.5, Reporter(ListSink()))
        assert len(waited) == 1
        assert client.read_lease("vol1")[0].wanted == "b"

    await use(work, tmp_path, timeout=5.0)


async def test_one_that_nobody_knows_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(client: RecordsClient) -> None:
        client.create_record(RECORD)
        client.announce("vol1", Presence(node="b", instance="1", state="standby"))
        monkeypatch.setattr("share_manager.cluster.time.sleep", lambda _: pytest.fail("it waits"))
        with pytest.raises(UsageError, match=r"c does not stand by for volume vol1 \(there: b\)"):
            cluster.move(client, "vol1", "c", 5.0, Reporter(ListSink()))

    await use(work, tmp_path, timeout=5.0)
