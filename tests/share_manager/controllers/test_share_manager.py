"""The states of a share, with whatever lost at every step, and the controller killed at every write."""

from __future__ import annotations

from typing import Literal

import pytest

from share_manager.controllers.share_manager import backoff
from share_manager.kube.core import Node, Pod, Service
from share_manager.kube.resources import (
    ERASE_ANNOTATION,
    SALVAGE_ANNOTATION,
    Replica,
    ShareManager,
    Volume,
    VolumeRecord,
)
from tests.share_manager.controllers.simulation import Simulation


async def running(replicas: int = 2) -> Simulation:
    sim = Simulation()
    sim.make_volume(replicas=replicas)
    await sim.until(lambda: sim.state() == "stopped" and sim.cluster.get(Volume, "v").status.state == "ready")
    sim.attach("a")
    await sim.until(lambda: sim.state() == "running")
    return sim


async def test_it_is_stopped_until_somebody_mounts() -> None:
    sim = Simulation()
    sim.make_volume()
    for _ in range(40):
        await sim.step()
    assert sim.state() == "stopped"
    assert sim.pods() == []
    assert sim.share().status.endpoint == ""
    assert sim.leads_to() == "none"
    volume = sim.cluster.get(Volume, "v")
    assert (volume.status.state, volume.status.robustness, volume.status.in_sync) == ("ready", "healthy", 2)
    sim.attach("a")
    await sim.until(lambda: sim.state() == "running")
    share = sim.share()
    address = sim.cluster.get(Service, "v").spec.cluster_ip
    assert share.status.endpoint == f"nfs://{address}/v"
    assert sim.leads_to() == share.status.instance
    assert share.status.epoch == 1
    assert [pod.name for pod in sim.pods()] == [share.status.pod]
    assert share.status.conditions[0].status == "True"
    assert share.status.last_failover is None


async def test_nothing_is_written_while_nothing_changes() -> None:
    sim = await running()
    for _ in range(10):
        await sim.step()
    before = sim.writes
    for _ in range(100):
        await sim.step()
    assert sim.writes == before


async def test_a_node_dies() -> None:
    sim = await running()
    share = sim.share()
    address = share.status.endpoint
    old_pod, node = share.status.pod, share.status.node
    sim.machines.dead.add(node)
    began = sim.now
    await sim.until(lambda: sim.state() == "starting")
    assert sim.now - began < 10
    await sim.until(lambda: sim.state() == "running")
    after = sim.share()
    assert after.status.node != node
    assert after.status.endpoint == address
    assert after.status.epoch == 2
    assert after.status.last_failover is not None
    assert after.status.last_failover.before == node
    assert node in after.status.last_failover.cause
    # the old pod only after the Service leads to the new one
    log = sim.cluster.log
    switched = max(index for index, line in enumerate(log) if line == "patch Service/v")
    deleted = log.index(f"delete Pod/{old_pod}") if f"delete Pod/{old_pod}" in log else len(log)
    assert switched < deleted
    await sim.until(lambda: len(sim.pods()) == 1)
    reasons = [reason for reason, _ in sim.cluster.events]
    assert reasons.index("FailingOver") < reasons.index("FailedOver")


async def test_a_suspect_node_is_given_no_pod() -> None:
    sim = await running(replicas=3)
    sim.machines.dead |= {"a", "b"}
    await sim.until(lambda: sim.state() == "running" and sim.share().status.node == "c", 200)
    await sim.until(lambda: len(sim.pods()) == 1)
    assert sim.pods()[0].spec.node_name == "c"
    # it was never tried on the other dead one, once that was suspect
    assert sim.share().status.epoch <= 3


@pytest.mark.parametrize("how", ["gone", "deleted", "failed", "node removed"])
async def test_a_pod_is_lost(how: str) -> None:
    sim = await running()
    share = sim.share()
    pod = share.status.pod
    if how == "gone":
        sim.cluster.remove(Pod, pod)
    elif how == "deleted":
        sim.cluster.mark_deleted(Pod, pod)
    elif how == "failed":
        sim.cluster.change(Pod, pod, {"status": {"phase": "Failed", "reason": "Evicted"}})
    else:
        sim.machines.dead.add(share.status.node)
        sim.cluster.remove(Node, share.status.node)
    await sim.until(lambda: sim.state() == "running" and sim.share().status.pod != pod)
    await sim.until(lambda: [one.name for one in sim.pods()] == [sim.share().status.pod])
    assert sim.share().status.attempts == 0
    assert sim.share().status.last_failover is not None


async def test_a_pod_that_never_serves_is_given_up_with_growing_pauses() -> None:
    sim = Simulation()
    sim.make_volume()
    await sim.until(lambda: sim.state() == "stopped" and sim.cluster.get(Volume, "v").status.state == "ready")
    sim.attach("a")
    for attempt in (1, 2):
        await sim.until(lambda: sim.state() == "starting")
        sim.machines.broken.add(sim.share().status.instance)
        await sim.until(lambda: sim.state() == "error", 400)
        assert sim.share().status.attempts == attempt
        assert "does not serve after" in sim.share().status.conditions[0].message
    await sim.until(lambda: sim.state() == "running", 400)
    assert sim.share().status.attempts == 0
    assert backoff(1) < backoff(3) < backoff(50) == 300


async def test_nobody_mounts_it_any_more() -> None:
    sim = await running()
    sim.detach()
    await sim.until(lambda: sim.state() == "stopped")
    assert sim.pods() == []
    assert sim.share().status.endpoint == ""
    sim.attach("b")
    await sim.until(lambda: sim.state() == "running")
    # it was not lost: somebody asked for it
    assert sim.share().status.last_failover is None
    assert sim.share().status.epoch == 2


@pytest.mark.parametrize("state", ["starting", "running", "stopping", "error"])
@pytest.mark.parametrize("what", ["node dies", "pod goes", "node is removed", "detach", "delete"])
async def test_there_is_a_way_out_of_every_state(state: str, what: str) -> None:
    sim = Simulation()
    sim.make_volume()
    await sim.until(lambda: sim.state() == "stopped" and sim.cluster.get(Volume, "v").status.state == "ready")
    sim.attach("a")
    if state in ("starting", "error"):
        await sim.until(lambda: sim.state() == "starting")
        sim.machines.broken.add(sim.share().status.instance)
        await sim.until(lambda: any(pod.spec.node_name for pod in sim.pods()))
        await sim.until(lambda: sim.state() == state, 400)
    else:
        await sim.until(lambda: sim.state() == "running")
        if state == "stopping":
            sim.detach()
            sim.machines.dead.add(sim.share().status.node)
            await sim.until(lambda: sim.state() == "stopping")
    pods = sim.pods()
    if what in ("node dies", "node is removed"):
        node = pods[0].spec.node_name if pods else "a"
        sim.machines.dead.add(node)
        if what == "node is removed":
            sim.cluster.remove(Node, node)
    elif what == "pod goes":
        for pod in pods:
            sim.cluster.remove(Pod, pod.name)
    elif what == "detach":
        sim.detach()
    else:
        sim.cluster.mark_deleted(Volume, "v")
    if what == "delete":
        await sim.until(lambda: sim.cluster.find(ShareManager, "v") is None, 600)
        assert not [pod for pod in sim.pods() if not pod.deleting]
    elif state == "stopping" or what == "detach":
        await sim.until(lambda: sim.state() == "stopped", 600)
        assert sim.pods() == []
    else:
        await sim.until(lambda: sim.state() == "running", 1000)
        await sim.until(lambda: len(sim.pods()) == 1, 600)


async def test_a_planned_move_lets_the_old_pod_leave_first() -> None:
    sim = await running()
    share = sim.share()
    target = "b" if share.status.node != "b" else "c"
    sim.cluster.change(ShareManager, "v", {"spec": {"node": target}})
    await sim.until(lambda: sim.state() == "running" and sim.share().status.node == target)
    log = sim.cluster.log
    gone = log.index(f"gone Pod/{share.status.pod}")
    bumped = max(index for index, line in enumerate(log) if line == "patch VolumeRecord/v")
    assert gone < bumped


async def test_the_next_leader_need_not_wait_for_a_dead_node_again() -> None:
    sim = await running()
    node = sim.share().status.node
    sim.machines.dead.add(node)
    await sim.until(lambda: node in sim.world.suspects)
    await sim.step()
    sim.world = sim.cluster.world()
    await sim.step()
    assert node in sim.world.suspects
    # and one that is back is not taken for dead
    sim.machines.dead.discard(node)
    sim.world = sim.cluster.world()
    await sim.step()
    await sim.step()
    assert node not in sim.world.suspects


async def test_nobody_is_late_when_the_api_server_was_away() -> None:
    sim = await running()
    pod = sim.share().status.pod
    sim.now += 600
    sim.world.ages.restart(sim.now)
    for _ in range(10):
        await sim.step()
    assert sim.share().status.pod == pod
    assert sim.state() == "running"


async def test_a_faulted_volume_waits_for_a_replica_or_a_person() -> None:
    sim = await running()
    record = sim.cluster.get(VolumeRecord, "v")
    homes = {one.node for one in record.spec.replicas}
    sim.machines.dead |= homes
    await sim.until(lambda: sim.cluster.get(Volume, "v").status.state == "faulted", 200)
    await sim.until(lambda: sim.state() == "error")
    attempts, pods = sim.share().status.attempts, len(sim.pods())
    for _ in range(1000):
        await sim.step()
    assert sim.share().status.attempts == attempts
    assert len(sim.pods()) <= pods
    assert "kubectl annotate volume v" in sim.share().status.conditions[0].message
    # one comes back
    sim.machines.dead.discard(min(homes))
    await sim.until(lambda: sim.state() == "running")


async def test_salvage_needs_a_name_that_there_is() -> None:
    sim = await running()
    record = sim.cluster.get(VolumeRecord, "v")
    one, two = record.spec.replicas
    sim.cluster.change(VolumeRecord, "v", {"spec": {"inSync": [one.name]}})
    sim.machines.dead.add(one.node)
    await sim.until(lambda: sim.cluster.get(Volume, "v").status.state == "faulted", 200)
    sim.cluster.change(Volume, "v", {"metadata": {"annotations": {SALVAGE_ANNOTATION: "r9"}}})
    await sim.step()
    assert any(reason == "SalvageRefused" for reason, _ in sim.cluster.events)
    assert sim.cluster.get(VolumeRecord, "v").spec.in_sync == (one.name,)
    sim.cluster.change(Volume, "v", {"metadata": {"annotations": {SALVAGE_ANNOTATION: two.name}}})
    await sim.until(lambda: sim.cluster.get(VolumeRecord, "v").spec.in_sync == (two.name,))
    await sim.until(lambda: sim.state() == "running", 400)
    assert SALVAGE_ANNOTATION not in sim.cluster.get(Volume, "v").metadata.annotations


@pytest.mark.parametrize("erase", [True, False])
async def test_data_goes_only_when_that_was_asked_for(erase: bool) -> None:
    sim = await running()
    if erase:
        sim.cluster.change(Volume, "v", {"metadata": {"annotations": {ERASE_ANNOTATION: "v"}}})
    sim.cluster.mark_deleted(Volume, "v")
    await sim.until(lambda: sim.cluster.find(Volume, "v") is None)
    for kind in (Replica, VolumeRecord, ShareManager, Pod, Service):
        assert sim.cluster.all(kind) == [], kind
    done = [line for line in sim.cluster.log if line.startswith(("erased", "kept"))]
    assert done == [f"{'erased' if erase else 'kept'} v-r{number}" for number in (1, 2)]
    # the record, which says who has the data, goes when nobody has it any more
    assert sim.cluster.log.index("gone VolumeRecord/v") > max(sim.cluster.log.index(line) for line in done)


async def test_a_record_that_is_lost_is_not_made_anew() -> None:
    sim = await running()
    # as by an operator who takes its finalizer away
    sim.cluster.remove(VolumeRecord, "v")
    for _ in range(20):
        await sim.step()
    assert sim.cluster.find(VolumeRecord, "v") is None
    volume = sim.cluster.get(Volume, "v")
    assert volume.status.state == "faulted"
    assert any(one.reason == "RecordLost" for one in volume.status.conditions)
    # and one that is deleted by mistake stays as long as its volume
    other = await running()
    other.cluster.mark_deleted(VolumeRecord, "v")
    for _ in range(20):
        await other.step()
    assert other.cluster.find(VolumeRecord, "v") is not None
    assert other.state() == "running"


async def test_a_vanished_node_does_not_keep_a_volume_from_going() -> None:
    sim = await running()
    node = sim.cluster.get(VolumeRecord, "v").spec.replicas[0].node
    sim.machines.dead.add(node)
    sim.cluster.remove(Node, node)
    sim.cluster.objects.pop(("StorageNode", node))
    sim.cluster.mark_deleted(Volume, "v")
    await sim.until(lambda: sim.cluster.find(Volume, "v") is None)


async def test_too_few_nodes_are_said_and_waited_for() -> None:
    sim = Simulation(("a",))
    sim.make_volume()
    for _ in range(5):
        await sim.step()
    conditions = sim.cluster.get(Volume, "v").status.conditions
    assert "2 replicas need as many nodes, 1 can be used" in conditions[0].message
    assert sim.cluster.all(Replica) == []


async def whole_life(kill_at: int | None, when: Literal["before", "after"]) -> Simulation:
    """Made, mounted, its node lost, moved by that, not mounted any more, deleted."""
    sim = Simulation()
    sim.kill_at, sim.kill_when = kill_at, when
    sim.make_volume()
    await sim.until(lambda: sim.state() == "stopped" and sim.cluster.get(Volume, "v").status.state == "ready")
    sim.attach("a")
    await sim.until(lambda: sim.state() == "running")
    node, pod = sim.share().status.node, sim.share().status.pod
    sim.machines.dead.add(node)
    await sim.until(lambda: sim.state() == "running" and sim.share().status.pod != pod, 400)
    assert sim.share().status.node != node
    assert sim.leads_to() == sim.share().status.instance
    await sim.until(lambda: len(sim.pods()) == 1)
    sim.machines.dead.discard(node)
    sim.detach()
    await sim.until(lambda: sim.state() == "stopped")
    assert sim.pods() == []
    sim.cluster.change(Volume, "v", {"metadata": {"annotations": {ERASE_ANNOTATION: "v"}}})
    sim.cluster.mark_deleted(Volume, "v")
    await sim.until(lambda: sim.cluster.find(Volume, "v") is None, 400)
    for kind in (Replica, VolumeRecord, ShareManager, Pod, Service):
        assert sim.cluster.all(kind) == [], kind
    return sim


@pytest.mark.parametrize("when", ["before", "after"])
async def test_the_controller_is_killed_at_every_write(when: Literal["before", "after"]) -> None:
    writes = (await whole_life(None, when)).writes
    assert writes > 30
    for number in range(1, writes + 1):
        sim = await whole_life(number, when)
        assert sim.kills == 1, number
