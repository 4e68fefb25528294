"""How a share lives by what the engine says of the right to serve."""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar, cast

import pytest
import trio
import trio.testing

from engine.client import EngineClient, RightNews
from share_manager.errors import NetworkError
from share_manager.events import Level, Reporter
from share_manager.share.network import ClientAddress
from share_manager.share.right import DRAIN, RightOptions, ServingRight

OPTIONS = RightOptions(lasts=3.0, age=3.5)
T = TypeVar("T")


class Network:
    """Remembers what was asked of it, with the times."""

    namespace = None
    mark = 0

    def __init__(self, gated: bool = True) -> None:
        self.gated = gated
        self.calls: list[tuple[str, float]] = []
        self.broken = False

    def silence(self) -> None:
        self._note("silence")

    def refuse_new(self) -> None:
        self._note("refuse_new")

    def open_for(self, seconds: float) -> None:
        self.open_until(trio.current_time() + seconds)

    def open_until(self, deadline: float) -> None:
        self._note("open", deadline)

    async def set_allowed(self, networks: Sequence[str]) -> None:
        raise AssertionError(networks)

    def clients(self) -> tuple[ClientAddress, ...] | None:
        return None

    def inside(self, work: Callable[[], T]) -> T:
        return work()

    def _note(self, what: str, detail: float | None = None) -> None:
        if self.broken:
            raise NetworkError("nftables: refused")
        self.calls.append((what, trio.current_time() if detail is None else detail))


class Engine:
    """Its news come when `tell` is called."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[RightNews](10)

    def tell(self, until: float, older_at: float | None = None) -> None:
        self._send.send_nowait(RightNews(until=until, older_at=older_at))

    @contextlib.asynccontextmanager
    async def right(self) -> AsyncIterator[Any]:
        yield self._receive


class Sink:
    def __init__(self) -> None:
        self.events: list[str] = []

    def emit(self, event: str, message: str, level: Level, fields: dict[str, Any]) -> None:
        self.events.append(event)


@contextlib.asynccontextmanager
async def followed(network: Network, options: RightOptions = OPTIONS) -> AsyncIterator[tuple[ServingRight, Engine]]:
    right = ServingRight(network, options, Reporter(Sink()), trio.current_time)
    engine = Engine()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(right.follow, cast(EngineClient, engine))
        await trio.testing.wait_all_tasks_blocked()
        yield right, engine
        nursery.cancel_scope.cancel()


async def test_the_gate_is_open_for_as_long_as_the_right_lasts(autojump_clock: trio.testing.MockClock) -> None:
    network, now = Network(), trio.current_time()
    async with followed(network) as (right, engine):
        engine.tell(now + 3)
        await right.free(ours=True)
        assert network.calls == []
        right.open()
        assert network.calls == [("open", now + 3)]
        engine.tell(now + 3.3)
        # an engine that was replaced begins anew, which takes nothing back
        engine.tell(0.0)
        await trio.testing.wait_all_tasks_blocked()
        assert network.calls[1:] == [("open", now + 3.3), ("open", now + 3.3)]
        assert right.lost_for() == 0
        await trio.sleep(4)
        assert not right.held
        assert right.lost_for() == pytest.approx(0.7)
        engine.tell(now + 7)
        await right.regained()
        assert network.calls[-1] == ("open", now + 7)
        await right.leave()
        assert network.calls[-2:] == [("refuse_new", now + 4), ("silence", now + 4 + DRAIN)]
        engine.tell(now + 9)
        await trio.testing.wait_all_tasks_blocked()
        assert network.calls[-1][0] == "silence"


@pytest.mark.parametrize(
    ("older", "ours", "waits"), [(None, False, 0.0), (-1.0, False, 2.5), (-1.0, True, 0.0), (-9.0, False, 0.0)]
)
async def test_an_older_right_is_waited_for(
    autojump_clock: trio.testing.MockClock, older: float | None, ours: bool, waits: float
) -> None:
    now = trio.current_time()
    async with followed(Network()) as (right, engine):
        engine.tell(now + 30, None if older is None else now + older)
        assert await right.free(ours=ours) == pytest.approx(waits)


async def test_nothing_is_waited_for_without_a_gate(autojump_clock: trio.testing.MockClock) -> None:
    right = ServingRight(Network(gated=False), OPTIONS, Reporter(Sink()), trio.current_time)
    assert await right.free(ours=False) == 0
    assert right.until == math.inf
    assert right.lasts == 0
    assert right.held


async def test_a_server_without_a_gate_is_killed_in_time(autojump_clock: trio.testing.MockClock) -> None:
    now = trio.current_time()
    killed: list[float] = []
    async with followed(Network(gated=False), RightOptions(ungated=True)) as (right, engine):
        engine.tell(now + 3)
        await right.free(ours=False)
        right.kill = lambda: killed.append(trio.current_time())
        right.open()
        engine.tell(now + 4)
        await trio.sleep(10)
        assert killed == [pytest.approx(now + 4)]


async def test_a_gate_that_cannot_be_changed_is_no_reason_to_end(autojump_clock: trio.testing.MockClock) -> None:
    network, now = Network(), trio.current_time()
    async with followed(network) as (right, engine):
        engine.tell(now + 3)
        await right.free(ours=True)
        right.open()
        network.broken = True
        for step in (4, 5):
            engine.tell(now + step)
        await trio.testing.wait_all_tasks_blocked()
        right.silence()
        network.broken = False
        right.open()
        assert network.calls[-1] == ("open", now + 5)
