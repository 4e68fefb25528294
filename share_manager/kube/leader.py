"""One leader among several processes, by a Lease. It ends its work before another one can take over.

Whoever wants to lead takes a lease that nobody holds, or that did not change for `duration` on its own monotonic clock.
The clocks of two machines are never compared. The leader renews it, and ends its work when it could not for `deadline`,
counted from the moment at which the last renewal that succeeded was *sent*.
"""

from __future__ import annotations

import datetime
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import structlog
import trio

from share_manager.kube.client import Client
from share_manager.kube.core import Lease, LeaseSpec
from share_manager.kube.errors import ConflictError, ExistsError, KubeError, NotFoundError
from share_manager.kube.meta import ObjectMeta

log = structlog.get_logger()


def timestamp() -> str:
    """Now, as a Lease has it (RFC 3339, microseconds)."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class LeaderTiming(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds. `call` bounds each request, and is below `deadline`, which is below `duration`."""

    duration: float = 6.0
    deadline: float = 4.5
    renew: float = 1.0
    call: float = 2.0


class Election:
    """What one candidate knows, and may do: no I/O."""

    def __init__(self, identity: str, timing: LeaderTiming) -> None:
        self.identity = identity
        self._timing = timing
        self._version: str | None = None
        self._changed_at = 0.0

    def seen(self, lease: Lease | None, now: float) -> None:
        version = "" if lease is None else lease.metadata.resource_version
        if version != self._version:
            self._version = version
            self._changed_at = now

    def may_take(self, lease: Lease | None, now: float) -> bool:
        if lease is None or lease.spec.holder_identity in ("", self.identity):
            return True
        return now - self._changed_at >= self._timing.duration


async def lead(
    client: Client,
    name: str,
    identity: str,
    work: Callable[[], Awaitable[None]],
    timing: LeaderTiming | None = None,
    *,
    taken: Callable[[], None] = lambda: None,
    renewed: Callable[[], None] = lambda: None,
) -> None:
    """Wait until we are the leader, and do `work` as long as we are. Returns when it ends, or the lease was lost.

    `work` is cancelled then. A lease that is still ours is given back. `taken` and `renewed` are called when it is.
    Raises what `work` raises.
    """
    timing = timing or LeaderTiming()
    lease, sent = await _acquire(client, name, Election(identity, timing), timing)
    log.info("leading", lease=name, identity=identity)
    taken()
    lost = False
    scope = trio.CancelScope()
    try:
        with scope:
            async with trio.open_nursery() as nursery:

                async def renew() -> None:
                    nonlocal lease, lost, sent
                    while True:
                        # the latest moment at which nobody else can have it
                        scope.deadline = sent + timing.deadline
                        await trio.sleep(timing.renew)
                        asking = trio.current_time()
                        try:
                            with trio.move_on_after(timing.call):
                                lease = await client.patch(
                                    Lease,
                                    name,
                                    {"spec": {"renewTime": timestamp()}},
                                    version=lease.metadata.resource_version,
                                )
                                sent = asking
                                renewed()
                        except (ConflictError, NotFoundError):
                            found = await _look(client, name, timing)
                            if found is None or found.spec.holder_identity != identity:
                                lost = True
                                scope.cancel()
                                return
                            # a renewal whose answer was lost
                            lease = found
                        except KubeError as error:
                            log.warning("lease not renewed", lease=name, reason=str(error))

                nursery.start_soon(renew)
                await work()
                nursery.cancel_scope.cancel()
    finally:
        if scope.cancelled_caught or lost:
            log.warning("no leader any more", lease=name, identity=identity)
        else:
            await _release(client, lease, timing)


async def _look(client: Client, name: str, timing: LeaderTiming) -> Lease | None:
    with trio.move_on_after(timing.call):
        try:
            return await client.find(Lease, name)
        except KubeError:
            return None
    return None


async def _acquire(client: Client, name: str, election: Election, timing: LeaderTiming) -> tuple[Lease, float]:
    while True:
        try:
            asking = trio.current_time()
            with trio.move_on_after(timing.call):
                found = await client.find(Lease, name)
                now = trio.current_time()
                election.seen(found, now)
                if election.may_take(found, now):
                    asking = trio.current_time()
                    return await _take(client, name, election.identity, found, timing), asking
        except (ConflictError, ExistsError):
            pass
        except KubeError as error:
            log.warning("no lease to be had", lease=name, reason=str(error))
        await trio.sleep(timing.renew)


async def _take(client: Client, name: str, identity: str, found: Lease | None, timing: LeaderTiming) -> Lease:
    now = timestamp()
    if found is None:
        spec = LeaseSpec(
            holder_identity=identity,
            lease_duration_seconds=max(1, round(timing.duration)),
            acquire_time=now,
            renew_time=now,
        )
        return await client.create(Lease(metadata=ObjectMeta(name=name), spec=spec))
    body: dict[str, Any] = {
        "holderIdentity": identity,
        "leaseDurationSeconds": max(1, round(timing.duration)),
        "acquireTime": now,
        "renewTime": now,
        "leaseTransitions": found.spec.lease_transitions + 1,
    }
    return await client.patch(Lease, name, {"spec": body}, version=found.metadata.resource_version)


async def _release(client: Client, lease: Lease, timing: LeaderTiming) -> None:
    with trio.CancelScope(shield=True, deadline=trio.current_time() + timing.call):
        try:
            body = {"spec": {"holderIdentity": None}}
            await client.patch(Lease, lease.name, body, version=lease.metadata.resource_version)
        except KubeError as error:
            log.info("lease not given back", lease=lease.name, reason=str(error))
