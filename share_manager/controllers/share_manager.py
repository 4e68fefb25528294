"""ShareManager: stopped, starting, running, stopping, error; and the way out of each, whatever is lost.

What makes it safe is not here: the epoch is bumped, and given to one instance, before its pod exists, and replicas
refuse every older one. Here it is noticed that a share is gone, and another pod is started on a node that is not
suspect. The Service follows when that exports, and only then are old pods deleted. Nothing here calls a node.
"""

from __future__ import annotations

import datetime

import msgspec

from share_manager.controllers.actions import Action, Again, Change, Create, Remove, SetStatus, Tell
from share_manager.controllers.conditions import Status, find, told
from share_manager.controllers.pod import PodOptions, share_pod_body
from share_manager.controllers.service import switch
from share_manager.kube.core import Pod, Service
from share_manager.kube.resources import (
    FINALIZER,
    INSTANCE_LABEL,
    Failover,
    ShareManager,
    ShareManagerStatus,
    ShareReport,
    Volume,
    VolumeRecord,
    share_pod,
)

START_PATIENCE = 180.0
"""Seconds in which a new pod has to export: pulling an image, fsck and the right to serve are in it."""
LEAVE_PATIENCE = 40.0
"""Seconds in which a pod that was asked to leave may do so in order, before the next one takes the volume."""
STOP_PATIENCE = 180.0
REPORT_SILENT = 70.0
"""Seconds; three reports that did not come, on a node that is alive."""
REPAIR_PATIENCE = 60.0
RETRY_LEAST = 5.0
RETRY_MOST = 300.0
MOVE = "asked to move to "


class ShareSeen(msgspec.Struct, frozen=True, kw_only=True):
    """What was observed. Ages are seconds on our own clock, since we saw the change.

    `pods` are all of the volume's share. `report` is what the newest pod said; `report_age` since it said anything,
    `report_state_age` since its state changed. `suspects`: nodes that may be dead, and why. `in_state`: since the share
    has its state, instance and number of attempts. `leaving`: of pods that are being deleted. `instance`: a new one,
    should one be needed.
    """

    share: ShareManager
    volume: Volume | None
    record: VolumeRecord | None
    pods: tuple[Pod, ...]
    service: Service | None
    report: ShareReport | None
    report_age: float
    report_state_age: float
    suspects: dict[str, str]
    in_state: float
    leaving: dict[str, float]
    instance: str
    options: PodOptions
    now: str

    @property
    def mine(self) -> Pod | None:
        """The pod that is to serve."""
        instance = self.share.status.instance
        return next(
            (pod for pod in self.pods if instance and pod.metadata.labels.get(INSTANCE_LABEL) == instance), None
        )

    @property
    def others(self) -> tuple[Pod, ...]:
        mine = self.mine
        return tuple(pod for pod in self.pods if pod is not mine)

    @property
    def wanted(self) -> bool:
        share, volume = self.share, self.volume
        return bool(share.spec.attachments) and not share.deleting and volume is not None and not volume.deleting

    @property
    def said(self) -> ShareReport | None:
        """The report of the pod that is to serve."""
        report = self.report
        return report if report is not None and report.instance == self.share.status.instance else None


def decide(seen: ShareSeen) -> list[Action]:
    match seen.share.status.state:
        case "stopped":
            return _stopped(seen)
        case "starting":
            return _starting(seen)
        case "running":
            return _running(seen)
        case "stopping":
            return _stopping(seen)
        case "error":
            return _error(seen)


# the states


def _stopped(seen: ShareSeen) -> list[Action]:
    share = seen.share
    if seen.pods:
        # of a start that went on while it was told to stop; one that is stuck is in nobody's way
        removed = _remove(seen, seen.pods)
        if removed or share.deleting:
            return [*removed, Again(after=2.0)]
    if share.deleting:
        if FINALIZER not in share.metadata.finalizers:
            return []
        left = [one for one in share.metadata.finalizers if one != FINALIZER]
        return [Change(of=share, patch={"metadata": {"finalizers": left or None}})]
    if not seen.wanted:
        return _tell_status(seen, share.status, "False", "Stopped", "nobody is to mount it")
    volume = seen.volume
    assert volume is not None
    if volume.status.state == "faulted":
        return _fail(seen, "VolumeFaulted", _faulted(volume))
    if volume.status.state != "ready" or seen.record is None or seen.service is None:
        return [
            *_tell_status(seen, share.status, "False", "VolumeCreating", f"volume {volume.name} is being made"),
            Again(after=1.0),
        ]
    return _start(seen)


def _starting(seen: ShareSeen) -> list[Action]:
    share, status, volume, record, pod = seen.share, seen.share.status, seen.volume, seen.record, seen.mine
    if not seen.wanted:
        return _stop(seen)
    assert volume is not None
    if volume.status.state == "faulted":
        return _fail(seen, "VolumeFaulted", _faulted(volume))
    if record is None or seen.service is None:
        return [Again(after=1.0)]
    if record.spec.holder != status.instance:
        if status.failing.startswith(MOVE):
            asked = _remove(seen, seen.others)
            if asked:
                return [*asked, Again(after=1.0)]
        if _leave_in_order(seen):
            return [Again(after=0.5)]
        # the epoch before the pod, always
        spec = {
            "epoch": record.spec.epoch + 1,
            "version": record.spec.version + 1,
            "holder": status.instance,
        }
        bumped: list[Action] = [Change(of=record, patch={"spec": spec})]
        return bumped if pod is not None else [*bumped, _pod(seen, volume, record)]
    if pod is None:
        return [_pod(seen, volume, record)]
    node = pod.spec.node_name
    if pod.deleting:
        return _start(seen, failing=status.failing or "its pod was deleted while it started")
    if node in seen.suspects:
        return _start(seen, failing=f"node {node}: {seen.suspects[node]}", node=node)
    if pod.status.phase in ("Failed", "Succeeded"):
        return _fail(seen, "PodEnded", _ended(pod))
    said = seen.said
    if said is not None and said.state == "running":
        if switched := switch(seen.service, volume.name, status.instance):
            return switched
        return _ran(seen, said, node)
    if seen.in_state >= START_PATIENCE:
        why = (said.failure if said else "") or _unschedulable(pod) or f"its pod is {pod.status.phase or 'pending'}"
        return _fail(seen, "StartTimeout", f"it does not serve after {START_PATIENCE:g} s: {why}")
    message = _unschedulable(pod) or (f"pod {pod.name} on {node}: {said.failure or said.state}" if said else "")
    reason = "Unschedulable" if _unschedulable(pod) else "Starting"
    waiting = msgspec.structs.replace(status, node=node)
    return [
        *_tell_status(seen, waiting, "False", reason, message or f"waiting for pod {share.status.pod}"),
        Again(after=max(1.0, START_PATIENCE - seen.in_state)),
    ]


def _running(seen: ShareSeen) -> list[Action]:
    share, status, volume, pod, said = seen.share, seen.share.status, seen.volume, seen.mine, seen.said
    if not seen.wanted:
        return _stop(seen)
    assert volume is not None
    if trouble := _trouble(seen, pod):
        return _start(seen, failing=trouble, node=status.node)
    assert pod is not None
    node = share.spec.node
    if node and node != status.node and node not in seen.suspects:
        return _start(seen, failing=f"{MOVE}{node}", node=status.node)
    actions: list[Action] = []
    if seen.service is not None:
        actions += switch(seen.service, volume.name, status.instance)
    actions += _remove(seen, seen.others)
    if said is not None:
        status = msgspec.structs.replace(
            status,
            epoch=said.epoch,
            clients=said.clients,
            grace_ends=said.grace_ends,
            phases=said.phases,
            observed_generation=share.metadata.generation,
        )
        if said.state == "running":
            actions += _tell_status(seen, status, "True", "Exported", f"served by pod {pod.name} on {status.node}")
        else:
            message = f"pod {pod.name} repairs it: {said.failure or said.state}. It needs nobody's help so far."
            actions += _tell_status(seen, status, "False", "Repairing", message)
    return [*actions, Again(after=10.0)]


def _stopping(seen: ShareSeen) -> list[Action]:
    status = seen.share.status
    if seen.pods and seen.in_state < STOP_PATIENCE:
        return [*_remove(seen, seen.pods), Again(after=1.0)]
    stopped = msgspec.structs.replace(
        ShareManagerStatus(),
        service_ip=status.service_ip,
        epoch=status.epoch,
        last_failover=status.last_failover,
        last_failover_time=status.last_failover_time,
        observed_generation=seen.share.metadata.generation,
        conditions=status.conditions,
    )
    return [
        *_tell_status(seen, stopped, "False", "Stopped", "nobody is to mount it"),
        Tell(about=seen.share, type="Normal", reason="Stopped", message="it is stopped"),
    ]


def _error(seen: ShareSeen) -> list[Action]:
    status, volume = seen.share.status, seen.volume
    if not seen.wanted:
        return _stop(seen)
    assert volume is not None
    removed = _remove(seen, seen.pods)
    if volume.status.state == "faulted":
        # not for ever: an operator, or a replica that comes back, makes it ready again
        told_so = _tell_status(seen, status, "False", "VolumeFaulted", _faulted(volume))
        return [*removed, *told_so]
    condition = find(status.conditions, "Available")
    patience = 0.0 if condition is not None and condition.reason == "VolumeFaulted" else backoff(status.attempts)
    if seen.in_state < patience:
        return [*removed, Again(after=patience - seen.in_state)]
    return [*removed, *_start(seen, failing=status.failing, node=status.failed_node)]


def backoff(attempts: int) -> float:
    """Seconds before the next try."""
    doubled: float = RETRY_LEAST * 2 ** min(max(attempts - 1, 0), 16)
    return min(doubled, RETRY_MOST)


# the ways between them


def _start(seen: ShareSeen, *, failing: str = "", node: str = "") -> list[Action]:
    """With another instance. `failing`: why the one before is given up."""
    share, before = seen.share, seen.share.status
    volume = seen.volume
    assert volume is not None
    anew = bool(failing) and not before.failing
    status = msgspec.structs.replace(
        before,
        state="starting",
        instance=seen.instance,
        pod=share_pod(volume.name, seen.instance),
        node="",
        clients=0,
        grace_ends="",
        failing=(before.failing or failing)[:1024],
        failing_since=seen.now if anew else before.failing_since,
        failed_node=node if anew else before.failed_node,
        observed_generation=share.metadata.generation,
    )
    message = f"starting it anew: {failing}" if failing else "somebody is to mount it"
    tell = Tell(
        about=share,
        type="Warning" if failing and not failing.startswith(MOVE) else "Normal",
        reason="FailingOver" if anew else "Starting",
        message=message,
    )
    return [*_tell_status(seen, status, "False", "Starting", message), tell]


def _stop(seen: ShareSeen) -> list[Action]:
    share = seen.share
    status = msgspec.structs.replace(share.status, state="stopping", observed_generation=share.metadata.generation)
    return [
        *_tell_status(seen, status, "False", "Stopping", "nobody is to mount it any more"),
        Tell(about=share, type="Normal", reason="Stopping", message="nobody is to mount it any more"),
    ]


def _fail(seen: ShareSeen, reason: str, message: str) -> list[Action]:
    share, before = seen.share, seen.share.status
    attempts = before.attempts + 1
    again = "" if reason == "VolumeFaulted" else f" It is tried again in {backoff(attempts):g} s."
    status = msgspec.structs.replace(
        before,
        state="error",
        node="",
        attempts=attempts,
        failing=before.failing or message[:1024],
        failing_since=before.failing_since or seen.now,
        observed_generation=share.metadata.generation,
    )
    return [
        *_tell_status(
            seen, status, "False", reason, f"{message}.{again}" if not message.endswith(".") else message + again
        ),
        Tell(about=share, type="Warning", reason=reason, message=message),
    ]


def _ran(seen: ShareSeen, said: ShareReport, node: str) -> list[Action]:
    share, before = seen.share, seen.share.status
    service, volume = seen.service, seen.volume
    assert service is not None
    assert volume is not None
    address = service.spec.cluster_ip
    host = f"[{address}]" if ":" in address else address
    failover, when = before.last_failover, before.last_failover_time
    tells = Tell(
        about=share, type="Normal", reason="Running", message=f"served on {node} at nfs://{host}/{volume.name}"
    )
    if before.failing:
        seconds = _between(before.failing_since, seen.now)
        failover = Failover(at=seen.now, cause=before.failing, seconds=seconds, before=before.failed_node, after=node)
        when = seen.now
        message = f"served on {node} {seconds:g} s after it was noticed that {before.failing}"
        tells = Tell(about=share, type="Normal", reason="FailedOver", message=message)
    status = msgspec.structs.replace(
        before,
        state="running",
        endpoint=f"nfs://{host}/{volume.name}",
        service_ip=address,
        node=node,
        epoch=said.epoch,
        clients=said.clients,
        grace_ends=said.grace_ends,
        phases=said.phases,
        last_failover=failover,
        last_failover_time=when,
        failing="",
        failing_since="",
        failed_node="",
        attempts=0,
        observed_generation=share.metadata.generation,
    )
    return [*_tell_status(seen, status, "True", "Exported", f"served by pod {before.pod} on {node}"), tells]


# what is known of pods


def _trouble(seen: ShareSeen, pod: Pod | None) -> str:
    """Why the pod that serves has to be given up, or nothing."""
    if pod is None:
        return "its pod is gone"
    node = pod.spec.node_name
    if node in seen.suspects:
        return f"node {node}: {seen.suspects[node]}"
    if pod.deleting:
        return "its pod is being deleted"
    if pod.status.phase in ("Failed", "Succeeded"):
        return _ended(pod)
    if seen.said is not None and seen.report_age >= REPORT_SILENT:
        return f"its pod has said nothing for more than {REPORT_SILENT:g} s"
    if seen.said is not None and seen.said.state != "running" and seen.report_state_age >= REPAIR_PATIENCE:
        return f"its pod could not repair it in {REPAIR_PATIENCE:g} s: {seen.said.failure or seen.said.state}"
    return ""


def _leave_in_order(seen: ShareSeen) -> bool:
    """A pod that leaves has not been given up yet: what it still writes need not be sent again."""
    return any(
        pod.deleting
        and pod.spec.node_name not in seen.suspects
        and seen.leaving.get(pod.metadata.uid, 0.0) < LEAVE_PATIENCE
        for pod in seen.others
    )


def _remove(seen: ShareSeen, pods: tuple[Pod, ...]) -> list[Action]:
    """Where nobody may be there to carry it out, without waiting for anybody."""
    actions: list[Action] = []
    for pod in pods:
        if pod.spec.node_name in seen.suspects:
            if not pod.deleting or pod.metadata.deletion_grace_period_seconds:
                actions.append(Remove(of=pod, grace=0))
        elif not pod.deleting:
            actions.append(Remove(of=pod))
    return actions


def _pod(seen: ShareSeen, volume: Volume, record: VolumeRecord) -> Create:
    share = seen.share
    node = share.spec.node if share.spec.node not in seen.suspects else ""
    body = share_pod_body(
        share,
        volume,
        instance=share.status.instance,
        options=seen.options,
        avoid=tuple(sorted(seen.suspects)),
        node=node,
        near=tuple(one.node for one in record.spec.replicas if one.name in record.spec.in_sync),
    )
    return Create(kind=Pod, body=body)


def _ended(pod: Pod) -> str:
    why = pod.status.message or pod.status.reason or pod.status.phase
    return f"its pod {pod.name} ended: {why}"


def _unschedulable(pod: Pod) -> str:
    for one in pod.status.conditions:
        if one.type == "PodScheduled" and one.status == "False":
            return f"no node takes pod {pod.name}: {one.message}"
    return ""


def _faulted(volume: Volume) -> str:
    healthy = find(volume.status.conditions, "Healthy")
    return healthy.message if healthy is not None else f"volume {volume.name} is faulted"


def _tell_status(
    seen: ShareSeen, status: ShareManagerStatus, available: Status, reason: str, message: str
) -> list[Action]:
    conditions = told(
        status.conditions,
        "Available",
        available,
        reason,
        message,
        now=seen.now,
        generation=seen.share.metadata.generation,
    )
    status = msgspec.structs.replace(status, conditions=conditions)
    if status == seen.share.status:
        return []
    return [SetStatus(before=seen.share, after=msgspec.structs.replace(seen.share, status=status))]


def _between(earlier: str, later: str) -> float:
    """Seconds, for people: the two may be of different machines."""
    try:
        difference = datetime.datetime.fromisoformat(later) - datetime.datetime.fromisoformat(earlier)
    except ValueError:
        return 0.0
    return max(0.0, round(difference.total_seconds(), 1))
