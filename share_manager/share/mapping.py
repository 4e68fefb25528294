"""The device-mapper device of an unlocked volume: its name, and how it goes."""

from __future__ import annotations

import re
from collections.abc import Callable

import trio

from share_manager.errors import CommandError, TimeoutProblem
from share_manager.paths import VolumePaths
from share_manager.share import cryptsetup

_BUSY_TIMEOUT = 3.0
_PAUSE = 0.05


def mapping_name(paths: VolumePaths, epoch: int) -> str:
    """Of one attachment: at most 96 of the 127 characters that device-mapper takes."""
    return f"sm-{paths.run.name}-{epoch}"


def mappings_of(paths: VolumePaths) -> list[str]:
    """Those of any attachment of the volume that there are now; without one that was cut off, which harms nobody."""
    pattern = re.compile(rf"sm-{re.escape(paths.run.name)}-\d+")
    found = cryptsetup.mappings().items()
    return sorted(
        name for name, kernel_name in found if pattern.fullmatch(name) and not cryptsetup.is_cut_off(kernel_name)
    )


async def close_mapping(name: str, give_up: Callable[[str], None]) -> str | None:
    """Remove it, whatever it takes. Does nothing when there is none.

    One that stays in use is cut off from its device and goes with its last user: then, what was said of it. `give_up`
    is called when removing hangs: it must fail every request that hangs.
    """
    deadline = trio.current_time() + _BUSY_TIMEOUT
    while cryptsetup.mapping_exists(name):
        try:
            await cryptsetup.remove_mapping(name)
        except TimeoutProblem as error:
            give_up(str(error))
            return await _cut_off(name, error)
        except CommandError as error:
            if trio.current_time() > deadline:
                return await _cut_off(name, error)
            await trio.sleep(_PAUSE)
    return None


async def _cut_off(name: str, reason: CommandError | TimeoutProblem) -> str | None:
    try:
        await cryptsetup.cut_off_mapping(name)
    except (CommandError, TimeoutProblem) as error:
        return str(error)
    return str(reason) if cryptsetup.mapping_exists(name) else None
