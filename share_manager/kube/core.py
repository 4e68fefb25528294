"""The objects of Kubernetes that we touch, as far as we look at them. They are never sent back whole: what is changed
is sent as a patch, so that what is not in these types stays as it is."""

from __future__ import annotations

from typing import ClassVar, Literal

import msgspec

from share_manager.kube.meta import Model, Object


class CoreCondition(Model, frozen=True, kw_only=True):
    type: str = ""
    status: str = ""
    reason: str = ""
    message: str = ""


class ContainerStatus(Model, frozen=True, kw_only=True):
    name: str
    ready: bool = False
    restart_count: int = 0


class Toleration(Model, frozen=True, kw_only=True):
    key: str = ""
    operator: str = ""
    value: str = ""
    effect: str = ""


class PodSpec(Model, frozen=True, kw_only=True):
    node_name: str = ""
    host_network: bool = False


class PodStatus(Model, frozen=True, kw_only=True):
    phase: str = ""
    reason: str = ""
    message: str = ""
    pod_ip: str = ""
    host_ip: str = ""
    conditions: tuple[CoreCondition, ...] = ()
    container_statuses: tuple[ContainerStatus, ...] = ()


class Pod(Object, frozen=True, kw_only=True):
    GROUP_VERSION: ClassVar[str] = "v1"
    PLURAL: ClassVar[str] = "pods"

    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()


class ServicePort(Model, frozen=True, kw_only=True):
    name: str = ""
    port: int
    protocol: str = ""


class ServiceSpec(Model, frozen=True, kw_only=True):
    cluster_ip: str = ""
    selector: dict[str, str] = msgspec.field(default_factory=dict)
    ports: tuple[ServicePort, ...] = ()


class Service(Object, frozen=True, kw_only=True):
    GROUP_VERSION: ClassVar[str] = "v1"
    PLURAL: ClassVar[str] = "services"

    spec: ServiceSpec = ServiceSpec()


class Taint(Model, frozen=True, kw_only=True):
    key: str
    value: str = ""
    effect: str = ""


class NodeSpec(Model, frozen=True, kw_only=True):
    unschedulable: bool = False
    taints: tuple[Taint, ...] = ()


class NodeAddress(Model, frozen=True, kw_only=True):
    type: str
    address: str


class NodeSystemInfo(Model, frozen=True, kw_only=True):
    kernel_version: str = ""


class NodeStatus(Model, frozen=True, kw_only=True):
    conditions: tuple[CoreCondition, ...] = ()
    addresses: tuple[NodeAddress, ...] = ()
    node_info: NodeSystemInfo = NodeSystemInfo()


class Node(Object, frozen=True, kw_only=True):
    GROUP_VERSION: ClassVar[str] = "v1"
    PLURAL: ClassVar[str] = "nodes"
    NAMESPACED: ClassVar[bool] = False

    spec: NodeSpec = NodeSpec()
    status: NodeStatus = NodeStatus()

    @property
    def ready(self) -> bool:
        return any(one.type == "Ready" and one.status == "True" for one in self.status.conditions)


class Secret(Object, frozen=True, kw_only=True):
    """`data` is base64. Never logged: its representation has the names of the keys only."""

    GROUP_VERSION: ClassVar[str] = "v1"
    PLURAL: ClassVar[str] = "secrets"

    data: dict[str, str] = msgspec.field(default_factory=dict)
    type: str = "Opaque"
    immutable: bool = False

    def __repr__(self) -> str:
        return f"Secret({self.key}, {sorted(self.data)})"


class LeaseSpec(Model, frozen=True, kw_only=True):
    holder_identity: str = ""
    lease_duration_seconds: int = 0
    acquire_time: str | None = None
    renew_time: str | None = None
    lease_transitions: int = 0


class Lease(Object, frozen=True, kw_only=True):
    GROUP_VERSION: ClassVar[str] = "coordination.k8s.io/v1"
    PLURAL: ClassVar[str] = "leases"

    spec: LeaseSpec = LeaseSpec()


class ObjectReference(Model, frozen=True, kw_only=True):
    api_version: str = ""
    kind: str = ""
    namespace: str = ""
    name: str = ""
    uid: str = ""


class EventSource(Model, frozen=True, kw_only=True):
    component: str = ""
    host: str = ""


class Event(Object, frozen=True, kw_only=True):
    GROUP_VERSION: ClassVar[str] = "v1"
    PLURAL: ClassVar[str] = "events"

    involved_object: ObjectReference
    reason: str = ""
    message: str = ""
    type: Literal["Normal", "Warning"] = "Normal"
    count: int = 1
    first_timestamp: str | None = None
    last_timestamp: str | None = None
    source: EventSource = EventSource()
    reporting_component: str = ""
    reporting_instance: str = ""


class CustomResourceDefinition(Object, frozen=True, kw_only=True):
    GROUP_VERSION: ClassVar[str] = "apiextensions.k8s.io/v1"
    PLURAL: ClassVar[str] = "customresourcedefinitions"
    NAMESPACED: ClassVar[bool] = False


class Namespace(Object, frozen=True, kw_only=True):
    GROUP_VERSION: ClassVar[str] = "v1"
    PLURAL: ClassVar[str] = "namespaces"
    NAMESPACED: ClassVar[bool] = False
