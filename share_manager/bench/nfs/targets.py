"""Shares to measure through NFS: one ganesha configuration, the product's, on a plain file and on the engine."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path

import trio

from ganesha import render
from share_manager.bench import fio
from share_manager.bench.engines import engine_file, free_port, said
from share_manager.bench.model import NFS_WORKLOADS
from share_manager.bench.nfs.client import NfsClient
from share_manager.bench.processes import Server, UnavailableError, serving
from share_manager.bench.targets import (
    FileTarget,
    Opened,
    Place,
    ext4_mounted,
    loop_device,
    own_command,
    plain_file,
    ready_event,
)
from share_manager.share.export import ExportOptions, server_config

# an error instead of a hang should the server end; the rest is what the client does by itself
OPTIONS = "vers=4.2,port={port},softerr,timeo=600,retrans=2"
STOCK, STOCK_PLAIN = "nfs-stock", "nfs-stock-nodirsync"


def _client(place: Place) -> NfsClient:
    assert place.client is not None
    return place.client


@contextlib.asynccontextmanager
async def _mounted(client: NfsClient, port: int, path: str, pids: tuple[int, ...]) -> AsyncIterator[Opened]:
    place = await client.mount(path, OPTIONS.format(port=port))
    try:
        yield Opened(Path(place), pids, client)
    finally:
        # a client that has ended has no mounts, or none that it could be asked about
        with trio.CancelScope(shield=True), contextlib.suppress(UnavailableError):
            await client.unmount(place)


@contextlib.asynccontextmanager
async def _ganesha(place: Place, name: str, data: Path, port: int) -> AsyncIterator[Server]:
    """A ganesha that exports `data` as /NAME with the configuration of a share. Raises UnavailableError."""
    home = place.directory / f"{name}-ganesha"
    recovery = home / "recovery"
    recovery.mkdir(parents=True)
    client = _client(place)
    options = ExportOptions(bind=client.address, port=port)
    config, log = home / "ganesha.conf", home / "ganesha.log"
    config.write_text(render(server_config(options, name, f"bench-{place.token}-{name}", data, recovery), home))
    log.touch()
    argv = [*client.enter, "ganesha.nfsd", "-F", "-E", str(int(time.time())), "-f", str(config)]
    # no bus: nobody asks it anything; no blkid cache: loop devices change hands
    env = {
        **os.environ,
        "DBUS_SYSTEM_BUS_ADDRESS": f"unix:path={home}/none",
        "BLKID_FILE": str(home / "blkid.tab"),
    }
    argv += ["-L", str(log), "-p", str(home / "pid")]
    async with serving(f"{name}-ganesha", argv, home, env) as server:
        await said(server, "NFS SERVER INITIALIZED", log)
        yield server


def _share(name: str, replicas: int, dirsync: bool, base: str) -> FileTarget:
    """ext4 on a loop device with direct I/O, on an engine's file, or on a plain one without `replicas`; all of its
    blocks written before the filesystem is made, so that neither side has anything to allocate below it."""

    @contextlib.asynccontextmanager
    async def backing(place: Place) -> AsyncIterator[tuple[Path, tuple[int, ...]]]:
        if replicas:
            async with engine_file(replicas)(place.directory, name, place.size) as found:
                yield found
            return
        path = plain_file(place, name)
        try:
            yield path, ()
        finally:
            path.unlink()

    @contextlib.asynccontextmanager
    async def opened(place: Place, _: Opened | None) -> AsyncIterator[Opened]:
        port = free_port()
        async with backing(place) as (file, pids), loop_device(file) as device:
            await fio.run(fio.fill_argv(device, place.size), name)
            async with ext4_mounted(device, place.directory / f"{name}-mount", dirsync) as root:
                data = root / "data"
                data.mkdir()
                async with (
                    _ganesha(place, name, data, port) as server,
                    _mounted(_client(place), port, f"/{name}", (*pids, server.pid)) as ready,
                ):
                    yield ready

    below = f"engine, {replicas} replicas, TCP" if replicas else "loop on a plain file"
    title = f"NFS, ganesha, ext4{' dirsync' if dirsync else ''}, {below}"
    return FileTarget(name, title, replicas or 1, None, opened, NFS_WORKLOADS, (base,), nfs=True)


@contextlib.asynccontextmanager
async def _serve(place: Place, _: Opened | None) -> AsyncIterator[Opened]:
    client = _client(place)
    data = place.directory / "nfs-serve"
    data.mkdir()
    port, volume = free_port(), f"bench-{place.token}-nfs"
    argv = own_command(
        *("serve", volume, f"--size={place.size}", f"--data-dir={data}", "--replicas=3"),
        *(f"--bind={client.address}", f"--port={port}", "--output=json"),
    )
    try:
        async with serving("nfs-serve", [*client.enter, *argv], place.directory) as server:
            await ready_event(server)
            async with _mounted(client, port, f"/{volume}", (server.pid,)) as ready:
                yield ready
    finally:
        shutil.rmtree(data, ignore_errors=True)


NFS_TARGETS = (
    _share(STOCK, 0, True, STOCK),
    _share("nfs-engine-3", 3, True, STOCK),
    FileTarget(
        "nfs-serve",
        "NFS, `serve` as it is: new, 3 replicas, unix sockets, dirsync",
        3,
        None,
        _serve,
        NFS_WORKLOADS,
        (STOCK,),
        nfs=True,
    ),
    _share(STOCK_PLAIN, 0, False, STOCK_PLAIN),
    _share("nfs-engine-3-nodirsync", 3, False, STOCK_PLAIN),
)
