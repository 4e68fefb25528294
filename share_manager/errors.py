"""Every error a user may see, split by who can do something about it, each with a stable exit status.

    1  runtime      something failed while it ran
    2  usage        the command line says something that cannot be
    3  environment  this machine lacks something: a program, a kernel feature, root
    4  conflict     the thing is in use, or exists and is different
    5  not found    no such volume
    6  storage      no space, or no replica that may be used

Statuses are part of the interface: scripts rely on them.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from engine.client import EngineOperationError
from engine.errors import (
    EngineError,
    FencedError,
    NoReplicaError,
    RecordConflictError,
    RecordMissingError,
    SnapshotNotFoundError,
    StoreError,
)

PACKAGES = {
    "blkid": "util-linux",
    "chattr": "e2fsprogs",
    "cryptsetup": "cryptsetup-bin",
    "dbus-daemon": "dbus-daemon",
    "dmsetup": "dmsetup",
    "e2fsck": "e2fsprogs",
    "ganesha.nfsd": "nfs-ganesha nfs-ganesha-vfs",
    "ip": "iproute2",
    "losetup": "mount",
    "mkfs.ext4": "e2fsprogs",
    "mkfs.xfs": "xfsprogs",
    "mount": "mount",
    "mount.nfs": "nfs-common",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
    "fstrim": "util-linux",
    "resize2fs": "e2fsprogs",
    "sync": "coreutils",
    "tune2fs": "e2fsprogs",
    "umount": "mount",
    "xfs_admin": "xfsprogs",
    "xfs_growfs": "xfsprogs",
    "xfs_repair": "xfsprogs",
}
"""Program to the Debian packages that bring it."""


class ShareManagerError(Exception):
    """Root of the tree."""

    exit_status: ClassVar[int] = 1


class UsageError(ShareManagerError):
    """What was asked for makes no sense as written."""

    exit_status = 2


class InvalidValueError(UsageError):
    def __init__(self, what: str, value: str, reason: str) -> None:
        super().__init__(what, value, reason)
        self.what = what
        self.value = value
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.what} {self.value!r}: {self.reason}"


class PassphraseError(UsageError):
    """What should hold a passphrase does not. `where` is a file, a key in it, or stdin."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(where, reason)
        self.where = where
        self.reason = reason

    def __str__(self) -> str:
        return f"no passphrase in {self.where}: {self.reason}"


class HeaderBackupError(UsageError):
    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"header backup {self.path}: {self.reason}"


class EnvironmentProblem(ShareManagerError):  # noqa: N818 - "EnvironmentError" is a builtin's old name
    """This machine cannot do it."""

    exit_status = 3


class MissingProgramError(EnvironmentProblem):
    def __init__(self, program: str) -> None:
        super().__init__(program)
        self.program = program

    def __str__(self) -> str:
        package = PACKAGES.get(self.program)
        remedy = f": apt-get install {package}" if package else ""
        return f"the program {self.program} is not installed{remedy}"


class NotRootError(EnvironmentProblem):
    def __init__(self, command: str) -> None:
        super().__init__(command)
        self.command = command

    def __str__(self) -> str:
        return f"{self.command} mounts filesystems and needs root with CAP_SYS_ADMIN: run it with sudo"


class KernelFeatureError(EnvironmentProblem):
    def __init__(self, feature: str, remedy: str) -> None:
        super().__init__(feature, remedy)
        self.feature = feature
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.feature}: {self.remedy}"


class KeyslotMemoryError(EnvironmentProblem):
    def __str__(self) -> str:
        return (
            "there is not enough memory to derive the key from the passphrase: give this machine or container more, or "
            "make new encrypted volumes with less (--luks-pbkdf-memory)"
        )


class HandleError(EnvironmentProblem):
    """File handles would carry a device number, which changes with the machine, instead of the filesystem's UUID."""

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.device = device

    def __str__(self) -> str:
        return (
            "ganesha does not know the filesystem's UUID, so clients would get stale handles after a failover: check "
            f"that `blkid -p {self.device}` shows it and that /etc/mtab lists mounts"
        )


class RuntimeProblem(ShareManagerError):  # noqa: N818 - beside EnvironmentProblem
    """It was worth trying, and failed."""


class RemoteProblem(RuntimeProblem):
    """What a running share said when it was asked for something; it says with which status to end."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message, exit_status)
        self.message = message
        self.exit_status = exit_status  # type: ignore[misc]

    def __str__(self) -> str:
        return self.message


class InterruptedProblem(RuntimeProblem):
    """A signal ended it, in order."""

    exit_status = 130

    def __str__(self) -> str:
        return "interrupted"


class CommandError(RuntimeProblem):
    """A program that was run for its effect failed."""

    def __init__(self, argv: Sequence[str], status: int, output: str) -> None:
        super().__init__(tuple(argv), status, output)
        self.argv = tuple(argv)
        self.status = status
        self.output = output

    def __str__(self) -> str:
        how = f"was killed by signal {-self.status}" if self.status < 0 else f"failed with status {self.status}"
        lines = [line.strip() for line in self.output.splitlines() if line.strip()]
        detail = f": {'; '.join(lines[-3:])}" if lines else ""
        return f"{' '.join(self.argv)} {how}{detail}"


class TimeoutProblem(RuntimeProblem):
    def __init__(self, what: str, seconds: float) -> None:
        super().__init__(what, seconds)
        self.what = what
        self.seconds = seconds

    def __str__(self) -> str:
        return f"{self.what} took longer than {self.seconds:g} s"


class ProcessDiedError(RuntimeProblem):
    """A process of the volume ended that should be running."""

    def __init__(self, name: str, status: int | None, reason: str, log: Path | None = None) -> None:
        super().__init__(name, status, reason, log)
        self.name = name
        self.status = status
        self.reason = reason
        self.log = log

    def __str__(self) -> str:
        if self.status is None:
            how = "died"
        elif self.status < 0:
            how = f"was killed by signal {-self.status}"
        else:
            how = f"ended with status {self.status}"
        reason = f": {self.reason}" if self.reason else ""
        log = f" (log: {self.log})" if self.log else ""
        return f"{self.name} {how}{reason}{log}"


class ReplicaProcessError(RuntimeProblem):
    """A replica's server cannot be started."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"replica {self.name} cannot be started: {self.reason}"


class GaveUpError(RuntimeProblem):
    def __init__(self, attempts: int, last: str) -> None:
        super().__init__(attempts, last)
        self.attempts = attempts
        self.last = last

    def __str__(self) -> str:
        return f"gave up after {self.attempts} repairs in a row that did not last; the last one failed so: {self.last}"


class FilesystemError(RuntimeProblem):
    """The volume's filesystem cannot be used as it is."""

    def __init__(self, device: str, reason: str) -> None:
        super().__init__(device, reason)
        self.device = device
        self.reason = reason

    def __str__(self) -> str:
        return f"filesystem on {self.device}: {self.reason}"


class NetworkError(RuntimeProblem):
    """The share's network could not be set up or changed."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class LeftoverError(RuntimeProblem):
    """Something of an earlier run cannot be removed."""

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(what, reason)
        self.what = what
        self.reason = reason

    def __str__(self) -> str:
        return f"left over from an earlier run and cannot be removed: {self.what}: {self.reason}"


class ConflictError(RuntimeProblem):
    exit_status = 4


class PortInUseError(ConflictError):
    def __init__(self, address: str, port: int, option: str = "--port") -> None:
        super().__init__(address, port, option)
        self.address = address
        self.port = port
        self.option = option

    def __str__(self) -> str:
        return f"port {self.port} on {self.address} is in use: choose another with {self.option} or --bind"


class AddressError(ConflictError):
    def __init__(self, address: str, port: int, reason: str) -> None:
        super().__init__(address, port, reason)
        self.address = address
        self.port = port
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot listen on {self.address}:{self.port}: {self.reason}: choose another address with --bind"


class VolumeExistsError(ConflictError):
    def __init__(self, volume: str) -> None:
        super().__init__(volume)
        self.volume = volume

    def __str__(self) -> str:
        return f"there is a volume {self.volume} already: choose another name"


class VolumeBusyError(ConflictError):
    def __init__(self, volume: str, pid: int | None, wanted: str) -> None:
        super().__init__(volume, pid, wanted)
        self.volume = volume
        self.pid = pid
        self.wanted = wanted

    def __str__(self) -> str:
        by = f" by process {self.pid}" if self.pid else ""
        return f"volume {self.volume} is in use{by}: stop it with `share-manager stop {self.volume}` {self.wanted}"


class ReplicaStateError(ConflictError):
    """What was asked for does not go with the state that the replica is in."""

    def __init__(self, volume: str, name: str, problem: str) -> None:
        super().__init__(volume, name, problem)
        self.volume = volume
        self.name = name
        self.problem = problem

    def __str__(self) -> str:
        return f"replica {self.name} of volume {self.volume} {self.problem}"


class VolumeNotServedError(ConflictError):
    def __init__(self, volume: str) -> None:
        super().__init__(volume)
        self.volume = volume

    def __str__(self) -> str:
        return f"volume {self.volume} is not served at present: `share-manager serve {self.volume}` first"


class ServedElsewhereError(ConflictError):
    def __init__(self, volume: str, node: str) -> None:
        super().__init__(volume, node)
        self.volume = volume
        self.node = node

    def __str__(self) -> str:
        return (
            f"volume {self.volume} is served on node {self.node}: move it with `share-manager move {self.volume}`, or "
            "stand by with --standby"
        )


class MoveFailedError(RuntimeProblem):
    def __init__(self, volume: str, node: str, reason: str) -> None:
        super().__init__(volume, node, reason)
        self.volume = volume
        self.node = node
        self.reason = reason

    def __str__(self) -> str:
        return f"volume {self.volume} did not move to node {self.node}: {self.reason}"


class NotReadyError(ConflictError):
    """A running share cannot do it at this moment."""

    def __init__(self, volume: str, state: str) -> None:
        super().__init__(volume, state)
        self.volume = volume
        self.state = state

    def __str__(self) -> str:
        return f"volume {self.volume} is {self.state} at present: ask again later"


class CannotUpgradeError(ConflictError):
    def __init__(self, volume: str, frontend: str) -> None:
        super().__init__(volume, frontend)
        self.volume = volume
        self.frontend = frontend

    def __str__(self) -> str:
        what = (
            "the pyfuse3 frontend cannot hand an open file over"
            if self.frontend == "pyfuse3"
            else "this kernel cannot hand an open file over (Linux 6.9 or later can)"
        )
        return (
            f"the engine of volume {self.volume} cannot be replaced in place: {what}. For a share, --reattach replaces "
            "engine, mount and server at once, and clients wait some seconds; a volume that is attached has to be "
            "stopped and attached again"
        )


class SizeMismatchError(ConflictError):
    def __init__(self, volume: str, recorded: str, wanted: str) -> None:
        super().__init__(volume, recorded, wanted)
        self.volume = volume
        self.recorded = recorded
        self.wanted = wanted

    def __str__(self) -> str:
        return (
            f"volume {self.volume} has {self.recorded}, not {self.wanted}: leave --size out, or grow it with "
            f"`share-manager volume resize {self.volume} SIZE`"
        )


class VolumeMismatchError(ConflictError):
    """It exists and is not what was asked for."""

    def __init__(self, volume: str, reason: str) -> None:
        super().__init__(volume, reason)
        self.volume = volume
        self.reason = reason

    def __str__(self) -> str:
        return f"volume {self.volume} {self.reason}"


class FilesystemKindError(ConflictError):
    """The volume has the other filesystem."""

    def __init__(self, found: str, wanted: str) -> None:
        super().__init__(found, wanted)
        self.found = found
        self.wanted = wanted

    def __str__(self) -> str:
        return f"the volume has {self.found}, not {self.wanted}: leave --fs out or write --fs {self.found}"


class WrongPassphraseError(ConflictError):
    def __str__(self) -> str:
        return "the passphrase does not open the volume: is it this volume's, and the present one? Nothing was changed"


class KeyMissingError(ConflictError):
    def __init__(self, volume: str) -> None:
        super().__init__(volume)
        self.volume = volume

    def __str__(self) -> str:
        return f"volume {self.volume} is encrypted: give its passphrase with --passphrase-file FILE, or - for stdin"


class NotEncryptedError(ConflictError):
    """Encryption was asked of a volume that is in use without."""

    def __init__(self, volume: str) -> None:
        super().__init__(volume)
        self.volume = volume

    def __str__(self) -> str:
        return (
            f"volume {self.volume} is not encrypted, and nothing was changed: leave --passphrase-file and --encrypt "
            "out, or copy its files into a new volume that is made with --encrypt"
        )


class HeaderLostError(ConflictError):
    """Without it nobody can read the volume any more."""

    def __init__(self, volume: str) -> None:
        super().__init__(volume)
        self.volume = volume

    def __str__(self) -> str:
        return (
            f"volume {self.volume} is encrypted and its LUKS header is damaged: put a backup back with `share-manager "
            f"volume luks-header restore {self.volume} FILE`, or go back to a snapshot. Nothing was changed"
        )


class EncryptedSnapshotError(ConflictError):
    def __str__(self) -> str:
        return (
            "the snapshot is of an encrypted volume, whose files it does not show: make a clone of it with "
            "`share-manager volume clone` and serve that with the passphrase"
        )


class DiscardsOffError(ConflictError):
    def __init__(self, volume: str) -> None:
        super().__init__(volume)
        self.volume = volume

    def __str__(self) -> str:
        return (
            f"volume {self.volume} is encrypted and served without --allow-discards, which would show on the replicas "
            "what is in use: serve it with that to give space back"
        )


class ForeignContentError(ConflictError):
    """The device holds something that nobody here wrote."""

    def __init__(self, device: str, found: str, remedy: str) -> None:
        super().__init__(device, found, remedy)
        self.device = device
        self.found = found
        self.remedy = remedy

    def __str__(self) -> str:
        return f"the volume holds {self.found}, so it is not formatted: {self.remedy}"


class VolumeNotFoundError(RuntimeProblem):
    exit_status = 5

    def __init__(self, volume: str, data_dir: Path) -> None:
        super().__init__(volume, data_dir)
        self.volume = volume
        self.data_dir = data_dir

    def __str__(self) -> str:
        return f"there is no volume {self.volume} in {self.data_dir}: `share-manager volume list` shows what there is"


class PathNotFoundError(RuntimeProblem):
    """Something that was named within a snapshot, or where it should go."""

    exit_status = 5

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class StorageError(RuntimeProblem):
    exit_status = 6


class DiskError(StorageError):
    """The disk below the data directory refuses."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(path, error)
        self.path = path
        self.error = error

    def __str__(self) -> str:
        remedies = {
            errno.ENOSPC: "free some space or choose another --data-dir",
            errno.EDQUOT: "raise the quota or choose another --data-dir",
            errno.EROFS: "choose a --data-dir that can be written to",
            errno.EFBIG: "the filesystem there takes no file that large: choose a smaller --size or another --data-dir",
            errno.EXDEV: "only a rename is safe: move it onto the filesystem of the --data-dir first",
            errno.EACCES: "check the permissions or choose another --data-dir",
        }
        remedy = remedies.get(self.error.errno or 0)
        return f"{self.path}: {self.error.strerror or self.error}" + (f": {remedy}" if remedy else "")


class NoReplicaAvailableError(StorageError):
    """The engine reached none of the replicas that hold every acknowledged write."""

    def __init__(self, volume: str, reason: str) -> None:
        super().__init__(volume, reason)
        self.volume = volume
        self.reason = reason

    def __str__(self) -> str:
        return self.reason or f"volume {self.volume}: no in-sync replica answers"


class SalvageRefusedError(StorageError):
    def __init__(self, volume: str, reason: str) -> None:
        super().__init__(volume, reason)
        self.volume = volume
        self.reason = reason

    def __str__(self) -> str:
        return f"volume {self.volume} is left as it is: {self.reason}"


class AdoptionError(ConflictError):
    def __init__(self, volume: str, reason: str) -> None:
        super().__init__(volume, reason)
        self.volume = volume
        self.reason = reason

    def __str__(self) -> str:
        return f"volume {self.volume} is not adopted: {self.reason}"


class FencedOffError(ConflictError):
    """Another attachment has taken the volume."""

    def __init__(self, volume: str, reason: str) -> None:
        super().__init__(volume, reason)
        self.volume = volume
        self.reason = reason

    def __str__(self) -> str:
        detail = f" ({self.reason})" if self.reason else ""
        return f"volume {self.volume} has been attached elsewhere with a higher epoch{detail}: this share has ended"


# by the class of the engine's error
_OPERATION_STATUS = {
    "BusyError": 4,
    "InUseError": 4,
    "LastReplicaError": 4,
    "NoSuchSnapshotError": 5,
    "NotEqualError": 4,
    "ReplicaNameError": 2,
    "ResizeError": 6,
    "SnapshotReadError": 4,
    "SnapshotTakenError": 4,
    "TooManySnapshotsError": 4,
}


def exit_status_of(error: BaseException) -> int:
    """Exit status for any error that may reach the end of the program."""
    if isinstance(error, ShareManagerError):
        return error.exit_status
    if isinstance(error, EngineOperationError):
        return _OPERATION_STATUS.get(error.kind, 1)
    if isinstance(error, (RecordMissingError, SnapshotNotFoundError)):
        return 5
    if isinstance(error, (FencedError, RecordConflictError)):
        return 4
    if isinstance(error, (NoReplicaError, StoreError)):
        return 6
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return 6
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return 4
    if isinstance(error, PermissionError):
        return 3
    return 1


def leaves(error: BaseException) -> list[BaseException]:
    """The errors in an exception group, in order, nested groups opened."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in leaves(inner)]
    return [error]


def is_ours(error: BaseException) -> bool:
    """Whether it is an error that a user can read, rather than a defect."""
    return isinstance(error, (ShareManagerError, EngineError, OSError)) or (
        # by name: this module must load without nfs-ganesha's package, and doctor reports on that
        any(base.__name__ == "GaneshaError" for base in type(error).__mro__)
    )
