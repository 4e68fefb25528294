"""A server inside the test, over real sockets, so that its syncs can be counted, held up and broken."""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from engine.address import Address
from engine.replica import Server, listen
from engine.replica.aio import Ring
from engine.replica.offloop import open_ring
from engine.replica.syncer import AioSyncer
from engine.store import IoMode, Store, create_replica
from tests.engine.replica.client import KEY, UUID

SIZE = 64 << 20


class Held:
    """A call that runs in a worker thread: counted, stopped at `gate`, and failed with `error`."""

    def __init__(self, inner: Callable[[], None]) -> None:
        self.inner = inner
        self.started = 0
        self.finished = 0
        self.error: OSError | None = None
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self) -> None:
        self.started += 1
        assert self.gate.wait(10)
        if self.error is not None:
            raise self.error
        self.inner()
        self.finished += 1


def io_of(base: Path) -> IoMode:
    """See the fixture `tmp_path`."""
    return "direct" if base.name.startswith("direct") else "auto"


class Disk:
    """A ring whose completions are held back, or made to fail."""

    def __init__(self, ring: Ring) -> None:
        self.ring = ring
        self.eventfd = ring.eventfd
        self.held: Callable[[int, int], bool] | None = None  # by opcode and offset
        self.errors: Callable[[int, int], int] = lambda opcode, offset: 0
        self.waiting: list[tuple[int, int]] = []
        self.prepared = 0
        self.batches = 0
        self._requests: dict[int, tuple[int, int]] = {}

    def prepare(self, tag: int, opcode: int, fd: int, address: int, length: int, offset: int, flags: int) -> None:
        self.prepared += 1
        self._requests[tag] = (opcode, offset)
        self.ring.prepare(tag, opcode, fd, address, length, offset, flags)

    def flags(self, tag: int) -> int:
        return self.ring.flags(tag)

    def submit(self) -> int:
        self.batches += 1
        return self.ring.submit()

    def submit_all(self, tags: Sequence[int]) -> None:
        self.ring.submit_all(tags)

    def completions(self, wait: bool = False) -> list[tuple[int, int]]:
        done, self.waiting = self.waiting + self.ring.completions(wait), []
        passed = []
        for tag, result in done:
            request = self._requests[tag]
            if result > 0 and self.held is not None and self.held(*request):
                self.waiting.append((tag, result))
            else:
                passed.append((tag, self.errors(*request) or result))
        return passed

    def release(self) -> None:
        self.held = None
        self.look()

    def look(self) -> None:
        """Have what is held back looked at again."""
        os.eventfd_write(self.eventfd, 1)

    def close(self) -> None:
        self.ring.close()


class Inside:
    def __init__(self, store: Store, address: str, *, aio: bool) -> None:
        self.store = store
        self.address = address
        ring = open_ring(store, "auto")
        self.disk = Disk(ring) if ring is not None else None
        self.server = Server(store, KEY, self.disk, AioSyncer(store) if aio else None)
        self.sync = Held(store.sync)
        store.sync = self.sync  # type: ignore[method-assign]
        self.map_syncs = 0
        self.map_gate = threading.Event()
        self.map_gate.set()
        begin = store.maps.begin

        def counted() -> object:
            sync = begin()
            run = sync.run

            def held() -> None:
                self.map_syncs += 1
                assert self.map_gate.wait(10)
                run()

            sync.run = held  # type: ignore[method-assign]
            return sync

        store.maps.begin = counted  # type: ignore[method-assign, assignment]
        self.clean: bool | None = None


@asynccontextmanager
async def inside(base: Path, *, aio: bool = False) -> AsyncIterator[Inside]:
    """Serve `base`/r1, made when it is not there, until the block ends or the server stops itself.

    `aio`: with the syncs of the product, which pass `Inside.sync` by.
    """
    directory = base / "r1"
    if not directory.exists():
        create_replica(directory, volume="vol1", uuid=UUID, replica="r1", size=SIZE)
    store = Store.open(directory, io_of(base))
    listener = listen(Address.parse(f"unix:{base}/inside.sock"))
    running = Inside(store, str(listener.address), aio=aio)
    try:
        async with trio.open_nursery() as nursery:

            async def serve() -> None:
                running.clean = await running.server.serve(listener)

            nursery.start_soon(serve)
            yield running
            nursery.cancel_scope.cancel()
    finally:
        listener.close()
        store.close()


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(20):
        while not condition():
            await trio.sleep(0.002)
