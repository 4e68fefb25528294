"""What clients see of a server that dies while its connections are kept."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import trio

from share_manager.share.connections import KeptConnections

SERVER = """
import socket, sys
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
accepted = []
while True:
    accepted.append(listener.accept()[0])
    if accepted[-1].recv(1) == b"c":
        accepted.pop().close()
"""


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(10):
        while not condition():
            await trio.sleep(0.01)


@pytest.fixture
def server() -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    with subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


@contextlib.asynccontextmanager
async def followed(kept: KeptConnections, pid: int) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(kept.follow, pid)
        yield
        nursery.cancel_scope.cancel()


def client(port: int, word: bytes) -> socket.socket:
    made = socket.create_connection(("127.0.0.1", port))
    made.settimeout(10)
    made.sendall(word)
    return made


async def test_clients_hear_of_the_end_when_there_is_another_server(
    server: tuple[subprocess.Popen[bytes], int],
) -> None:
    process, port = server
    with contextlib.closing(KeptConnections(port)) as kept, client(port, b"k") as idle, client(port, b"k") as busy:
        async with followed(kept, process.pid):
            await until(lambda: len(kept) == 2)
            # never read: its kernel would answer the death with a RST at once
            busy.sendall(b"more")
            process.kill()
            process.wait()
        kept.left()
        for one in (idle, busy):
            one.setblocking(False)
            await trio.sleep(0.1)
            with pytest.raises(BlockingIOError):
                one.recv(1)
        # whoever comes next gets the port
        with socket.create_server(("127.0.0.1", port)):
            kept.reset()
            assert len(kept) == 0
            for one in (idle, busy):
                one.settimeout(10)
                with pytest.raises(ConnectionResetError):
                    await trio.to_thread.run_sync(one.recv, 1)


async def test_what_is_closed_while_the_server_lives_is_let_go(server: tuple[subprocess.Popen[bytes], int]) -> None:
    process, port = server
    with contextlib.closing(KeptConnections(port)) as kept, client(port, b"k") as going:
        async with followed(kept, process.pid):
            await until(lambda: len(kept) == 1)
            going.shutdown(socket.SHUT_WR)
            await until(lambda: len(kept) == 0)
    with contextlib.closing(KeptConnections(port)) as kept, socket.create_connection(("127.0.0.1", port)) as closed:
        async with followed(kept, process.pid):
            await until(lambda: len(kept) == 1)
            closed.sendall(b"c")
            closed.settimeout(10)
            assert await trio.to_thread.run_sync(closed.recv, 1) == b""


async def test_another_server_of_the_port_is_nobodys_business(server: tuple[subprocess.Popen[bytes], int]) -> None:
    process, port = server
    async with contextlib.AsyncExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.2", port)))
        stack.enter_context(socket.create_connection(("127.0.0.2", port)))
        stack.enter_context(listener.accept()[0])
        stack.enter_context(client(port, b"k"))
        kept = stack.enter_context(contextlib.closing(KeptConnections(port)))
        async with followed(kept, process.pid):
            await until(lambda: len(kept) == 1 and max(kept._sought.values(), default=0) >= 2)
        assert len(kept) == 1


async def test_closed_without_another_server_they_end(server: tuple[subprocess.Popen[bytes], int]) -> None:
    process, port = server
    with client(port, b"k") as left:
        kept = KeptConnections(port)
        async with followed(kept, process.pid):
            await until(lambda: len(kept) == 1)
            process.kill()
            process.wait()
        kept.left()
        kept.close()
        assert await trio.to_thread.run_sync(left.recv, 1) == b""
