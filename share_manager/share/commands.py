"""Run a program for its effect, and tell in one line what went wrong."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

import trio

from share_manager.errors import CommandError, MissingProgramError, TimeoutProblem

SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
_DEATH_WAIT = 2.0


def search_path() -> str:
    # a shell of an ordinary login, or su without '-', has no sbin
    return f"{os.environ.get('PATH', '/usr/local/bin:/usr/bin:/bin')}:{SBIN}"


def find_program(name: str) -> str:
    """Raises MissingProgramError."""
    found = shutil.which(name, path=search_path())
    if found is None:
        raise MissingProgramError(name)
    return found


def environment() -> dict[str, str]:
    """For programs whose output is read."""
    # without DM_DISABLE_UDEV libdevmapper waits for a udev that a container does not have
    return {**os.environ, "PATH": search_path(), "LC_ALL": "C", "DM_DISABLE_UDEV": "1"}


async def run(
    *argv: str, ok: Sequence[int] = (0,), timeout: float = 120.0, pass_fds: Sequence[int] = ()
) -> tuple[int, str]:
    """Run to the end in a session of its own, so that a terminal's Ctrl-C does not reach it.

    Returns its status and what it wrote. A program that hangs in the kernel is killed and left behind, never waited
    for: its end may need something that only the caller can do. Raises MissingProgramError, CommandError,
    TimeoutProblem.
    """
    process = await trio.lowlevel.open_process(
        [find_program(argv[0]), *argv[1:]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment(),
        start_new_session=True,
        pass_fds=tuple(pass_fds),
    )
    assert process.stdout is not None
    output = bytearray()
    with trio.move_on_after(timeout):
        try:
            async for chunk in process.stdout:
                output += chunk
            status = await process.wait()
        except BaseException:
            process.kill()
            with trio.move_on_after(_DEATH_WAIT, shield=True):
                await process.wait()
            raise
        finally:
            with trio.CancelScope(shield=True):
                await process.stdout.aclose()
        text = output.decode(errors="replace")
        if status not in ok:
            raise CommandError(argv, status, text)
        return status, text
    raise TimeoutProblem(" ".join(argv), timeout)
