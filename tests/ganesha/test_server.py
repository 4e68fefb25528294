"""A real nfs-ganesha on loopback."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from ganesha import ServerConfig, StartError, export_handle, null_call, run_ganesha
from ganesha.errors import HealthError, Nfs4Error

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="FSAL VFS opens files by handle, which needs root")

MakeConfig = Callable[..., ServerConfig]


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def test_it_serves_and_stops(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    async with run_ganesha(config, run_dir=tmp_path / "run", epoch=1) as server:
        await server.wait_ready(10)
        await null_call("127.0.0.1", config.port, 2)
        assert await export_handle("127.0.0.1", config.port, "/vol1", 2)
        with pytest.raises(Nfs4Error):
            await export_handle("127.0.0.1", config.port, "/vol2", 2)
        assert not (await server.grace()).active
        (client,) = await server.clients()
        assert client.versions == ("4.0",)
        assert (await server.stats()).operations["NFSv40"] > 0
        pids = (server.pid, server.dbus_pid)
    assert server.returncode == 0
    assert not any(alive(pid) for pid in pids)
    with pytest.raises(HealthError):
        await null_call("127.0.0.1", config.port, 2)


async def test_a_port_in_use_is_named_as_the_reason(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    with trio.socket.socket() as other:
        await other.bind(("127.0.0.1", config.port))
        other.listen()
        with pytest.raises(StartError, match="in use"):
            async with run_ganesha(config, run_dir=tmp_path / "run", epoch=1) as server:
                await server.wait_ready(10)
