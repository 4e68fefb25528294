"""Whether the share may answer its clients: what the engine knows of the right to serve, joined with the port's gate.

The gate is never open longer than the right lasts, and the kernel shuts it (`share_manager.share.network`). A right
that lapses and comes back was nobody else's in between, so the server goes on where it was; only when it is away for
long the server ends, because the clients' leases would (`supervise.decide`).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator

import msgspec
import trio

from engine.client import EngineClient, EngineUnreachableError, RightNews
from share_manager.errors import NetworkError
from share_manager.events import Reporter
from share_manager.share.network import ShareNetwork

DRAIN = 0.1
_AGAIN = 0.1


class RightOptions(msgspec.Struct, frozen=True, kw_only=True):
    """In seconds. `lasts`: what a confirmation by all in-sync replicas is worth, from when it was asked for; 0: no
    right is needed. `age`: how old the last confirmation to somebody else must be before this share serves.
    `ungated`: the right is needed also where the kernel cannot shut the port; this process kills the server then, which
    it cannot while it is stopped."""

    lasts: float = 3.0
    age: float = 3.5
    ungated: bool = False


class ServingRight:
    """Of one share, for all its attachments. It is always held where none is needed.

    `kill`: ends the server at once; set by whoever runs one.
    """

    def __init__(
        self,
        network: ShareNetwork,
        options: RightOptions,
        report: Reporter,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.network = network
        self.needed = (network.gated or options.ungated) and options.lasts > 0
        self.kill: Callable[[], None] | None = None
        self.until = -math.inf if self.needed else math.inf
        self._options = options
        self._report = report
        self._clock = clock
        self._open = False
        self._failing = False
        self._news: RightNews | None = None
        self._heard = trio.Event()

    @property
    def lasts(self) -> float:
        """What the engine is asked for; 0 for nothing."""
        return self._options.lasts if self.needed else 0.0

    @property
    def held(self) -> bool:
        return self._clock() < self.until

    def lost_for(self) -> float:
        """Seconds since the right ended; 0 while it is held."""
        return max(0.0, self._clock() - self.until)

    async def follow(self, client: EngineClient) -> None:
        """Keep the gate open by what the engine of an attachment says, until cancelled."""
        self._news, self._heard = None, trio.Event()
        async with trio.open_nursery() as nursery:
            if self.needed and not self.network.gated:
                nursery.start_soon(self._end_in_time)
            while self.needed:
                with contextlib.suppress(EngineUnreachableError, trio.BrokenResourceError):
                    async with client.right() as news:
                        async for told in news:
                            self._hear(told)
                await trio.sleep(_AGAIN)
            await trio.sleep_forever()

    async def _end_in_time(self) -> None:
        while True:
            await self.regained()
            await trio.sleep(max(0.0, self.until - self._clock()))
            if not self.held and self._open and self.kill is not None:
                self._report.warn("right_lost", "the right to serve is lost: the server is ended")
                self._open = False
                self.kill()

    def _hear(self, news: RightNews) -> None:
        was_held = self.held
        self._news = news
        self.until = max(self.until, news.until)
        if self._open:
            self._renew()
            if not was_held and self.held:
                self._report.emit("right_regained", "the right to serve is back: clients are answered again")
        heard, self._heard = self._heard, trio.Event()
        heard.set()

    async def free(self, *, ours: bool) -> float:
        """Wait until no older epoch can be served by anybody; for how long that was. Returns with the right held.

        `ours`: whoever had the older epochs is known not to run any more.
        """
        began = trio.current_time()
        while self.needed and not (self.held and self._news is not None):
            await self._heard.wait()
        older = self._news.older_at if self._news is not None else None
        if not ours and older is not None:
            # the sleep may have begun late, so it can only end late
            await trio.sleep(max(0.0, older + self._options.age - self._clock()))
            await self.regained()
        return trio.current_time() - began

    async def regained(self) -> None:
        """Wait until the right is held."""
        while not self.held:
            await self._heard.wait()

    def open(self) -> None:
        """The server may be reached from now on, as long as the right lasts. Raises NetworkError."""
        self._open = True
        self.network.open_until(self.until)

    def silence(self) -> None:
        """The server ends, or has ended: not a packet gets in or out."""
        self._open = False
        with self._told():
            self.network.silence()

    async def leave(self) -> None:
        """The same for a server that still answers: what it was asked gets its answer first."""
        self._open = False
        with self._told():
            self.network.refuse_new()
            if self.network.gated:
                await trio.sleep(DRAIN)
        self.silence()

    def _renew(self) -> None:
        with self._told():
            self.network.open_until(self.until)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """A gate that cannot be changed shuts by itself."""
        try:
            yield
        except NetworkError as error:
            if not self._failing:
                self._report.warn("network", str(error))
            self._failing = True
        else:
            self._failing = False
