"""The objects of `share-manager.io/v1beta1`: the one source of the custom resource definitions in deploy/crds.

Spec is what is wanted, status what is; only the controller of a kind writes its status. A description, a range and a
default stand at the field that they are about, and are in the schema that the API server enforces.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta

from share_manager.kube.meta import Condition, Model, Object, Time
from share_manager.units import BLOCK, MAX_REPLICAS, MAX_SIZE, MIN_SIZE, SHORTEST_LEASE

GROUP = "share-manager.io"
VERSION = "v1beta1"
GROUP_VERSION = f"{GROUP}/{VERSION}"

VOLUME_LABEL = f"{GROUP}/volume"
"""On everything that belongs to a volume: its name."""
NODE_LABEL = f"{GROUP}/node"
INSTANCE_LABEL = f"{GROUP}/instance"
"""On a share's pod: unique to it. The volume's Service selects it."""
COMPONENT_LABEL = f"{GROUP}/component"
ERASE_ANNOTATION = f"{GROUP}/erase-data"
"""On a Volume, with its name as the value: deleting it erases its data. CSI DeleteVolume sets it."""
SALVAGE_ANNOTATION = f"{GROUP}/salvage"
"""On a Volume, with a replica's name as the value: go on from that replica, whatever others may have had."""
FINALIZER = f"{GROUP}/ordered"
REPORT_ANNOTATION = f"{GROUP}/report"
"""On the Lease of a share: a `ShareReport`."""
SHARE_COMPONENT = "share"
FIRST_PORT = 7500
"""Of replicas, on every node."""


def share_lease(volume: str) -> str:
    """Name of the Lease that a share's pod renews."""
    return f"share-{volume}"


def node_lease(node: str) -> str:
    """Name of the Lease that a node's agent renews."""
    return f"storage-{node}"


def share_pod(volume: str, instance: str) -> str:
    return f"sm-{volume}-{instance}"


DNS_LABEL = "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"
Size = Annotated[
    int, Meta(ge=MIN_SIZE["none"], le=MAX_SIZE, multiple_of=BLOCK, description="Bytes, a multiple of 4096.")
]
Conditions = Annotated[tuple[Condition, ...], Meta(description="What is so, in words that tell what to do.")]
Generation = Annotated[int, Meta(ge=0, description="Generation of the spec that this status is about.")]
NodeName = Annotated[str, Meta(max_length=253, description="Name of a Kubernetes node.")]


class Resource(Object, frozen=True, kw_only=True):
    """One of ours. `COLUMNS` are printer columns: name, type, path, and 1 for those that `-o wide` shows."""

    GROUP_VERSION: ClassVar[str] = GROUP_VERSION
    SHORT_NAMES: ClassVar[tuple[str, ...]]
    COLUMNS: ClassVar[tuple[tuple[str, str, str, int], ...]]


class EncryptionSpec(Model, frozen=True, kw_only=True):
    """Of the LUKS2 header that a new volume gets."""

    cipher: Annotated[str, Meta(pattern="^[a-z0-9][a-z0-9:_-]{0,63}$", description="As cryptsetup writes it.")] = (
        "aes-xts-plain64"
    )
    hash: Annotated[str, Meta(pattern="^[a-z0-9][a-z0-9:_-]{0,63}$", description="Digest of the key derivation.")] = (
        "sha256"
    )
    key_size: Annotated[Literal[128, 256, 512], Meta(description="Bits.")] = 256
    pbkdf: Annotated[
        Literal["argon2i", "argon2id", "pbkdf2"], Meta(description="How the key is derived from the passphrase.")
    ] = "argon2i"
    allow_discards: Annotated[
        bool, Meta(description="Give unused space back to the replicas' disks, which shows what is in use.")
    ] = False


class ExportSpec(Model, frozen=True, kw_only=True):
    """How clients see it."""

    squash: Annotated[Literal["none", "root", "all"], Meta(description="Which users become nobody (65534).")] = "none"
    read_only: Annotated[bool, Meta(description="Clients may only read.")] = False
    allow: Annotated[
        tuple[Annotated[str, Meta(max_length=49)], ...],
        Meta(
            max_length=256,
            description="Networks (CIDR) whose clients may mount, besides the published nodes and loopback.",
        ),
    ] = ()
    root_uid: Annotated[int, Meta(ge=0, le=(1 << 32) - 2, description="Owner of the export's root.")] = 0
    root_gid: Annotated[int, Meta(ge=0, le=(1 << 32) - 2, description="Group of the export's root.")] = 0
    root_mode: Annotated[str, Meta(pattern="^[0-7]{3,4}$", description="Mode of the export's root, in octal.")] = "0777"
    lease_lifetime: Annotated[
        int, Meta(ge=SHORTEST_LEASE, le=120, description="Seconds that a silent client keeps its locks.")
    ] = 20
    grace_period: Annotated[
        int,
        Meta(
            ge=SHORTEST_LEASE,
            le=180,
            description="Seconds after a restart in which clients reclaim; at least the lease.",
        ),
    ] = 30


class VolumeSpec(Model, frozen=True, kw_only=True):
    size: Size
    replicas: Annotated[int, Meta(ge=1, le=MAX_REPLICAS, description="Copies, each on another node.")] = 3
    filesystem: Annotated[Literal["ext4", "xfs"], Meta(description="Made when it is first used.")] = "ext4"
    encrypted: Annotated[bool, Meta(description="LUKS2 below the filesystem.")] = False
    encryption: Annotated[EncryptionSpec, Meta(description="Of the LUKS2 header that a new volume gets.")] = (
        EncryptionSpec()
    )
    export: Annotated[ExportSpec, Meta(description="How clients see it.")] = ExportSpec()
    access_mode: Annotated[
        Literal["ReadWriteMany", "ReadWriteOnce"], Meta(description="Whether several nodes may use it at once.")
    ] = "ReadWriteMany"
    original_name: Annotated[
        str, Meta(max_length=128, description="What CSI called it, when that is no DNS label.")
    ] = ""
    dirsync: Annotated[
        bool, Meta(description="Have created, renamed and removed names on disk before the client is answered.")
    ] = True


class VolumeStatus(Model, frozen=True, kw_only=True):
    state: Annotated[
        Literal["creating", "ready", "faulted", "deleting"],
        Meta(description="Ready: it can be used. Faulted: no replica can be used, until somebody salvages it."),
    ] = "creating"
    robustness: Annotated[
        Literal["unknown", "healthy", "degraded", "faulted"],
        Meta(description="Whether as many replicas are in sync as are wanted."),
    ] = "unknown"
    size: Annotated[int, Meta(ge=0, description="Bytes that it has.")] = 0
    in_sync: Annotated[int, Meta(ge=0, description="Replicas that hold every acknowledged write.")] = 0
    observed_generation: Generation = 0
    conditions: Conditions = ()


class Volume(Resource, frozen=True, kw_only=True):
    """A replicated block volume with a filesystem, for many clients at once."""

    PLURAL: ClassVar[str] = "volumes"
    SHORT_NAMES: ClassVar[tuple[str, ...]] = ("smvol",)
    COLUMNS: ClassVar[tuple[tuple[str, str, str, int], ...]] = (
        ("State", "string", ".status.state", 0),
        ("Robustness", "string", ".status.robustness", 0),
        ("Size", "integer", ".spec.size", 0),
        ("Replicas", "integer", ".spec.replicas", 0),
        ("In-Sync", "integer", ".status.inSync", 0),
        ("Encrypted", "boolean", ".spec.encrypted", 1),
        ("Age", "date", ".metadata.creationTimestamp", 0),
    )

    spec: VolumeSpec
    status: VolumeStatus = VolumeStatus()


class RecordedReplica(Model, frozen=True, kw_only=True):
    name: Annotated[
        str, Meta(pattern="^[a-z]([a-z0-9-]{0,8}[a-z0-9])?$", description="Unique in the volume, and never used again.")
    ]
    node: NodeName
    address: Annotated[str, Meta(max_length=300, description="Where its server listens: tcp:host:port.")]
    directory: Annotated[str, Meta(max_length=4096, description="Below the data directory of its node.")]


class RecordedRevert(Model, frozen=True, kw_only=True):
    revert: Annotated[str, Meta(description="Name of the snapshot.")]
    created: Annotated[str, Meta(description="Time of the new head.")]


class VolumeRecordSpec(Model, frozen=True, kw_only=True):
    """What must survive every crash about a volume."""

    format: Annotated[int, Meta(ge=1, description="A release refuses one that it does not know.")] = 1
    uuid: Annotated[
        str, Meta(pattern="^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$", description="Of the volume, for ever.")
    ]
    size: Size
    version: Annotated[int, Meta(ge=1, description="Counts the changes.")] = 1
    epoch: Annotated[
        int, Meta(ge=0, description="Counts the attachments; replicas refuse every one but the newest.")
    ] = 0
    holder: Annotated[
        str, Meta(max_length=63, description="Instance whose attachment that is; nobody else may write.")
    ] = ""
    replicas: Annotated[
        tuple[RecordedReplica, ...], Meta(min_length=1, max_length=2 * MAX_REPLICAS, description="All there are.")
    ]
    in_sync: Annotated[
        tuple[Annotated[str, Meta(max_length=10)], ...],
        Meta(
            min_length=1, max_length=2 * MAX_REPLICAS, description="Names of those that hold every acknowledged write."
        ),
    ]
    pending: Annotated[
        RecordedRevert | None, Meta(description="A revert to a snapshot that the next attachment finishes.")
    ] = None
    reverted_without: Annotated[
        tuple[Annotated[str, Meta(max_length=10)], ...],
        Meta(max_length=2 * MAX_REPLICAS, description="Names of absent replicas that a revert did not reach."),
    ] = ()
    unformatted: Annotated[
        bool, Meta(description="No client was ever served: what is on it may be the rest of an interrupted mkfs.")
    ] = False


class VolumeRecord(Resource, frozen=True, kw_only=True):
    """Which replicas of a volume are in sync, under which epoch. Written by the attached engine alone, except for the
    controller's epoch bump; every write carries the resourceVersion. Do not edit it."""

    PLURAL: ClassVar[str] = "volumerecords"
    SHORT_NAMES: ClassVar[tuple[str, ...]] = ("smrec",)
    COLUMNS: ClassVar[tuple[tuple[str, str, str, int], ...]] = (
        ("Epoch", "integer", ".spec.epoch", 0),
        ("In-Sync", "string", ".spec.inSync", 0),
        ("Size", "integer", ".spec.size", 1),
        ("Age", "date", ".metadata.creationTimestamp", 0),
    )

    spec: VolumeRecordSpec


class ReplicaSpec(Model, frozen=True, kw_only=True):
    volume: Annotated[str, Meta(pattern=DNS_LABEL, description="Name of its Volume.")]
    replica: Annotated[
        str, Meta(pattern="^[a-z]([a-z0-9-]{0,8}[a-z0-9])?$", description="Its name in the volume's record.")
    ]
    node: NodeName
    disk: Annotated[str, Meta(max_length=63, description="Name of a disk of that StorageNode.")] = "default"
    port: Annotated[int, Meta(ge=1024, le=65535, description="TCP port of its server on that node.")]
    size: Size
    volume_uuid: Annotated[
        str, Meta(max_length=64, description="The volume's uuid, so that no other's data is taken for its.")
    ]
    erase: Annotated[bool, Meta(description="Deleting the object erases the data.")] = False


class ReplicaStatus(Model, frozen=True, kw_only=True):
    state: Annotated[
        Literal["pending", "running", "failed", "unknown", "erased"],
        Meta(description="Running: its server answers. Erased: there is no data any more."),
    ] = "pending"
    address: Annotated[str, Meta(max_length=300, description="Where its server listens: tcp:host:port.")] = ""
    directory: Annotated[str, Meta(max_length=4096, description="Below the data directory of its node.")] = ""
    restarts: Annotated[int, Meta(ge=0, description="Of its server, since its node agent started.")] = 0
    observed_generation: Generation = 0
    conditions: Conditions = ()


class Replica(Resource, frozen=True, kw_only=True):
    """One copy of a volume, on one node. Deleting the object keeps the data unless `spec.erase` says otherwise."""

    PLURAL: ClassVar[str] = "replicas"
    SHORT_NAMES: ClassVar[tuple[str, ...]] = ("smrep",)
    COLUMNS: ClassVar[tuple[tuple[str, str, str, int], ...]] = (
        ("State", "string", ".status.state", 0),
        ("Volume", "string", ".spec.volume", 0),
        ("Node", "string", ".spec.node", 0),
        ("Address", "string", ".status.address", 1),
        ("Age", "date", ".metadata.creationTimestamp", 0),
    )

    spec: ReplicaSpec
    status: ReplicaStatus = ReplicaStatus()


class Attachment(Model, frozen=True, kw_only=True):
    """A node that is to be able to mount it."""

    read_only: Annotated[bool, Meta(description="It only reads.")] = False
    nfs_options: Annotated[
        str, Meta(max_length=1024, description="Mount options that were resolved when it was published.")
    ] = ""


class ShareManagerSpec(Model, frozen=True, kw_only=True):
    attachments: Annotated[
        dict[str, Attachment],
        Meta(description="Nodes that are to be able to mount it, by name; none: it is to be stopped."),
    ] = msgspec.field(default_factory=dict)
    node: Annotated[
        str, Meta(max_length=253, description="Node that is to serve it; empty: whichever suits. Changing it moves it.")
    ] = ""
    passphrase_secret: Annotated[
        str, Meta(max_length=253, description="Secret in this namespace that unlocks an encrypted volume.")
    ] = ""


class Failover(Model, frozen=True, kw_only=True):
    at: Annotated[Time, Meta(description="When the share was exported again.")]
    cause: Annotated[str, Meta(max_length=1024, description="Why it had to start anew.")]
    seconds: Annotated[float, Meta(ge=0, description="From when it was noticed until it was exported.")]
    before: Annotated[str, Meta(max_length=253, description="Node that served before.")] = ""
    after: Annotated[str, Meta(max_length=253, description="Node that serves since.")] = ""


class ShareManagerStatus(Model, frozen=True, kw_only=True):
    state: Annotated[
        Literal["stopped", "starting", "running", "stopping", "error"],
        Meta(description="Stopped: nobody mounts it. Error: it is tried again; the conditions say what is the matter."),
    ] = "stopped"
    endpoint: Annotated[str, Meta(max_length=400, description="nfs://ADDRESS/VOLUME while it is running.")] = ""
    service_ip: Annotated[str, Meta(max_length=64, description="Of its Service, for the volume's life.")] = ""
    node: Annotated[str, Meta(max_length=253, description="Node that serves it.")] = ""
    pod: Annotated[str, Meta(max_length=253, description="Name of the pod that is to serve it.")] = ""
    instance: Annotated[str, Meta(max_length=63, description="Label of that pod alone.")] = ""
    epoch: Annotated[int, Meta(ge=0, description="Of its attachment.")] = 0
    clients: Annotated[int, Meta(ge=0, description="That hold a lease.")] = 0
    phases: Annotated[dict[str, float], Meta(description="Seconds that each step of the last start took.")] = (
        msgspec.field(default_factory=dict)
    )
    grace_ends: Annotated[Time, Meta(description="Until then clients reclaim, and new opens and locks wait.")] = ""
    last_failover: Annotated[Failover | None, Meta(description="The last time that it had to start anew.")] = None
    last_failover_time: Annotated[Time, Meta(description="When that was.")] = ""
    failing: Annotated[str, Meta(max_length=1024, description="Why it has to start anew, while that is under way.")] = (
        ""
    )
    failing_since: Annotated[Time, Meta(description="When that was noticed.")] = ""
    failed_node: Annotated[str, Meta(max_length=253, description="Node that served before that.")] = ""
    attempts: Annotated[int, Meta(ge=0, description="Starts that failed in a row.")] = 0
    observed_generation: Generation = 0
    conditions: Conditions = ()


class ShareManager(Resource, frozen=True, kw_only=True):
    """The NFS server of one volume."""

    PLURAL: ClassVar[str] = "sharemanagers"
    SHORT_NAMES: ClassVar[tuple[str, ...]] = ("smshare",)
    COLUMNS: ClassVar[tuple[tuple[str, str, str, int], ...]] = (
        ("State", "string", ".status.state", 0),
        ("Endpoint", "string", ".status.endpoint", 0),
        ("Node", "string", ".status.node", 0),
        ("Clients", "integer", ".status.clients", 0),
        ("Last-Failover", "date", ".status.lastFailoverTime", 0),
        ("Epoch", "integer", ".status.epoch", 1),
        ("Pod", "string", ".status.pod", 1),
        ("Age", "date", ".metadata.creationTimestamp", 0),
    )

    spec: ShareManagerSpec = ShareManagerSpec()
    status: ShareManagerStatus = ShareManagerStatus()


class Disk(Model, frozen=True, kw_only=True):
    path: Annotated[str, Meta(pattern="^/", max_length=4096, description="Directory on the node.")]
    schedulable: Annotated[bool, Meta(description="Whether new replicas may be placed on it.")] = True
    reserved: Annotated[int, Meta(ge=0, description="Bytes that replicas leave free.")] = 0


class ShareReport(Model, frozen=True, kw_only=True):
    """What a share's pod says of itself, in an annotation of the share's Lease. `state` as in `share-manager status`;
    `grace_ends` is a time."""

    instance: str
    node: str = ""
    state: str = "starting"
    epoch: int = 0
    clients: int = 0
    grace_ends: Time = ""
    phases: dict[str, float] = msgspec.field(default_factory=dict)
    failure: str = ""


class StorageNodeSpec(Model, frozen=True, kw_only=True):
    schedulable: Annotated[bool, Meta(description="Whether new replicas may be placed on it.")] = True
    disks: Annotated[dict[str, Disk], Meta(description="By name.")] = msgspec.field(default_factory=dict)


class DiskStatus(Model, frozen=True, kw_only=True):
    uuid: Annotated[str, Meta(max_length=64, description="Of the directory's marker file.")] = ""
    total: Annotated[int, Meta(ge=0, description="Bytes.")] = 0
    available: Annotated[int, Meta(ge=0, description="Bytes.")] = 0
    problem: Annotated[str, Meta(max_length=1024, description="Why it cannot be used; empty: it can.")] = ""


class OrphanedReplica(Model, frozen=True, kw_only=True):
    """A replica on a node's disk without a Replica, or a VolumeRecord: `share-manager volume adopt` brings its volume
    back."""

    volume: Annotated[str, Meta(max_length=253, description="Name that its Volume had.")]
    uuid: Annotated[str, Meta(max_length=64, description="The volume's uuid.")]
    replica: Annotated[str, Meta(max_length=10, description="Its name in the volume's record.")]
    directory: Annotated[str, Meta(max_length=4096, description="Below the data directory of the node.")]
    size: Annotated[int, Meta(ge=0, description="Bytes of the volume.")] = 0
    epoch: Annotated[int, Meta(ge=0, description="Highest that it has seen.")] = 0
    rebuilding: Annotated[bool, Meta(description="It is known to be incomplete.")] = False
    copy: Annotated[str, Meta(max_length=32768, description="Of the volume and its record, as JSON.")] = ""


class StorageNodeStatus(Model, frozen=True, kw_only=True):
    addresses: Annotated[
        tuple[Annotated[str, Meta(max_length=64)], ...],
        Meta(max_length=256, description="All addresses of the host, as its clients may be seen by any of them."),
    ] = ()
    replica_address: Annotated[
        str, Meta(max_length=300, description="host:port at which its replicas are served; empty: not served.")
    ] = ""
    disks: Annotated[dict[str, DiskStatus], Meta(description="By name.")] = msgspec.field(default_factory=dict)
    orphans: Annotated[
        tuple[OrphanedReplica, ...],
        Meta(max_length=128, description="Replicas on its disks without a Replica, or without a record."),
    ] = ()
    observed_generation: Generation = 0
    conditions: Conditions = ()


class StorageNode(Resource, frozen=True, kw_only=True):
    """A node that holds replicas or mounts volumes, named like the Kubernetes node. It says that it is alive by a
    Lease of the name `storage-NODE`."""

    PLURAL: ClassVar[str] = "storagenodes"
    SHORT_NAMES: ClassVar[tuple[str, ...]] = ("smnode",)
    COLUMNS: ClassVar[tuple[tuple[str, str, str, int], ...]] = (
        ("Ready", "string", '.status.conditions[?(@.type=="Ready")].status', 0),
        ("Schedulable", "boolean", ".spec.schedulable", 0),
        ("Address", "string", ".status.replicaAddress", 1),
        ("Age", "date", ".metadata.creationTimestamp", 0),
    )

    spec: StorageNodeSpec = StorageNodeSpec()
    status: StorageNodeStatus = StorageNodeStatus()


RESOURCES: tuple[type[Resource], ...] = (Volume, VolumeRecord, Replica, ShareManager, StorageNode)
