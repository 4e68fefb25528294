"""Whether this machine can serve volumes: each check with its remedy."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from engine.controller import core
from ganesha.wake import hindrance
from share_manager.errors import PACKAGES, AddressError, MissingProgramError, PortInUseError
from share_manager.share.commands import environment, find_program
from share_manager.share.procfs import CAP_DAC_READ_SEARCH, CAP_SYS_ADMIN, CAP_SYS_RESOURCE, holds_capability
from share_manager.share.session import check_port

LEAST_FREE = 1 << 30
_PROGRAM_PACKAGES = {
    "ganesha.nfsd": "needed to export volumes",
    "dbus-daemon": "needed to talk to ganesha",
    "losetup": "needed to attach volumes",
    "mount": "needed to mount volumes",
    "umount": "needed to unmount volumes",
    "blkid": "needed to look at devices before they are formatted",
    "mkfs.ext4": "needed to format volumes",
    "e2fsck": "needed to check volumes",
    "resize2fs": "needed to grow volumes",
}
_OPTIONAL_PROGRAMS = {
    "cryptsetup": "needed for encrypted volumes only",
    "dmsetup": "needed for encrypted volumes only",
    "mkfs.xfs": "needed for --fs xfs only",
    "xfs_growfs": "needed for --fs xfs only",
    "setpriv": "needed for shares of several nodes only",
    "mount.nfs": "needed on machines that mount shares",
    "fio": "needed for `share-manager bench` only",
}
_EXTRA_PACKAGES = {"fio": "fio"}


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """`result`: ok; warning (something optional is missing); failed (serving is not possible)."""

    name: str
    result: Literal["ok", "warning", "failed"]
    detail: str
    remedy: str = ""


def passed(name: str, detail: str) -> Check:
    return Check(name=name, result="ok", detail=detail)


def failed(name: str, detail: str, remedy: str) -> Check:
    return Check(name=name, result="failed", detail=detail, remedy=remedy)


def warning(name: str, detail: str, remedy: str) -> Check:
    return Check(name=name, result="warning", detail=detail, remedy=remedy)


def check_root() -> Check:
    if os.geteuid() == 0:
        return passed("root", "running as root")
    return failed("root", f"running as user {os.geteuid()}", "run it with sudo")


def check_capabilities() -> list[Check]:
    wanted = (
        (CAP_SYS_ADMIN, "CAP_SYS_ADMIN", "mounts and loop devices", failed),
        (CAP_DAC_READ_SEARCH, "CAP_DAC_READ_SEARCH", "ganesha opens files by their handles", failed),
        (
            CAP_SYS_RESOURCE,
            "CAP_SYS_RESOURCE",
            "growing without a full check, and the engine under memory pressure",
            warning,
        ),
    )
    return [
        passed(name, why)
        if holds_capability(number)
        else make(name, f"missing: {why}", "run as root, in a container with `privileged: true`")
        for number, name, why, make in wanted
    ]


def check_device(path: str, what: str, module: str) -> Check:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except PermissionError:
        return failed(what, f"{path} may not be opened", "run it with sudo; in a container give it the host's /dev")
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
            return failed(what, f"{path} is missing", f"load the module: modprobe {module}")
        return failed(what, f"{path}: {error.strerror}", f"load the module: modprobe {module}")
    return passed(what, f"{path} opens")


def kernel_filesystems(text: str) -> set[str]:
    return {line.split()[-1] for line in text.splitlines() if line.strip()}


def has_module(name: str) -> bool:
    """Whether mount(2) would load it."""
    try:
        program = find_program("modinfo")
    except MissingProgramError:
        return False
    return subprocess.run([program, name], capture_output=True, env=environment(), check=False).returncode == 0


def check_filesystem(name: str, known: set[str], why: str, make: Callable[[str, str, str], Check]) -> Check:
    if name in known:
        return passed(f"kernel: {name}", why)
    if has_module(name):
        return passed(f"kernel: {name}", f"{why} (module, loaded at first use)")
    return make(f"kernel: {name}", f"this kernel has no {name}: {why}", f"use a kernel with it, or modprobe {name}")


def check_dm_crypt() -> Check:
    name, why = "kernel: dm-crypt", "needed for encrypted volumes only"
    # it has no place of its own in /proc or /sys before it is used
    with contextlib.suppress(MissingProgramError):
        argv = [find_program("dmsetup"), "target-version", "crypt"]
        done = subprocess.run(argv, capture_output=True, text=True, env=environment(), check=False)
        if done.returncode == 0 and done.stdout.startswith("crypt"):
            return passed(name, why)
    if has_module("dm-crypt"):
        return passed(name, f"{why} (module, loaded at first use)")
    return warning(name, f"this kernel has none: {why}", "use a kernel with it, or modprobe dm-crypt")


def check_program(name: str, why: str, make: Callable[[str, str, str], Check]) -> Check:
    try:
        return passed(f"program: {name}", find_program(name))
    except MissingProgramError:
        package = PACKAGES.get(name) or _EXTRA_PACKAGES[name]
        return make(f"program: {name}", f"not installed: {why}", f"apt-get install {package}")


def check_compiled() -> Check:
    if core.__file__.endswith(".py"):
        return warning("engine", "not compiled: it takes twice the time", "install the package anew with a C compiler")
    return passed("engine", "compiled")


def check_grace() -> Check:
    """A grace period ends with the last client that comes back, where ganesha can be told to look."""
    name = "grace period"
    try:
        why = hindrance(find_program("ganesha.nfsd"))
    except MissingProgramError:
        why = "there is no ganesha"
    if why:
        return warning(
            name, f"may last seconds longer than it must: {why}", "use Debian's nfs-ganesha, and this package's wheel"
        )
    return passed(name, "ends with the last client that comes back")


def check_mtab() -> Check:
    """ganesha finds filesystems in /etc/mtab; without it handles carry no UUID."""
    if os.path.exists("/etc/mtab"):
        return passed("mtab", "/etc/mtab lists mounts")
    return failed("mtab", "/etc/mtab is missing", "ln -s /proc/self/mounts /etc/mtab")


def check_nfs_port(address: str, port: int) -> Check:
    name = f"port {port}"
    try:
        check_port(address, port)
    except PortInUseError:
        # a running share holds its own port, and that is as it should be
        return warning(name, f"in use on {address}", "serve with another --port or --bind, or stop its user")
    except AddressError as error:
        return failed(
            name, f"{address} cannot be used: {error.reason}", "choose an address of this machine with --bind"
        )
    return passed(name, f"free on {address}")


def nearest_directory(path: Path) -> Path:
    """`path`, or the parent of it that exists already."""
    while not path.is_dir():
        path = path.parent
    return path


def check_direct_io(data_dir: Path) -> Check:
    """Replicas write with O_DIRECT (open(2)), which tmpfs and some network filesystems do not have."""
    directory = nearest_directory(data_dir.absolute())
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".share-manager-doctor-") as file:
            os.close(os.open(file.name, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EINVAL:
            return failed("direct I/O", f"the filesystem of {directory} has none", "choose a --data-dir on ext4 or xfs")
        return failed("direct I/O", f"{directory}: {error.strerror}", "choose a --data-dir that can be written to")
    return passed("direct I/O", f"works in {directory}")


def check_space(data_dir: Path) -> Check:
    directory = nearest_directory(data_dir.absolute())
    found = os.statvfs(directory)
    free = found.f_bavail * found.f_frsize
    detail = f"{free / (1 << 30):.1f} GiB free in {directory}"
    if free < 64 << 20:
        return failed("space", detail, "free some space or choose another --data-dir")
    if free < LEAST_FREE:
        return warning(
            "space", detail, "free some space or choose another --data-dir: volumes grow as they are written"
        )
    return passed("space", detail)


def check_kernel_version(release: str) -> Check:
    numbers = tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdigit())
    if numbers < (5, 10):
        return failed("kernel", release, "use Linux 5.10 or later")
    return passed("kernel", release)


def examine(data_dir: Path, address: str, port: int) -> list[Check]:
    """Every check, in the order in which one would mend them."""
    known = kernel_filesystems(Path("/proc/filesystems").read_text())
    return [
        check_root(),
        *check_capabilities(),
        check_kernel_version(os.uname().release),
        check_device("/dev/fuse", "kernel: fuse", "fuse"),
        check_device("/dev/loop-control", "kernel: loop", "loop"),
        check_filesystem("ext4", known, "the default filesystem of volumes", failed),
        check_filesystem("xfs", known, "needed for --fs xfs only", warning),
        check_dm_crypt(),
        check_filesystem("nfs4", known, "needed only to mount shares on this machine", warning),
        *(check_program(name, why, failed) for name, why in _PROGRAM_PACKAGES.items()),
        *(check_program(name, why, warning) for name, why in _OPTIONAL_PROGRAMS.items()),
        check_compiled(),
        check_grace(),
        check_mtab(),
        check_nfs_port(address, port),
        check_direct_io(data_dir),
        check_space(data_dir),
    ]
