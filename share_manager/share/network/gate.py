"""The port of a share: who may use it, until when, and who does.

`host`   the network of the machine, which is left alone: ganesha's own client list decides, nothing is silenced
`here`   the namespace that this process is in belongs to the share (a pod, a node of its own): rules are made in it
`own`    a namespace is made for the NFS server, with an address of the share's own (network/namespace.py)
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any, Literal, Protocol, TypeVar

import msgspec
import trio

from share_manager.errors import NetworkError, PortInUseError
from share_manager.share.network import ruleset
from share_manager.share.network.namespace import inside, own_namespace
from share_manager.share.network.nft import Nft, nftables

_ATTEMPTS = 5

NetworkMode = Literal["host", "here", "own"]
_T = TypeVar("_T")


class NetworkOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`address` (with its prefix length), `bridge` and `gateway` are for the mode "own"; `floating`: the address comes
    and goes with the right to serve, by somebody else's hand."""

    mode: NetworkMode = "host"
    address: str = ""
    bridge: str = ""
    gateway: str = ""
    floating: bool = False


class ClientAddress(msgspec.Struct, frozen=True, kw_only=True):
    """Where a client is, and when it was heard of last, in seconds since 1970. `ports`: of its connections."""

    address: str
    last_seen: float
    ports: tuple[int, ...] = ()


class ShareNetwork(Protocol):
    """What the share's process may do with its port. None of it waits for more than the kernel."""

    @property
    def gated(self) -> bool:
        """Whether the port is shut without somebody who keeps it open."""

    @property
    def namespace(self) -> int | None:
        """A descriptor of the namespace that the server has to run in; None for the present one."""

    @property
    def mark(self) -> int:
        """Socket mark with which this process's own calls to the server get through at all times; 0 for none."""

    def silence(self) -> None:
        """From now on no packet of the port gets in or out. Raises NetworkError."""

    def refuse_new(self) -> None:
        """Nothing gets in any more, answers still get out, until it is silenced or opened. Raises NetworkError."""

    def open_for(self, seconds: float) -> None:
        """Open the port for that long from now, or less than was asked before. Raises NetworkError."""

    def open_until(self, deadline: float) -> None:
        """Open the port until then (`time.monotonic()`; infinity: for good), and not `ruleset.PERMIT` longer even if
        this process is stopped in the midst of it. Raises NetworkError."""

    async def set_allowed(self, networks: Sequence[str]) -> None:
        """From now on only clients of these networks (CIDR; none: everyone). Raises NetworkError, GaneshaError."""

    def clients(self) -> tuple[ClientAddress, ...] | None:
        """Who sent something lately; None where only the NFS server can tell. Raises NetworkError."""

    def inside(self, work: Callable[[], _T]) -> _T:
        """Do something short in the network namespace of the server."""


class HostNetwork:
    """`apply_allowed` hands the list to the NFS server."""

    gated = False
    namespace = None
    mark = 0

    def __init__(self, apply_allowed: Callable[[Sequence[str]], Awaitable[None]]) -> None:
        self._apply_allowed = apply_allowed

    def silence(self) -> None:
        pass

    def refuse_new(self) -> None:
        pass

    def open_for(self, seconds: float) -> None:
        pass

    def open_until(self, deadline: float) -> None:
        pass

    async def set_allowed(self, networks: Sequence[str]) -> None:
        await self._apply_allowed(networks)

    def clients(self) -> None:
        return None

    def inside(self, work: Callable[[], _T]) -> _T:
        return work()


class GatedNetwork:
    gated = True
    mark = ruleset.OWN_MARK

    def __init__(self, nft: Nft, port: int, namespace: int | None, life: int) -> None:
        self.namespace = namespace
        self._nft = nft
        self._port = port
        self._life = life

    def silence(self) -> None:
        self._life = _following(self._life)
        self._nft.run(ruleset.shut_gate(self._port, self._life))

    def refuse_new(self) -> None:
        self._nft.run(ruleset.shut_entry(self._port))

    def open_for(self, seconds: float) -> None:
        self.open_until(time.monotonic() + seconds)

    def open_until(self, deadline: float) -> None:
        for attempt in range(_ATTEMPTS):
            self._nft.run(ruleset.permit(self._port))
            # after the permit was made, or a stop of this process in between would make the gate live that much longer
            left = deadline - time.monotonic()
            if left <= 0:
                return
            try:
                self._nft.run(ruleset.open_gate(self._port, left))
            except NetworkError:
                # a machine that is busy, too, can let the permit end
                if attempt == _ATTEMPTS - 1:
                    raise
            else:
                return

    async def set_allowed(self, networks: Sequence[str]) -> None:
        self._nft.run(ruleset.allow(self._port, networks))

    def clients(self) -> tuple[ClientAddress, ...]:
        found = "\n".join(self._nft.run(command, json=True) for command in ruleset.list_seen(self._port))
        now = time.time()
        known: dict[str, list[tuple[float, int]]] = {}
        for address, port, left in seen(found):
            known.setdefault(address, []).append((now - (ruleset.SEEN - left), port))
        return tuple(
            ClientAddress(address=address, last_seen=max(ends)[0], ports=tuple(sorted(port for _, port in ends)))
            for address, ends in known.items()
        )

    def inside(self, work: Callable[[], _T]) -> _T:
        return work() if self.namespace is None else inside(self.namespace, work)


def remove_rules(port: int) -> None:
    """What a share that was killed has left in the present namespace. Raises NetworkError."""
    with nftables() as nft:
        nft.run(ruleset.remove(port))


def seen(listing: str) -> Iterator[tuple[str, int, float]]:
    """Addresses and ports, and for how many seconds they will be remembered, out of what nft lists, a JSON document a
    line."""
    for line in listing.splitlines():
        document: dict[str, Any] = msgspec.json.decode(line) if line else {}
        for item in document.get("nftables", ()):
            for element in item.get("set", {}).get("elem", ()):
                element = element["elem"]
                address, port = element["val"]["concat"]
                yield address, port, element["expires"]


def _following(life: int) -> int:
    # below the mark of our own calls and zero lies nothing
    return 1 << 24 | (life + 1) & 0xFFFFFF


@contextlib.contextmanager
def _alone(port: int) -> Iterator[None]:
    """No other share manager has the rules of this port in this network namespace: an abstract socket belongs to
    one, and goes with its process. Raises PortInUseError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as claim:
        try:
            claim.bind(f"\0{ruleset.table(port)}")
        except OSError:
            raise PortInUseError("this network namespace", port, "--port") from None
        yield


async def _beat(nft: Nft, port: int) -> None:
    """Raises NetworkError."""
    for attempt in range(_ATTEMPTS):
        try:
            nft.run(ruleset.pulse(port))
        except NetworkError:
            # that of a process that was killed goes when the kernel has closed its socket
            if attempt == _ATTEMPTS - 1:
                raise
            await trio.sleep(0.1)
        else:
            return


@contextlib.asynccontextmanager
async def share_network(
    options: NetworkOptions,
    *,
    volume: str,
    port: int,
    allowed: Sequence[str],
    apply_allowed: Callable[[Sequence[str]], Awaitable[None]],
) -> AsyncIterator[ShareNetwork]:
    """The network of one share, with its port shut (except for "host"). Its rules are gone afterwards.

    Raises NetworkError, PortInUseError.
    """
    if options.mode == "host":
        yield HostNetwork(apply_allowed)
        return
    async with contextlib.AsyncExitStack() as stack:
        namespace = None
        if options.mode == "own":
            namespace = await stack.enter_async_context(
                own_namespace(volume, options.address, options.bridge, options.gateway, floating=options.floating)
            )
        else:
            stack.enter_context(_alone(port))
        nft = stack.enter_context(nftables(namespace))
        life = _following(int.from_bytes(os.urandom(3), "big"))
        nft.run(ruleset.setup(port, life, allowed))
        # by a socket that does nothing else: the library may close one that had an error
        await _beat(stack.enter_context(nftables(namespace)), port)
        try:
            yield GatedNetwork(nft, port, namespace, life)
        finally:
            with contextlib.suppress(NetworkError):
                nft.run(ruleset.remove(port))
