"""TCP relays between the engine and the replicas, whose links can be cut, half-cut, delayed and reset.

A process of its own (`python -m tests.chaos.relay`), so that whatever holds up the campaign does not hold up the
volume. It ends when its standard input does. A cut link looks like lost packets: what is sent waits in the sockets,
and arrives if the link comes back before an end gives up.
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping

import msgspec
import trio

_CHUNK = 1 << 18
_AHEAD = 16
_PR_SET_IO_FLUSHER = 57

Place = tuple[str, int]


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """`there`: towards the replica, `back`: from it. `delay` in seconds, each way. `reset` ends what is connected."""

    name: str
    there: bool = True
    back: bool = True
    delay: float = 0.0
    reset: bool = False


class Route(msgspec.Struct, frozen=True):
    """What connects to `listen` (address, port) is connected to `target`."""

    listen: Place
    target: Place


class _Relay:
    def __init__(self, route: Route) -> None:
        self.route = route
        self.link = Link(name="")
        self._changed = trio.Event()
        self._connections: set[trio.CancelScope] = set()
        self._resetting = False

    def set(self, link: Link) -> None:
        self.link = link
        if link.reset:
            self._resetting = True
            for scope in self._connections:
                scope.cancel()
        self._changed.set()
        self._changed = trio.Event()

    async def serve(self, listener: trio.SocketListener) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                stream = await listener.accept()
                nursery.start_soon(self._connection, stream)

    async def _connection(self, engine: trio.SocketStream) -> None:
        self._resetting = False
        with trio.CancelScope() as scope:
            self._connections.add(scope)
            try:
                async with engine:
                    try:
                        replica = await trio.open_tcp_stream(*self.route.target)
                    except OSError:
                        _linger(engine)
                        return
                    async with replica, trio.open_nursery() as nursery:
                        nursery.start_soon(self._pump, engine, replica, "there", nursery)
                        nursery.start_soon(self._pump, replica, engine, "back", nursery)
                        try:
                            await trio.sleep_forever()
                        finally:
                            if self._resetting:
                                _linger(engine)
                                _linger(replica)
            finally:
                self._connections.discard(scope)

    async def _pump(
        self, source: trio.SocketStream, sink: trio.SocketStream, direction: str, nursery: trio.Nursery
    ) -> None:
        """Until either end closes, which ends both directions."""
        send, receive = trio.open_memory_channel[tuple[float, bytes]](_AHEAD)

        async def read() -> None:
            async with send:
                async for chunk in source:
                    await send.send((trio.current_time() + self.link.delay, bytes(chunk)))

        source.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            async with trio.open_nursery() as both:
                both.start_soon(read)
                async for due, chunk in receive:
                    await trio.sleep_until(due)
                    while not getattr(self.link, direction):
                        await self._changed.wait()
                    await sink.send_all(chunk)
        except* trio.BrokenResourceError:
            pass
        # what ended behind a cut link is not heard of on the other side
        while not getattr(self.link, direction):
            await self._changed.wait()
        nursery.cancel_scope.cancel()


def _linger(stream: trio.SocketStream) -> None:
    """Closing it now sends a reset."""
    with contextlib.suppress(OSError):
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def _main(routes: dict[str, Route]) -> None:
    relays = {name: _Relay(route) for name, route in routes.items()}
    async with trio.open_nursery() as nursery:
        for relay in relays.values():
            host, port = relay.route.listen
            (listener,) = await trio.open_tcp_listeners(port, host=host)
            nursery.start_soon(relay.serve, listener)
        print("{}", flush=True)
        rest = b""
        async for chunk in trio.lowlevel.FdStream(0):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                link = msgspec.json.decode(line, type=Link)
                relays[link.name].set(link)
                print("{}", flush=True)
        nursery.cancel_scope.cancel()


class Relays:
    """The relay process, as the campaign sees it."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._lock = trio.Lock()

    async def set(self, link: Link) -> None:
        """Returns when it is so."""
        assert self._process.stdin is not None
        # shielded as a whole: a cut is undone when the one who made it is cancelled
        with trio.CancelScope(shield=True):
            async with self._lock:
                await self._process.stdin.send_all(msgspec.json.encode(link) + b"\n")
                await self._answer()

    async def _answer(self) -> None:
        assert self._process.stdout is not None
        with trio.fail_after(30):
            if not await self._process.stdout.receive_some(3):
                raise RuntimeError("the relay process ended")


@contextlib.asynccontextmanager
async def relays(routes: Mapping[str, Route]) -> AsyncIterator[Relays]:
    """Relays that listen, by name. They end with the block."""
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "tests.chaos.relay", msgspec.json.encode(routes).decode()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    made = Relays(process)
    try:
        await made._answer()
        yield made
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            for stream in (process.stdin, process.stdout):
                assert stream is not None
                await stream.aclose()


if __name__ == "__main__":
    # the volume's own write-back must not wait for memory that only it can free
    ctypes.CDLL(None).prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0)
    trio.run(_main, msgspec.json.decode(sys.argv[1], type=dict[str, Route]))
