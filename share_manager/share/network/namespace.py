"""A network namespace of a share's own, on the host's network by a veth pair.

It has no name: it lives as long as this process or the NFS server in it, and the pair goes with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import ipaddress
import os
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import trio

from share_manager.errors import CommandError, NetworkError
from share_manager.share.commands import run

_CLONE_NEWNET = 0x40000000
INSIDE = "share0"
_ANCHOR = "169.254.115.109/32"

_libc = ctypes.CDLL(None, use_errno=True)
_T = TypeVar("_T")


def host_side(volume: str) -> str:
    """The interface's name on the host, which has at most 15 characters."""
    return f"sm{hashlib.sha256(volume.encode()).hexdigest()[:10]}"


@contextlib.asynccontextmanager
async def own_namespace(
    volume: str, address: str, bridge: str, gateway: str, *, floating: bool = False
) -> AsyncIterator[int]:
    """A descriptor of a namespace that has `address` ("10.0.0.5/24") on an interface of its own.

    With `bridge` that hangs on it; otherwise the host routes the address to it, and answers for others there. A
    `floating` address, which needs a bridge, is for others to give and take. Raises NetworkError.
    """
    fd, outside = _make(), host_side(volume)
    try:
        try:
            await _connect(fd, outside, address, bridge, gateway, floating)
        except CommandError as error:
            raise NetworkError(f"the share's network namespace cannot be set up: {error}") from error
        yield fd
    finally:
        # the pair goes when the last process in there is gone, a little later: the name must be free at once
        with trio.CancelScope(shield=True), contextlib.suppress(CommandError):
            await run("ip", "link", "delete", outside, ok=(0, 1))
        os.close(fd)


def _make() -> int:
    def work() -> int:
        # of this thread only, which ends here
        if _libc.unshare(_CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    try:
        return _apart(work)
    except OSError as error:
        raise NetworkError(f"no network namespace can be made: {error.strerror}") from error


def inside(fd: int, work: Callable[[], _T]) -> _T:
    """Do it in the namespace behind the descriptor. Raises OSError when there is no way in."""

    def enter() -> _T:
        if _libc.setns(fd, _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return work()

    return _apart(enter)


def _set(fd: int, path: str, value: str) -> None:
    """Write a file of /proc/sys/net, which shows the namespace of whoever opens it."""
    with contextlib.suppress(OSError):
        inside(fd, lambda: Path(path).write_text(value))


def _apart(work: Callable[[], _T]) -> _T:
    """Do it in a thread that ends afterwards."""
    with ThreadPoolExecutor(1, "netns") as worker:
        return worker.submit(work).result()


async def _connect(fd: int, outside: str, address: str, bridge: str, gateway: str, floating: bool) -> None:
    here, plain = str(os.getpid()), address.partition("/")[0]
    family, v6 = ("-6", True) if ":" in plain else ("-4", False)

    async def ip(*argv: str) -> None:
        await run("nsenter", f"--net=/proc/{here}/fd/{fd}", "--", "ip", *argv)

    # of a run that was killed, whose server may have lived on
    await run("ip", "link", "delete", outside, ok=(0, 1))
    await ip("link", "add", INSIDE, "type", "veth", "peer", "name", outside, "netns", here)
    # whoever knew the address at another node learns at once where it is now
    _set(fd, f"/proc/sys/net/ipv4/conf/{INSIDE}/arp_notify", "1")
    _set(fd, f"/proc/sys/net/ipv6/conf/{INSIDE}/ndisc_notify", "1")
    await ip("link", "set", "lo", "up")
    if not floating:
        await ip("address", "add", address, "dev", INSIDE, *(["nodad"] if v6 else []))
    elif not v6:
        # routes go with an interface's last address
        await ip("address", "add", _ANCHOR, "dev", INSIDE, "scope", "host")
    if bridge:
        await run("ip", "link", "set", outside, "master", bridge)
    await run("ip", "link", "set", outside, "up")
    await ip("link", "set", INSIDE, "up")
    if floating:
        await ip(family, "route", "add", str(ipaddress.ip_interface(address).network), "dev", INSIDE)
    if gateway:
        await ip(family, "route", "add", "default", "via", gateway, "dev", INSIDE, "onlink")
    elif not bridge:
        await ip(family, "route", "add", "default", "dev", INSIDE)
    if not bridge:
        await run("ip", family, "route", "replace", plain, "dev", outside)
        with contextlib.suppress(OSError):
            Path(f"/proc/sys/net/ipv4/conf/{outside}/proxy_arp").write_text("1")
