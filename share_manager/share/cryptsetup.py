"""cryptsetup and dmsetup, their secrets through pipes: nothing of them is in arguments, the environment or a file.

`secret` is what opens a header: a passphrase, or its volume key, which needs no key derivation.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from share_manager.encryption import HEADER_SIZE, LuksParameters, Passphrase
from share_manager.errors import (
    CommandError,
    KernelFeatureError,
    KeyslotMemoryError,
    WrongPassphraseError,
)
from share_manager.share.commands import run

SECTOR = 4096
# a key derivation on a slow machine, for each of 32 key slots
KEY_TIMEOUT = 600.0
_MAGIC = b"LUKS\xba\xbe\x00\x02"
_UUID = slice(168, 208)
_AREA = 1 << 20
_WRONG_KEY, _NO_MEMORY = 2, 3  # cryptsetup(8), RETURN CODES
_DUMPED_KEY = re.compile(r"MK dump:((?:\s+[0-9a-f]{2})+)\s*$")
_QUICK = 10.0


class VolumeKey:
    """What the data is encrypted with; like `Passphrase` it never shows."""

    __slots__ = ("_value",)

    def __init__(self, value: bytes) -> None:
        self._value = value

    def reveal(self) -> bytes:
        return self._value

    def __repr__(self) -> str:
        return "VolumeKey(...)"


class Kdf(msgspec.Struct, frozen=True, kw_only=True):
    """How a key slot derives its key (LUKS2 on-disk format, section 3.2.3). `memory` in KiB."""

    type: str
    time: int = 0
    iterations: int = 0
    memory: int = 0
    cpus: int = 0


class Keyslot(msgspec.Struct, frozen=True, kw_only=True):
    kdf: Kdf


class _Metadata(msgspec.Struct, frozen=True, kw_only=True):
    keyslots: dict[str, Keyslot] = {}


@contextlib.contextmanager
def piped(*secrets: Passphrase | VolumeKey) -> Iterator[list[int]]:
    """A descriptor for each, from which it can be read once."""
    fds: list[int] = []
    try:
        for secret in secrets:
            read, write = os.pipe()
            fds.append(read)
            try:
                # below the capacity of a pipe, so it does not block
                os.write(write, secret.reveal())
            finally:
                os.close(write)
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def path_of(fd: int) -> str:
    """Not /dev/fd, which only udev makes."""
    return f"/proc/self/fd/{fd}"


def mapping_path(name: str) -> str:
    return f"/dev/mapper/{name}"


@contextlib.contextmanager
def _explained(device: str) -> Iterator[None]:
    """Raises WrongPassphraseError, KeyslotMemoryError in place of what cryptsetup says of them."""
    try:
        yield
    except CommandError as error:
        if error.status == _WRONG_KEY:
            raise WrongPassphraseError from None
        if error.status == _NO_MEMORY or error.status == -9 or "memory" in error.output:
            raise KeyslotMemoryError from None
        raise


async def require_dm_crypt() -> None:
    """Raises KernelFeatureError, MissingProgramError."""
    # asked for a target's version, the kernel loads its module by itself, also when we are in a container
    status, output = await run("dmsetup", "target-version", "crypt", ok=range(256), timeout=_QUICK)
    if status or not output.startswith("crypt"):
        raise KernelFeatureError(
            "this kernel has no dm-crypt",
            "encrypted volumes need it; load it with `modprobe dm-crypt`, or use a kernel that has it",
        )


def begins_with_header(device: str) -> bool:
    """Whether the first copy of a LUKS2 header is there: magic and version (LUKS2 on-disk format, section 2.1).

    Nothing of a plain volume's clients ever comes to that place. Raises OSError.
    """
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(fd, len(_MAGIC), 0) == _MAGIC
    finally:
        os.close(fd)


def uuid_in_header(device: str) -> str:
    """As the first copy of its header says, empty when there is none (LUKS2 on-disk format, section 2.1). Raises
    OSError."""
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        header = os.pread(fd, _UUID.stop, 0)
    finally:
        os.close(fd)
    return header[_UUID].rstrip(b"\0").decode("ascii", "replace") if header.startswith(_MAGIC) else ""


def read_area(device: str) -> bytes:
    """Of its header what cryptsetup needs to open it: the metadata, twice, and the first key slots. Raises OSError."""
    with open(device, "rb", buffering=0) as file:
        return file.read(_AREA)


def write_area(file: Path, area: bytes) -> None:
    """A file that cryptsetup takes for a detached header. Raises OSError."""
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, area)
        os.truncate(fd, HEADER_SIZE)
    finally:
        os.close(fd)


async def is_luks(device: str) -> bool:
    """Whether it has a LUKS2 header, of which one copy may be damaged. Not for a device that may be plain: the second
    copy is looked for where a client's data could be. Raises CommandError."""
    # 1: no LUKS device (cryptsetup-isLuks(8))
    status, _ = await run("cryptsetup", "isLuks", "--type", "luks2", device, ok=(0, 1), timeout=60)
    return status == 0


async def luks_uuid(device: str) -> str:
    """Raises CommandError."""
    return (await run("cryptsetup", "luksUUID", device, timeout=60))[1].strip()


async def make_header(device: str, uuid: str, passphrase: Passphrase, wanted: LuksParameters) -> None:
    """Writes 16 MiB at the device's begin, whatever is there. Raises CommandError, KeyslotMemoryError."""
    argv = ["cryptsetup", "luksFormat", "--batch-mode", "--type", "luks2", "--uuid", uuid]
    argv += ["--sector-size", str(SECTOR), "--cipher", wanted.cipher, "--hash", wanted.digest]
    argv += ["--key-size", str(wanted.key_size), "--iter-time", str(wanted.pbkdf_time), "--pbkdf", wanted.pbkdf]
    if wanted.pbkdf != "pbkdf2":
        argv += ["--pbkdf-memory", str(wanted.pbkdf_memory >> 10)]
    with _explained(device), piped(passphrase) as (fd,):
        await run(*argv, f"--key-file={path_of(fd)}", device, pass_fds=[fd], timeout=KEY_TIMEOUT)


async def volume_key(device: str, passphrase: Passphrase) -> VolumeKey:
    """Raises WrongPassphraseError, KeyslotMemoryError, CommandError."""
    with _explained(device), piped(passphrase) as (fd,):
        argv = ("luksDump", "--batch-mode", "--dump-volume-key", f"--key-file={path_of(fd)}", device)
        _, output = await run("cryptsetup", *argv, pass_fds=[fd], timeout=KEY_TIMEOUT)
    found = _DUMPED_KEY.search(output)
    if found is None:
        raise CommandError(("cryptsetup", *argv), 0, "no volume key in what it says")
    return VolumeKey(bytes.fromhex("".join(found[1].split())))


async def opens(device: str, passphrase: Passphrase) -> bool:
    """Whether a key slot opens with it. Raises KeyslotMemoryError, CommandError."""
    try:
        with _explained(device), piped(passphrase) as (fd,):
            argv = ("open", "--test-passphrase", "--batch-mode", f"--key-file={path_of(fd)}", device)
            await run("cryptsetup", *argv, pass_fds=[fd], timeout=KEY_TIMEOUT)
    except WrongPassphraseError:
        return False
    return True


async def open_mapping(device: str, name: str, key: VolumeKey, *, discards: bool) -> None:
    """Raises CommandError, KernelFeatureError."""
    options = ["--allow-discards"] if discards else []
    with piped(key) as (fd,):
        argv = ("open", "--type", "luks2", *options, f"--volume-key-file={path_of(fd)}", device, name)
        await run("cryptsetup", *argv, pass_fds=[fd], timeout=KEY_TIMEOUT)


async def resize_mapping(name: str, passphrase: Passphrase) -> None:
    """To the size of its device. Needs a passphrase, since the kernel's keyring gives no key back.

    Raises WrongPassphraseError, KeyslotMemoryError, CommandError.
    """
    with _explained(name), piped(passphrase) as (fd,):
        argv = ("resize", "--batch-mode", f"--key-file={path_of(fd)}", name)
        await run("cryptsetup", *argv, pass_fds=[fd], timeout=KEY_TIMEOUT)


async def remove_mapping(name: str, timeout: float = _QUICK) -> None:
    """Not by `cryptsetup close`, which reads the header first and so hangs with a dead engine. The key goes with the
    mapping. Raises CommandError (it is in use), TimeoutProblem (it hangs)."""
    await run("dmsetup", "remove", name, timeout=timeout)


async def cut_off_mapping(name: str) -> None:
    """Whoever still uses it gets errors from here on; its device is free, and it goes with its last user.

    Raises CommandError, TimeoutProblem.
    """
    # fails to remove it, which is why we are here, after the device was exchanged for one that only fails
    await run("dmsetup", "remove", "--force", name, ok=(0, 1), timeout=_QUICK)
    if mapping_exists(name):
        await run("dmsetup", "remove", "--deferred", name, timeout=_QUICK)


def mapping_exists(name: str) -> bool:
    return name in mappings()


def mappings() -> dict[str, str]:
    """All of the machine: name to kernel name (dm-0)."""
    found = {}
    for entry in Path("/sys/block").glob("dm-*"):
        with contextlib.suppress(OSError):
            found[(entry / "dm/name").read_text().rstrip("\n")] = entry.name
    return found


def is_cut_off(kernel_name: str) -> bool:
    """Whether there is no device below it any more."""
    try:
        return not os.listdir(f"/sys/block/{kernel_name}/slaves")
    except OSError:
        return True


async def keyslots(device: str) -> dict[str, Keyslot]:
    """Raises CommandError."""
    _, output = await run("cryptsetup", "luksDump", "--dump-json-metadata", device, timeout=60)
    return msgspec.json.decode(output, type=_Metadata).keyslots


async def add_key(device: str, old: Passphrase, new: Passphrase, like: Kdf) -> None:
    """A key slot for `new` that costs what `like` does.

    Raises WrongPassphraseError, KeyslotMemoryError, CommandError.
    """
    argv = ["cryptsetup", "luksAddKey", "--batch-mode", "--pbkdf", like.type]
    if like.type == "pbkdf2":
        argv += ["--pbkdf-force-iterations", str(like.iterations)]
    else:
        argv += ["--pbkdf-force-iterations", str(like.time), "--pbkdf-memory", str(like.memory)]
        argv += ["--pbkdf-parallel", str(like.cpus)]
    with _explained(device), piped(old, new) as (fd, second):
        argv += [f"--key-file={path_of(fd)}", device, path_of(second)]
        await run(*argv, pass_fds=[fd, second], timeout=KEY_TIMEOUT)


async def remove_key(device: str, old: Passphrase) -> None:
    """One key slot that it opens. Raises WrongPassphraseError, KeyslotMemoryError, CommandError."""
    with _explained(device), piped(old) as (fd,):
        argv = ("luksRemoveKey", "--batch-mode", f"--key-file={path_of(fd)}", device)
        await run("cryptsetup", *argv, pass_fds=[fd], timeout=KEY_TIMEOUT)


async def backup_header(device: str, file: Path) -> None:
    """Raises CommandError."""
    await run("cryptsetup", "luksHeaderBackup", device, f"--header-backup-file={file}", timeout=300)


async def restore_header(device: str, file: Path) -> None:
    """Whatever the device's begin holds. Raises CommandError."""
    await run("cryptsetup", "luksHeaderRestore", "--batch-mode", device, f"--header-backup-file={file}", timeout=300)
