"""What a running share can be asked to do: one Struct for each request, one for its result (share/control.py)."""

from __future__ import annotations

import msgspec


class ShareRequest(msgspec.Struct, frozen=True, kw_only=True, tag_field="op"):
    """Common root of the requests."""


class ResizeShare(ShareRequest, frozen=True, tag="resize"):
    """Grow the volume, its device and its filesystem to `size` bytes."""

    size: int


class ShareResized(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes. `filesystem` says what became of it: grown, "full size already", "later" (at the next serve), or none."""

    size: int
    before: int
    filesystem: str


class TrimShare(ShareRequest, frozen=True, tag="trim"):
    """Discard what the filesystem does not use."""


class ShareTrimmed(msgspec.Struct, frozen=True, kw_only=True):
    """`discarded`: bytes that the filesystem called unused. `freed`: bytes that the replicas gave back together."""

    discarded: int
    freed: int


class SnapshotShare(ShareRequest, frozen=True, tag="snapshot"):
    """Take a snapshot with the filesystem at rest; answered by `engine.operations.SnapshotCreated`."""

    name: str
    labels: dict[str, str] = {}


class ChangePassphrase(ShareRequest, frozen=True, tag="change_passphrase"):
    """Of an encrypted volume. Never shown: the socket is root's alone."""

    old: bytes
    new: bytes

    def __repr__(self) -> str:
        return "ChangePassphrase(...)"


class PassphraseChanged(msgspec.Struct, frozen=True, kw_only=True):
    """`removed`: key slots that the old passphrase had opened; 0 when it had gone already."""

    removed: int


class BackupHeader(ShareRequest, frozen=True, tag="backup_header"):
    """Copy the LUKS header to a new file, of which `path` is absolute."""

    path: str


class HeaderSaved(msgspec.Struct, frozen=True, kw_only=True):
    uuid: str


class AllowClients(ShareRequest, frozen=True, tag="allow"):
    """Let only clients of these networks (CIDR; none: everyone) use the share, from now on."""

    networks: tuple[str, ...]


class ClientsAllowed(msgspec.Struct, frozen=True, kw_only=True):
    networks: tuple[str, ...]


class UpgradeEngine(ShareRequest, frozen=True, tag="upgrade_engine"):
    """Replace the engine process. With `reattach` by a new attachment where it cannot be done in place."""

    reattach: bool = False


class EngineUpgraded(msgspec.Struct, frozen=True, kw_only=True):
    """`pause`: seconds from telling the old process to leave until the new one served; None for a new attachment."""

    pid: int
    before: int
    incarnation: int
    pause: float | None = None


class StartReplica(ShareRequest, frozen=True, tag="replica_start"):
    """Serve a replica's directory at the address that belongs to its name."""

    name: str
    directory: str


class StopReplica(ShareRequest, frozen=True, tag="replica_stop"):
    """Have a replica's server leave, and start it no more."""

    name: str


class ReplicaServed(msgspec.Struct, frozen=True, kw_only=True):
    name: str
