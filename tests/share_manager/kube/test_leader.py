"""Who leads: decided on one's own clock, and by a real API server's word."""

from __future__ import annotations

import pytest
import trio

from share_manager.kube.client import Client
from share_manager.kube.core import Lease, LeaseSpec
from share_manager.kube.leader import Election, LeaderTiming, lead
from share_manager.kube.meta import ObjectMeta
from tests.lab.control_plane import ControlPlane

TIMING = LeaderTiming(duration=2.0, deadline=1.4, renew=0.3, call=1.0)


def lease(holder: str, version: str) -> Lease:
    spec = LeaseSpec(holder_identity=holder, renew_time="2000-01-01T00:00:00.000000Z")
    return Lease(metadata=ObjectMeta(name="l", resource_version=version), spec=spec)


def test_a_lease_is_judged_by_our_own_clock() -> None:
    me = Election("me", TIMING)
    for now in (0.0, 1.0, 1.9):
        me.seen(lease("other", "1"), now)
        # whatever time its holder wrote into it
        assert not me.may_take(lease("other", "1"), now)
    me.seen(lease("other", "2"), 1.95)
    assert not me.may_take(lease("other", "2"), 3.9)
    assert me.may_take(lease("other", "2"), 3.95)
    assert me.may_take(None, 0.0)
    assert me.may_take(lease("", "9"), 0.0)
    assert me.may_take(lease("me", "9"), 0.0)


class Candidate:
    def __init__(self, client: Client, name: str) -> None:
        self.client = client
        self.name = name
        self.leading = trio.Event()
        self.ended: float | None = None

    async def run(self) -> None:
        async def work() -> None:
            self.leading.set()
            try:
                await trio.sleep_forever()
            finally:
                self.ended = trio.current_time()

        await lead(self.client, "test", self.name, work, TIMING)


@pytest.mark.system
async def test_the_next_one_leads_when_it_is_given_back(kube: Client) -> None:
    one, two = Candidate(kube, "one"), Candidate(kube, "two")
    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as first:
            first.start_soon(one.run)
            await one.leading.wait()
            nursery.start_soon(two.run)
            await trio.sleep(1.0)
            assert not two.leading.is_set()
            first.cancel_scope.cancel()
        began = trio.current_time()
        with trio.fail_after(10):
            await two.leading.wait()
        # sooner than one that was silent would have been given up
        assert trio.current_time() - began < TIMING.duration
        assert (await kube.get(Lease, "test")).spec.lease_transitions == 1
        nursery.cancel_scope.cancel()


@pytest.mark.system
async def test_a_leader_that_cannot_renew_ends_before_another_one_may_begin(
    kube: Client, control_plane: ControlPlane
) -> None:
    one = Candidate(kube, "one")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.run)
        await one.leading.wait()
        await trio.sleep(0.5)
        with control_plane.paused():
            began = trio.current_time()
            while one.ended is None:
                await trio.sleep(0.01)
                assert trio.current_time() - began < TIMING.duration
        nursery.cancel_scope.cancel()


@pytest.mark.system
async def test_a_leader_whose_lease_was_taken_ends(kube: Client) -> None:
    one = Candidate(kube, "one")
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.run)
            await one.leading.wait()
            await kube.patch(Lease, "test", {"spec": {"holderIdentity": "two"}})
    assert one.ended is not None
    assert (await kube.get(Lease, "test")).spec.holder_identity == "two"


def test_the_order_of_times() -> None:
    for timing in (LeaderTiming(), TIMING):
        assert timing.renew < timing.call < timing.deadline < timing.duration
