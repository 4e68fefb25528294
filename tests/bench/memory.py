"""How much memory a volume's processes take: `python -m tests.bench.memory`, by default for a 1 TiB volume with 20 GiB
written in pieces and 10 snapshots.

The data is real: extents of 64 KiB, scattered over the whole volume, evenly among the snapshots and the head. The
replicas share the snapshots' files (hard links: nobody writes to them), so the disk holds them once. Everything is
read through the block file, each chunk of the index at least once, and written to in between.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random
from typing import Any

from engine.frontend.fuse_device import FuseDevice
from engine.launch import EngineConfig, engine_argv
from engine.record import bump_epoch
from engine.store import Store
from tests.engine.cluster import Cluster

EXTENT = 64 << 10
BLOCK = 4096


def memory(pid: int) -> dict[str, float]:
    """RSS and PSS now and the highest RSS ever, in MiB."""
    found: dict[str, float] = {}
    for file, keys in (("smaps_rollup", ("Rss", "Pss")), ("status", ("VmHWM",))):
        for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
            key, _, rest = line.partition(":")
            if key in keys:
                found[key] = int(rest.split()[0]) / 1024
    return found


def write_layers(directory: Path, size: int, written: int, snapshots: int, random: Random) -> list[int]:
    """Fill a replica that nobody serves; the offsets of the extents."""
    places = random.sample(range(size // EXTENT), written // EXTENT)
    data = mmap.mmap(-1, EXTENT)
    data[:] = os.urandom(EXTENT)
    each = len(places) // (snapshots + 1)
    for layer in range(snapshots + 1):
        store = Store.open(directory)
        fd = os.open(directory / store.meta.head, os.O_WRONLY | os.O_DIRECT)
        try:
            # the head has little, so that each replica can have its own
            of_layer = places[layer * each :][: each if layer < snapshots else 256]
            for place in sorted(of_layer):
                os.pwrite(fd, data, place * EXTENT)
        finally:
            os.close(fd)
        if layer < snapshots:
            store.snapshot(f"s{layer:03}")
        store.close()
    return [place * EXTENT for place in places]


def copy_replica(source: Path, target: Path, name: str) -> None:
    """With the snapshots' files linked."""
    shutil.rmtree(target)
    target.mkdir(mode=0o700)
    for path in sorted(source.iterdir()):
        if path.name.startswith("volume-snap-") and path.suffix == ".img":
            os.link(path, target / path.name)
        else:
            subprocess.run(["cp", "-a", "--sparse=always", path, target], check=True)
    identity = json.loads((target / "share-manager.json").read_text())
    (target / "share-manager.json").write_text(json.dumps(identity | {"replica": name}) + "\n")


class Engine:
    """The engine's process on a file of its own."""

    def __init__(self, of: Cluster) -> None:
        self.device = FuseDevice.mount(of.directory / "block")
        config = EngineConfig(
            record=str(of.store.path),
            secret_file=str(of.secret),
            epoch=bump_epoch(of.store).epoch,
            fuse_fd=self.device.fd,
            block_file=str(self.device.path),
            control=str(of.directory / "engine.sock"),
            open_timeout=30.0,
        )
        with (of.directory / "engine.log").open("wb") as log:
            self.process = subprocess.Popen(
                engine_argv(config, of.directory / "engine.json"),
                stdout=subprocess.PIPE,
                stderr=log,
                pass_fds=(self.device.fd,),
            )
        assert self.process.stdout is not None
        assert b"ready" in self.process.stdout.readline(), (of.directory / "engine.log").read_text()

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.device.abort()
        self.device.unmount()
        self.device.close()


def use(path: Path, size: int, places: list[int], random: Random, *, every: int) -> None:
    """Read each chunk of `every` bytes once, and the extents; write 4 KiB here and there, and large pieces."""
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    block, large = mmap.mmap(-1, BLOCK), mmap.mmap(-1, 1 << 20)
    try:
        for start in range(0, size, every):
            os.preadv(fd, [block], start + random.randrange(every // BLOCK) * BLOCK)
        for place in random.sample(places, min(len(places), 20000)):
            os.preadv(fd, [block], place)
        for _ in range(2000):
            os.pwrite(fd, block, random.randrange(size // BLOCK) * BLOCK)
        for _ in range(200):
            at = random.randrange(size >> 20) << 20
            os.pwrite(fd, large, at)
            os.preadv(fd, [large], at)
        os.fsync(fd)
    finally:
        os.close(fd)


def measure(
    directory: Path, *, size: int, written: int, snapshots: int, replicas: int, every: int = 4 << 20
) -> dict[str, dict[str, dict[str, float]]]:
    """MiB by moment ("attached", "used"), process and kind. Needs root and FUSE."""
    random = Random(1)
    of = Cluster(directory, replicas=replicas, size=size)
    places = write_layers(directory / "r1", size, written, snapshots, random)
    for name in of.names[1:]:
        copy_replica(directory / "r1", directory / name, name)
    found: dict[str, dict[str, dict[str, float]]] = {}
    try:
        of.start()
        engine = Engine(of)
        try:
            pids = {"engine": engine.process.pid} | {name: child.pid for name, child in of.processes.items()}
            found["attached"] = {name: memory(pid) for name, pid in pids.items()}
            use(engine.device.path, size, places, random, every=every)
            found["used"] = {name: memory(pid) for name, pid in pids.items()}
        finally:
            engine.close()
    finally:
        of.abandon()
    return found


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1024, help="GiB of the volume")
    parser.add_argument("--written", type=int, default=20480, help="MiB of data")
    parser.add_argument("--snapshots", type=int, default=10)
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"))
    parser.add_argument("--limit", type=float, default=64.0, help="MiB of RSS that no process may exceed")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="memory", dir=options.directory) as directory:
        found: Any = measure(
            Path(directory),
            size=options.size << 30,
            written=options.written << 20,
            snapshots=options.snapshots,
            replicas=options.replicas,
        )
        print(f"{'MiB':10} {'process':8} {'RSS':>7} {'PSS':>7} {'peak':>7}")
        for moment, processes in found.items():
            for name, one in processes.items():
                print(f"{moment:10} {name:8} {one['Rss']:7.1f} {one['Pss']:7.1f} {one['VmHWM']:7.1f}", flush=True)
        print("removing the files", flush=True)
    return int(any(one["VmHWM"] > options.limit for one in found["used"].values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
