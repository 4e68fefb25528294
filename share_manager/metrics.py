"""Metrics of a share for Prometheus, and its health, on one small web server.

`/metrics` has the families below, `/healthz` answers 200 while the process works at all, `/readyz` answers 200 while
the share is exported and 503 otherwise; both with one line of text. All families carry the label `volume`.

    share_manager_info{version}                               gauge, 1
    share_manager_state{state}                                gauge, 1 for the state that holds: starting, running,
                                                              repairing, stopping
    share_manager_epoch                                       gauge, attachments so far
    share_manager_volume_size_bytes                           gauge
    share_manager_filesystem_used_bytes                       gauge, while mounted
    share_manager_start_time_seconds                          gauge, since 1970
    share_manager_replicas{state}                             gauge, replicas in_sync, resyncing, leaving, out, down
    share_manager_replica_in_sync{replica}                    gauge, 0 or 1
    share_manager_replica_resync_done_bytes{replica}          gauge, while one is resynchronised
    share_manager_replica_resync_total_bytes{replica}         gauge, the same
    share_manager_replica_damaged_total{replica}              counter, per engine process: ranges that its disk lost
    share_manager_replica_repaired_total{replica}             counter, those that were put right
    share_manager_replica_scrub_time_seconds{replica}         gauge, end of its last scrub, since 1970
    share_manager_engine_operations_total{operation}          counter, per engine process: read, write, flush, unmap
    share_manager_engine_errors_total{operation}              counter
    share_manager_engine_bytes_total{operation}               counter
    share_manager_engine_operation_duration_seconds{operation}  histogram
    share_manager_engine_requests_in_flight                   gauge
    share_manager_engine_dirty_regions                        gauge, regions that a crash now would have to compare
    share_manager_nfs_clients                                 gauge, client addresses with a lease
    share_manager_nfs_in_grace                                gauge, 0 or 1
    share_manager_nfs_operations_total{operation}             counter, per ganesha: read, write
    share_manager_nfs_bytes_total{operation}                  counter
    share_manager_restarts_total{component}                   counter: ganesha, engine, replica

Counters of the engine and of ganesha begin at zero with each of their processes, as counters may.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Awaitable, Callable, Iterator

import hypercorn.config
import hypercorn.trio
import trio
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from engine.client import LATENCY_BOUNDS, OperationStats
from share_manager.share.status import ShareStatus

STATES = ("starting", "running", "repairing", "stopping")
REPLICA_STATES = ("in_sync", "resyncing", "leaving", "out", "down")


def version() -> str:
    try:
        return importlib.metadata.version("share-manager")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _gauge(name: str, help_text: str, labels: dict[str, str], value: float) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"share_manager_{name}", help_text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def cumulative(stats: OperationStats) -> list[tuple[str, float]]:
    """Histogram buckets as Prometheus wants them: each with all below it, the last without bound."""
    bounds = [*(str(bound) for bound in LATENCY_BOUNDS), "+Inf"]
    counts = [*stats.buckets, *[0] * (len(bounds) - len(stats.buckets))]
    total = 0.0
    buckets = []
    for bound, count in zip(bounds, counts, strict=False):
        total += count
        buckets.append((bound, total))
    return buckets


class ShareCollector(Collector):
    """One status as metric families."""

    def __init__(self, status: ShareStatus) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        yield from self._share()
        yield from self._replicas()
        yield from self._engine()
        yield from self._nfs()

    def _share(self) -> Iterator[Metric]:
        status, volume = self._status, {"volume": self._status.volume}
        yield _gauge("info", "Version of the share manager.", {**volume, "version": version()}, 1)
        states = GaugeMetricFamily("share_manager_state", "1 for the share's state.", labels=["volume", "state"])
        for state in STATES:
            states.add_metric([status.volume, state], float(status.state == state))
        yield states
        yield _gauge("epoch", "Attachments of the volume so far.", volume, status.epoch)
        yield _gauge("volume_size_bytes", "Size of the volume.", volume, status.size_bytes)
        if status.used_bytes is not None:
            yield _gauge("filesystem_used_bytes", "Space taken in the filesystem.", volume, status.used_bytes)
        if status.started_at is not None:
            yield _gauge("start_time_seconds", "Start of the share manager, since 1970.", volume, status.started_at)
        restarts = CounterMetricFamily(
            "share_manager_restarts", "Repairs since the share manager started.", labels=["volume", "component"]
        )
        for component, count in (
            ("ganesha", status.restarts.ganesha),
            ("engine", status.restarts.engine),
            ("replica", status.restarts.replicas),
        ):
            restarts.add_metric([status.volume, component], count)
        yield restarts

    def _replicas(self) -> Iterator[Metric]:
        volume = self._status.volume
        by_state = GaugeMetricFamily("share_manager_replicas", "Replicas by state.", labels=["volume", "state"])
        for state in REPLICA_STATES:
            by_state.add_metric([volume, state], sum(replica.state == state for replica in self._status.replicas))
        yield by_state
        in_sync = GaugeMetricFamily(
            "share_manager_replica_in_sync", "1 while the replica is in sync.", labels=["volume", "replica"]
        )
        done = GaugeMetricFamily(
            "share_manager_replica_resync_done_bytes", "Resynchronised so far.", labels=["volume", "replica"]
        )
        total = GaugeMetricFamily(
            "share_manager_replica_resync_total_bytes", "To be resynchronised.", labels=["volume", "replica"]
        )
        labels = ["volume", "replica"]
        damaged = CounterMetricFamily("share_manager_replica_damaged", "Ranges that its disk lost.", labels=labels)
        repaired = CounterMetricFamily("share_manager_replica_repaired", "Those that were put right.", labels=labels)
        scrubbed = GaugeMetricFamily("share_manager_replica_scrub_time_seconds", "Last scrub.", labels=labels)
        for replica in self._status.replicas:
            damaged.add_metric([volume, replica.name], replica.damaged)
            repaired.add_metric([volume, replica.name], replica.repaired)
            if replica.scrubbed_at:
                scrubbed.add_metric([volume, replica.name], replica.scrubbed_at)
            in_sync.add_metric([volume, replica.name], float(replica.state == "in_sync"))
            if replica.state == "resyncing":
                done.add_metric([volume, replica.name], replica.resync_done)
                total.add_metric([volume, replica.name], replica.resync_total)
        yield from (in_sync, done, total, damaged, repaired, scrubbed)

    def _engine(self) -> Iterator[Metric]:
        status = self._status
        labels = ["volume", "operation"]
        counts = CounterMetricFamily("share_manager_engine_operations", "Requests answered.", labels=labels)
        errors = CounterMetricFamily("share_manager_engine_errors", "Requests answered with an error.", labels=labels)
        moved = CounterMetricFamily("share_manager_engine_bytes", "Bytes of requests answered.", labels=labels)
        durations = HistogramMetricFamily(
            "share_manager_engine_operation_duration_seconds", "From a request to its answer.", labels=labels
        )
        for operation, stats in sorted(status.engine.operations.items()):
            values = [status.volume, operation]
            counts.add_metric(values, stats.count)
            errors.add_metric(values, stats.errors)
            moved.add_metric(values, stats.bytes)
            durations.add_metric(values, buckets=cumulative(stats), sum_value=stats.seconds)
        yield from (counts, errors, moved, durations)
        volume = {"volume": status.volume}
        yield _gauge(
            "engine_requests_in_flight", "Requests not answered yet.", volume, status.engine.requests_in_flight
        )
        yield _gauge(
            "engine_dirty_regions",
            "Regions that a crash now would have to compare.",
            volume,
            status.engine.dirty_regions,
        )

    def _nfs(self) -> Iterator[Metric]:
        status, volume = self._status, {"volume": self._status.volume}
        yield _gauge("nfs_clients", "Client addresses with a lease.", volume, len(status.clients))
        yield _gauge("nfs_in_grace", "1 while clients may only reclaim.", volume, float(bool(status.in_grace)))
        if status.nfs is not None:
            labels = ["volume", "operation"]
            counts = CounterMetricFamily("share_manager_nfs_operations", "Calls of clients.", labels=labels)
            moved = CounterMetricFamily("share_manager_nfs_bytes", "Bytes moved for clients.", labels=labels)
            counts.add_metric([status.volume, "read"], status.nfs.read_operations)
            counts.add_metric([status.volume, "write"], status.nfs.write_operations)
            moved.add_metric([status.volume, "read"], status.nfs.read_bytes)
            moved.add_metric([status.volume, "write"], status.nfs.write_bytes)
            yield from (counts, moved)


def render(status: ShareStatus) -> bytes:
    """The text that Prometheus reads."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(ShareCollector(status))
    return generate_latest(registry)


def application(status: Callable[[], Awaitable[ShareStatus]]) -> Starlette:
    async def metrics(request: Request) -> Response:
        return Response(render(await status()), media_type=CONTENT_TYPE_LATEST)

    async def healthz(request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(request: Request) -> Response:
        found = await status()
        return PlainTextResponse(f"{found.state}\n", status_code=200 if found.state == "running" else 503)

    return Starlette(routes=[Route("/metrics", metrics), Route("/healthz", healthz), Route("/readyz", readyz)])


async def serve_metrics(status: Callable[[], Awaitable[ShareStatus]], address: str, port: int) -> None:
    """Until cancelled."""
    config = hypercorn.config.Config()
    config.bind = [f"[{address}]:{port}" if ":" in address else f"{address}:{port}"]
    config.graceful_timeout = 0.5
    config.accesslog = None
    quiet = logging.getLogger("share_manager.metrics.http")
    quiet.setLevel(logging.CRITICAL)
    config.errorlog = quiet
    await hypercorn.trio.serve(application(status), config, shutdown_trigger=trio.sleep_forever)  # type: ignore[arg-type]
