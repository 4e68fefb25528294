"""LUKS2 between the loop device and the filesystem. The device's own header decides what is done, never a guess.

Once unlocked the volume key stays in this process's memory, so that a repair unlocks again without the seconds that a
key derivation takes, and without the passphrase being right still. The passphrase stays for growing.
"""

from __future__ import annotations

import contextlib
import enum
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import trio

from engine.durable import replace_file, sync_directory
from share_manager.encryption import Encryption, Passphrase, reload
from share_manager.errors import (
    CommandError,
    DiscardsOffError,
    HeaderBackupError,
    HeaderLostError,
    KeyMissingError,
    NotEncryptedError,
    UsageError,
    WrongPassphraseError,
)
from share_manager.events import Reporter
from share_manager.paths import VolumePaths
from share_manager.share import cryptsetup
from share_manager.share.cryptsetup import Kdf, Keyslot, VolumeKey
from share_manager.share.formatting import NOISE, device_size, first_nonzero, probe, sync_device
from share_manager.share.mapping import close_mapping, mapping_name
from share_manager.share.onvolume import on_volume


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """`encryption.json` beside the record: the volume has, or is about to get, a LUKS header with this UUID.

    Until it is `finished` what is on the device is the rest of our own formatting, and nobody's data.
    """

    uuid: str
    finished: bool


def read_header(paths: VolumePaths) -> Header | None:
    """None for a volume that is not encrypted, as far as is known without looking at its device."""
    try:
        return msgspec.json.decode(paths.encryption.read_bytes(), type=Header)
    except FileNotFoundError:
        return None
    except (msgspec.DecodeError, msgspec.ValidationError):
        # whatever it said, the volume was encrypted
        return Header(uuid="", finished=True)


def write_header(paths: VolumePaths, header: Header) -> None:
    replace_file(paths.encryption, msgspec.json.encode(header), mode=0o600)


class Verdict(enum.Enum):
    PLAIN = "use it as it is"
    UNLOCK = "unlock it"
    FORMAT = "make a header, then unlock it"


def decide(volume: str, asked: Encryption, known: Header | None, *, luks: bool, empty: bool) -> Verdict:
    """What to do with a device that has a LUKS header or not, and is `empty` of anything that somebody may miss.

    Raises KeyMissingError, NotEncryptedError, HeaderLostError.
    """
    unfinished = known is not None and not known.finished
    if luks or unfinished:
        if asked.passphrase is None:
            raise KeyMissingError(volume)
        return Verdict.FORMAT if unfinished else Verdict.UNLOCK
    if known is not None:
        raise HeaderLostError(volume)
    if asked.wanted:
        if not empty:
            raise NotEncryptedError(volume)
        return Verdict.FORMAT
    if asked.passphrase is not None:
        raise NotEncryptedError(volume)
    return Verdict.PLAIN


async def has_header(device: str, known: Header | None) -> bool:
    """Of one that is known to be encrypted the second copy is as good. Raises CommandError, OSError."""
    if await on_volume(cryptsetup.begins_with_header, device):
        return True
    return known is not None and await cryptsetup.is_luks(device)


def refuse_without_key(paths: VolumePaths, asked: Encryption) -> None:
    """What can be known before the volume is attached. Raises KeyMissingError."""
    if asked.passphrase is None and read_header(paths) is not None:
        raise KeyMissingError(paths.volume)


class Keys:
    """What unlocks a volume, in memory for as long as it is served, or stood by for. `volume_key` is of the header with
    that `uuid`."""

    def __init__(self, asked: Encryption) -> None:
        self.passphrase = asked.passphrase
        self.volume_key: VolumeKey | None = None
        self.uuid = ""
        self._source = asked.source
        self._sure = True

    def look_again(self) -> None:
        """Another node may have served the volume meanwhile, or encrypted it anew."""
        self._sure = False

    async def fit(self, device: str) -> bool:
        """Whether the volume key is known that its header is about. Raises OSError."""
        known = self.volume_key is not None
        if known and not self._sure and await on_volume(cryptsetup.uuid_in_header, device) != self.uuid:
            self.volume_key = None
        self._sure = True
        return self.volume_key is not None

    async def derive(self, device: str) -> None:
        """Raises WrongPassphraseError, KeyslotMemoryError, CommandError."""
        assert self.passphrase is not None
        try:
            self.volume_key = await cryptsetup.volume_key(device, self.passphrase)
        except WrongPassphraseError:
            other = reload(self._source, self.passphrase)
            if other is None:
                raise
            self.volume_key = await cryptsetup.volume_key(device, other)
            self.passphrase = other
        self.uuid = await cryptsetup.luks_uuid(device)


class Unlocked:
    """Where the filesystem is: `device`. `below` is the loop device; `mapping` is empty for a plain volume."""

    def __init__(self, volume: str, below: str, keys: Keys, mapping: str = "", *, discards: bool = True) -> None:
        self.below = below
        self.mapping = mapping
        self._volume = volume
        self._keys = keys
        self._discards = discards

    @property
    def encrypted(self) -> bool:
        return bool(self.mapping)

    @property
    def device(self) -> str:
        return cryptsetup.mapping_path(self.mapping) if self.mapping else self.below

    def require_discards(self) -> None:
        """Raises DiscardsOffError."""
        if not self._discards:
            raise DiscardsOffError(self._volume)

    async def grow(self) -> None:
        """After the loop device, before the filesystem; again does no harm. Raises ShareManagerError."""
        if self.mapping:
            assert self._keys.passphrase is not None
            await cryptsetup.resize_mapping(self.mapping, self._keys.passphrase)

    async def change_passphrase(self, old: Passphrase, new: Passphrase) -> int:
        """See `change_passphrase`. Raises NotEncryptedError too."""
        if not self.mapping:
            raise NotEncryptedError(self._volume)
        removed = await change_passphrase(self.below, old, new)
        if self._keys.passphrase == old:
            self._keys.passphrase = new
        return removed


@contextlib.asynccontextmanager
async def unlocked(
    device: str,
    paths: VolumePaths,
    epoch: int,
    asked: Encryption,
    keys: Keys,
    report: Reporter,
    give_up: Callable[[str], None],
) -> AsyncIterator[Unlocked]:
    """Encrypt if that is asked for and the device is blank; unlock. A plain volume is passed through.

    `give_up` is called when leaving hangs: it must fail every request that hangs. Raises ShareManagerError, OSError.
    """
    if not await keys.fit(device):
        await _prepare(device, paths, asked, keys, report)
    if keys.volume_key is None:
        yield Unlocked(paths.volume, device, keys)
        return
    name = mapping_name(paths, epoch)
    try:
        await cryptsetup.open_mapping(device, name, keys.volume_key, discards=asked.discards)
        report.emit("unlocked", f"unlocked as {name}", mapping=name)
        yield Unlocked(paths.volume, device, keys, name, discards=asked.discards)
    finally:
        with trio.CancelScope(shield=True):
            busy = await close_mapping(name, give_up)
            if busy is not None:
                report.warn("mapping_busy", f"{name} is in use and goes with its last user: {busy}", mapping=name)


async def _prepare(device: str, paths: VolumePaths, asked: Encryption, keys: Keys, report: Reporter) -> None:
    """Leaves the volume key in `keys`, none for a plain volume."""
    known = read_header(paths)
    luks = await has_header(device, known)
    empty = False
    if asked.wanted and not luks and known is None:
        empty = await _is_empty(device, paths.formatting)
    verdict = decide(paths.volume, asked, known, luks=luks, empty=empty)
    if verdict is Verdict.PLAIN:
        return
    assert keys.passphrase is not None
    await cryptsetup.require_dm_crypt()
    if verdict is Verdict.FORMAT:
        await _format(device, paths, asked, keys.passphrase)
        report.emit("encrypted", f"encrypted with LUKS2, {asked.parameters.cipher}", cipher=asked.parameters.cipher)
    await keys.derive(device)
    if read_header(paths) is None:
        write_header(paths, Header(uuid=keys.uuid, finished=True))


async def _is_empty(device: str, formatting: Path) -> bool:
    """Blank, or with the rest of a mkfs of ours that was cut off."""
    if formatting.exists():
        return True
    if await probe(device):
        return False
    return await on_volume(first_nonzero, device, device_size(device)) is None


async def _format(device: str, paths: VolumePaths, asked: Encryption, passphrase: Passphrase) -> None:
    header = Header(uuid=str(uuid.uuid4()), finished=False)
    fresh = read_header(paths) is None
    write_header(paths, header)
    try:
        await cryptsetup.make_header(device, header.uuid, passphrase, asked.parameters)
    except CommandError:
        if fresh and not paths.formatting.exists() and await _is_empty(device, paths.formatting):
            paths.encryption.unlink()
        raise
    await on_volume(sync_device, device)
    # whoever makes the filesystem has to know that what it finds is nobody's data
    replace_file(paths.formatting, NOISE)
    write_header(paths, msgspec.structs.replace(header, finished=True))


async def save_header(device: str, paths: VolumePaths, file: Path) -> str:
    """Copy the header to a new file that root alone can read; its UUID.

    Raises NotEncryptedError, HeaderLostError, HeaderBackupError.
    """
    known = read_header(paths)
    if not await has_header(device, known):
        raise NotEncryptedError(paths.volume) if known is None else HeaderLostError(paths.volume)
    if file.exists():
        raise HeaderBackupError(file, "it exists, and is kept: write to a new file")
    try:
        await cryptsetup.backup_header(device, file)
    except CommandError as error:
        raise HeaderBackupError(file, f"cannot be written: {error.output.strip()}") from error
    sync_directory(file.parent)
    return await cryptsetup.luks_uuid(device)


async def restore_header(device: str, paths: VolumePaths, file: Path) -> str:
    """Put a backup of this volume's header back; its UUID. Cut off, it can be repeated.

    Raises NotEncryptedError, HeaderBackupError, CommandError.
    """
    known = read_header(paths)
    luks = await has_header(device, known)
    if known is None and not luks:
        raise NotEncryptedError(paths.volume)
    if not file.is_file() or not await cryptsetup.is_luks(str(file)):
        raise HeaderBackupError(file, "it is no backup of a LUKS2 header")
    found = await cryptsetup.luks_uuid(str(file))
    own = await cryptsetup.luks_uuid(device) if luks else (known.uuid if known is not None else "")
    if own and found != own:
        raise HeaderBackupError(file, f"it belongs to another volume (UUID {found}, not {own})")
    await cryptsetup.restore_header(device, file)
    await on_volume(sync_device, device)
    write_header(paths, Header(uuid=found, finished=True))
    return found


def costliest(slots: dict[str, Keyslot]) -> Kdf:
    """A passphrase is worth what the key slot costs that it opens: a new one is to cost no less than another."""
    return max((slot.kdf for slot in slots.values()), key=lambda kdf: (kdf.memory * kdf.time, kdf.iterations))


async def change_passphrase(device: str, old: Passphrase, new: Passphrase) -> int:
    """Replace `old` by `new`; how many key slots `old` had opened. Other key slots stay, and so does the volume key.

    Cut off at any point at least one of them opens the volume, and the same call finishes what is left to do.
    Raises UsageError (they are the same), WrongPassphraseError, KeyslotMemoryError, CommandError.
    """
    if old == new:
        raise UsageError("the new passphrase is the present one")
    if not await cryptsetup.opens(device, new):
        await cryptsetup.add_key(device, old, new, costliest(await cryptsetup.keyslots(device)))
        # on the disks of the replicas before the old one goes
        await on_volume(sync_device, device)
    removed = 0
    with contextlib.suppress(WrongPassphraseError):
        while True:
            await cryptsetup.remove_key(device, old)
            removed += 1
    await on_volume(sync_device, device)
    return removed
