from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from ganesha import DbusError
from ganesha.dbus import Control, bus_address, plain_address


@asynccontextmanager
async def bus(path: Path, handler: Callable[[trio.SocketStream], Awaitable[None]]) -> AsyncIterator[Control]:
    with trio.socket.socket(trio.socket.AF_UNIX) as sock:
        await sock.bind(str(path))
        sock.listen()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, handler, [trio.SocketListener(sock)])
            yield Control(path)
            nursery.cancel_scope.cancel()


async def hang_up(stream: trio.SocketStream) -> None:
    await stream.receive_some()


async def reject(stream: trio.SocketStream) -> None:
    await stream.receive_some()
    await stream.send_all(b"REJECTED EXTERNAL\r\n")


async def hang_up_later(stream: trio.SocketStream) -> None:
    await stream.receive_some()
    await stream.send_all(b"OK 0123\r\n")
    await stream.receive_some()


async def stay_silent(stream: trio.SocketStream) -> None:
    await trio.sleep_forever()


@pytest.mark.parametrize("handler", [hang_up, reject, hang_up_later])
async def test_a_bus_that_fails_is_an_error(
    tmp_path: Path, handler: Callable[[trio.SocketStream], Awaitable[None]]
) -> None:
    async with bus(tmp_path / "bus", handler) as control:
        with pytest.raises(DbusError, match="unreachable"):
            await control.in_grace()


async def test_a_silent_bus_is_an_error_in_time(tmp_path: Path) -> None:
    async with bus(tmp_path / "bus", stay_silent) as control:
        with trio.fail_after(3), pytest.raises(DbusError, match="within 0"):
            await control.clients(timeout=0.1)


async def test_no_bus_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DbusError, match="unreachable"):
        await Control(tmp_path / "bus").stats()


def test_addresses_are_escaped() -> None:
    assert bus_address(Path("/run/a b,c;d=e%/é")) == "unix:path=/run/a%20b%2cc%3bd%3de%25/%c3%a9"


@pytest.mark.parametrize(
    ("seen", "plain"), [("::ffff:10.0.0.1", "10.0.0.1"), ("10.0.0.1", "10.0.0.1"), ("fd00::ffff:1", "fd00::ffff:1")]
)
def test_mapped_addresses_are_shown_plain(seen: str, plain: str) -> None:
    assert plain_address(seen) == plain
