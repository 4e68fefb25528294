"""Who may claim a volume's next epoch: a holder that was cut off and attaches anew must not depose its successor."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.record import FileRecordStore, VolumeRecord, bump_epoch
from engine.records import Lease, RecordsClient
from share_manager.cluster import new_record
from share_manager.errors import FencedOffError
from share_manager.share.records import ServedRecords
from tests.engine.records.served import use

RECORD = new_record("vol1", "0a1b", 1 << 30, [("a", "tcp:192.0.2.1:7500"), ("b", "tcp:192.0.2.2:7500")])


def served(client: RecordsClient, node: str) -> ServedRecords:
    return ServedRecords(client, "vol1", Path("/secret"), lambda lease: lease.holder == node)


def give(client: RecordsClient, node: str) -> None:
    lease, version = client.read_lease("vol1")
    done, _, _ = client.swap_lease("vol1", version, Lease(holder=node, renewals=lease.renewals + 1, phase="taking"))
    assert done


async def test_only_who_has_the_lease_claims(tmp_path: Path) -> None:
    def work(client: RecordsClient) -> None:
        client.create_record(RECORD)
        give(client, "a")
        assert served(client, "a").claim().epoch == 1
        give(client, "b")
        assert served(client, "b").claim().epoch == 2
        # a is back, and would attach anew
        with pytest.raises(FencedOffError, match="b has the lease"):
            served(client, "a").claim()
        assert client.read_record("vol1").epoch == 2

    await use(work, tmp_path, timeout=5.0)


async def test_who_takes_the_lease_while_another_claims_has_the_last_word(tmp_path: Path) -> None:
    """At whatever moment the lease goes to b, who claims then: the highest epoch is b's."""

    def work(client: RecordsClient) -> None:
        client.create_record(RECORD)
        for moment in range(4):
            give(client, "a")
            _interleave(client, moment)
            assert client.read_lease("vol1")[0].holder == "b"
            assert taken[-1] == client.read_record("vol1").epoch

    taken: list[int] = []

    def _interleave(client: RecordsClient, moment: int) -> None:
        """b takes over before a reads the record, looks at the lease, swaps the record, or afterwards."""
        other = client.another()

        def take() -> None:
            give(other, "b")
            taken.append(served(other, "b").claim().epoch)

        class Store:
            def read(self) -> VolumeRecord:
                if moment == 0 and len(taken) == before:
                    take()
                return client.read_record("vol1")

            def swap(self, expected_version: int, new: VolumeRecord) -> None:
                if moment == 2 and len(taken) == before:
                    take()
                client.swap_record(expected_version, new)

        def check() -> None:
            if moment == 1 and len(taken) == before:
                take()
            lease, _ = client.read_lease("vol1")
            if lease.holder != "a":
                raise FencedOffError("vol1", "")

        before = len(taken)
        if moment == 3:
            bump_epoch(Store(), check=check)
            take()
        else:
            with pytest.raises(FencedOffError):
                bump_epoch(Store(), check=check)
        other.close()

    await use(work, tmp_path, timeout=5.0)
    assert len(taken) == 4


def test_what_must_not_be_claimed_is_left_as_it_is(tmp_path: Path) -> None:
    store = FileRecordStore(tmp_path / "record.json")
    store.create(RECORD)

    def refuse() -> None:
        raise FencedOffError("vol1", "")

    with pytest.raises(FencedOffError):
        bump_epoch(store, check=refuse)
    assert store.read() == RECORD
