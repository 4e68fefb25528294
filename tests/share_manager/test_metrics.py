from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import msgspec
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette

from engine.client import LATENCY_BOUNDS, OperationStats
from share_manager import metrics
from share_manager.share.status import (
    ClientInfo,
    EngineInfo,
    NfsIo,
    ReplicaInfo,
    Restarts,
    ShareStatus,
)

BUCKETS = tuple(1 if index in (0, 3, len(LATENCY_BOUNDS)) else 0 for index in range(len(LATENCY_BOUNDS) + 1))


def replica(name: str, state: str, done: int = 0, total: int = 0) -> ReplicaInfo:
    return ReplicaInfo(
        name=name, address=f"unix:/{name}", directory=f"/d/{name}", state=state, resync_done=done, resync_total=total
    )


STATUS = ShareStatus(
    volume="vol1",
    state="running",
    epoch=7,
    size_bytes=1 << 30,
    used_bytes=1 << 20,
    in_grace=True,
    started_at=1000.0,
    clients=(ClientInfo(address="10.0.0.1", client_ids=("a",)),),
    engine=EngineInfo(
        pid=5, operations={"write": OperationStats(count=3, bytes=12288, errors=1, seconds=0.5, buckets=BUCKETS)}
    ),
    replicas=(
        msgspec.structs.replace(replica("r1", "in_sync"), damaged=3, repaired=2, scrubbed_at=5000.0),
        replica("r2", "resyncing", 10, 40),
        replica("r3", "down"),
    ),
    restarts=Restarts(ganesha=2, engine=1, replicas=4),
    nfs=NfsIo(read_bytes=1, write_bytes=2, read_operations=3, write_operations=4),
)


def samples(status: ShareStatus) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    found = {}
    for family in text_string_to_metric_families(metrics.render(status).decode()):
        for sample in family.samples:
            assert sample.name.startswith("share_manager_")
            assert sample.labels.pop("volume") == "vol1"
            found[(sample.name, frozenset(sample.labels.items()))] = sample.value
    return found


def test_every_family_has_its_value() -> None:
    found = samples(STATUS)

    def value(name: str, **labels: str) -> float:
        return found[(f"share_manager_{name}", frozenset(labels.items()))]

    assert value("state", state="running") == 1
    assert value("state", state="repairing") == 0
    assert value("epoch") == 7
    assert value("volume_size_bytes") == 1 << 30
    assert value("replicas", state="in_sync") == value("replicas", state="down") == 1
    assert value("replica_in_sync", replica="r2") == 0
    assert value("replica_resync_done_bytes", replica="r2") == 10
    assert value("replica_damaged_total", replica="r1") == 3
    assert value("replica_repaired_total", replica="r1") == 2
    assert value("replica_scrub_time_seconds", replica="r1") == 5000
    assert ("share_manager_replica_scrub_time_seconds", frozenset({("replica", "r3")})) not in found
    assert value("engine_bytes_total", operation="write") == 12288
    assert value("engine_errors_total", operation="write") == 1
    assert value("nfs_clients") == 1
    assert value("nfs_in_grace") == 1
    assert value("nfs_bytes_total", operation="write") == 2
    assert value("restarts_total", component="replica") == 4


def test_histograms_are_cumulative_and_end_with_the_count() -> None:
    found = samples(STATUS)
    name = "share_manager_engine_operation_duration_seconds"
    buckets = [
        found[(f"{name}_bucket", frozenset({"operation": "write", "le": bound}.items()))]
        for bound in [*(str(bound) for bound in LATENCY_BOUNDS), "+Inf"]
    ]
    assert buckets == sorted(buckets)
    assert buckets[0] == 1
    assert buckets[-1] == found[(f"{name}_count", frozenset({"operation": "write"}.items()))] == 3
    assert found[(f"{name}_sum", frozenset({"operation": "write"}.items()))] == 0.5


def test_a_share_that_is_starting_has_metrics_too() -> None:
    found = samples(ShareStatus(volume="vol1", state="starting"))
    assert found[("share_manager_state", frozenset({("state", "starting")}))] == 1


def test_every_family_is_documented() -> None:
    documented = metrics.__doc__ or ""
    for family in text_string_to_metric_families(metrics.render(STATUS).decode()):
        suffix = "_total" if family.type == "counter" else ""
        assert f"    {family.name}{suffix}" in documented


async def get(application: Starlette, path: str) -> tuple[int, bytes]:
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(dict(message))

    scope = {"type": "http", "method": "GET", "path": path, "headers": [], "query_string": b"", "http_version": "1.1"}
    await application(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)


async def test_health() -> None:
    state = "running"

    async def status() -> ShareStatus:
        return ShareStatus(volume="vol1", state=state)

    application = metrics.application(status)
    assert await get(application, "/healthz") == (200, b"ok\n")
    assert await get(application, "/readyz") == (200, b"running\n")
    assert (await get(application, "/metrics"))[1] == metrics.render(await status())
    state = "repairing"
    assert await get(application, "/healthz") == (200, b"ok\n")
    assert await get(application, "/readyz") == (503, b"repairing\n")
