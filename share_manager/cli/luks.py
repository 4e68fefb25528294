"""`share-manager volume passphrase` and `volume luks-header`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import trio
from cyclopts import App, Parameter

from share_manager import units
from share_manager.cli.common import DEFAULT_DATA_DIR, DataDir, Steps, VolumeName, confirm, quiet_reporter, reporter
from share_manager.encryption import Passphrase, load
from share_manager.errors import NotEncryptedError, UsageError
from share_manager.maintenance import block_device
from share_manager.paths import VolumePaths
from share_manager.share.control import ask
from share_manager.share.luks import change_passphrase, has_header, read_header, restore_header, save_header
from share_manager.share.requests import BackupHeader, ChangePassphrase, HeaderSaved, PassphraseChanged
from share_manager.share.session import require_root
from share_manager.volumes import find_volume, lock_holder

header = App(name="luks-header", help="Back up and restore the LUKS header of an encrypted volume.")


def passphrase(
    volume: VolumeName,
    /,
    *,
    passphrase_file: Annotated[
        str,
        Parameter(
            allow_leading_hyphen=True,
            help="The present one: a file, the directory of a mounted Secret, or - for stdin.",
        ),
    ],
    new_passphrase_file: Annotated[str, Parameter(allow_leading_hyphen=True, help="The new one, in the same way.")],
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: Steps = "text",
) -> None:
    """Change the passphrase of an encrypted volume, also while it is served and clients write.

    Cut off, at least one of the two opens the volume: give the same command again. Snapshots, clones and header backups
    that were made before are opened by the old one.

    For example:

    share-manager volume passphrase vol1 --passphrase-file old --new-passphrase-file new
    """
    paths = find_volume(data_dir, units.parse_name(volume))
    require_root("volume passphrase")
    if passphrase_file == new_passphrase_file == "-":
        raise UsageError("only one of the two passphrases can come from stdin")
    (old, _), (new, _) = load(passphrase_file), load(new_passphrase_file)
    removed = trio.run(_change, paths, old, new)
    reporter(output).emit(
        "passphrase_changed",
        f"volume {volume} has another passphrase" + ("" if removed else ", and had it before"),
        volume=volume,
        key_slots_removed=removed,
    )


async def _change(paths: VolumePaths, old: Passphrase, new: Passphrase) -> int:
    if _in_use(paths):
        request = ChangePassphrase(old=old.reveal(), new=new.reveal())
        return (await ask(paths, request, PassphraseChanged)).removed
    async with block_device(paths, quiet_reporter(), "before its passphrase is changed") as device:
        if not await has_header(device, read_header(paths)):
            raise NotEncryptedError(paths.volume)
        return await change_passphrase(device, old, new)


@header.command
def backup(
    volume: VolumeName,
    file: Annotated[Path, Parameter(help="A new file.")],
    /,
    *,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: Steps = "text",
) -> None:
    """Copy the header to a file, also while the volume is served. Without its header nobody can read a volume.

    Keep it as you keep the passphrase: with a passphrase of that time it opens the volume, also after a change.

    For example:

    share-manager volume luks-header backup vol1 /safe/vol1.luks
    """
    paths = find_volume(data_dir, units.parse_name(volume))
    require_root("volume luks-header backup")
    uuid = trio.run(_backup, paths, file.absolute())
    reporter(output).emit(
        "header_saved", f"the header of volume {volume} is in {file}", volume=volume, file=str(file), uuid=uuid
    )


async def _backup(paths: VolumePaths, file: Path) -> str:
    if _in_use(paths):
        return (await ask(paths, BackupHeader(path=str(file)), HeaderSaved)).uuid
    async with block_device(paths, quiet_reporter(), "before its header is saved") as device:
        return await save_header(device, paths, file)


@header.command
def restore(
    volume: VolumeName,
    file: Annotated[Path, Parameter(help="What `volume luks-header backup` wrote.")],
    /,
    *,
    yes: Annotated[bool, Parameter(negative=(), help="Do not ask.")] = False,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: Steps = "text",
) -> None:
    """Put the header of a volume that is not served back. Asks first: the passphrases are those of the backup then.

    For example:

    share-manager volume luks-header restore vol1 /safe/vol1.luks --yes
    """
    paths = find_volume(data_dir, units.parse_name(volume))
    require_root("volume luks-header restore")
    if not yes:
        confirm(
            f"Replace the header of volume {volume}? Only passphrases from the time of the backup open it then.",
            f"volume luks-header restore asks before it replaces the header of {volume}, and nobody is there to "
            "answer: add --yes",
            f"the header of volume {volume} is kept",
        )
    uuid = trio.run(_restore, paths, file.absolute())
    reporter(output).emit("header_restored", f"volume {volume} has the header of {file}", volume=volume, uuid=uuid)


async def _restore(paths: VolumePaths, file: Path) -> str:
    async with block_device(paths, quiet_reporter(), "before its header is restored") as device:
        return await restore_header(device, paths, file)


def _in_use(paths: VolumePaths) -> bool:
    return lock_holder(paths) is not None and paths.control.exists()
