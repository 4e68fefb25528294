"""The guest's side: replicas on logged disks, an engine, a filesystem on its block file, a workload, and the marks.

`python -m tests.powerloss.inside PLAN`; runs as root in a guest whose disks are ubda (data) and ubdb (log) of the
first replica, and so on. The engine's processes are forked from here, because starting an interpreter takes seconds.

Marks in every log: `ack:N`, when N operations are done; `<S` and `S>` around the instant S, at which the record was
what the outcome says. Where nothing stands between the two in any log, all logs can be cut there together.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import importlib
import json
import mmap
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import msgspec

import engine.__main__
import engine.replica.__main__
from engine.frontend import frontend
from engine.frontend.fuse_device import FuseDevice
from engine.launch import EngineConfig, ReplicaConfig, engine_argv, replica_argv
from engine.record import FileRecordStore, ReplicaRecord, VolumeRecord, bump_epoch
from engine.replica.syncer import ThreadSyncer
from tests.powerloss import workload

WORK = Path("/run/work")
TICK = 0.002


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """`outages`: while operations of these ranges run, the second replica is killed. `sabotage`: see `_sabotage`."""

    seed: int
    operations: int
    replicas: int
    volume: str
    uuid: str
    size: int
    secret: str
    outages: tuple[tuple[int, int], ...] = ()
    sabotage: str = ""
    io: str = "auto"


class Instant(msgspec.Struct, frozen=True):
    """`written`: sectors that were written to each disk, flushed or not."""

    number: int
    record: dict[str, Any]
    written: list[int]


class Outcome(msgspec.Struct, frozen=True):
    acknowledged: int
    seconds: float
    instants: list[Instant]


class LoggedDisk:
    """A device-mapper target of the kind log-writes."""

    def __init__(self, place: int) -> None:
        data, log = (f"/dev/ubd{chr(ord('a') + 2 * place + i)}" for i in range(2))
        self.name = f"logged{place}"
        sectors = int(Path(f"/sys/block/{data[5:]}/size").read_text())
        run("dmsetup", "create", self.name, "--table", f"0 {sectors} log-writes {data} {log}")
        self.path = Path("/dev/mapper", self.name)
        self._control = os.open("/dev/mapper/control", os.O_RDWR)
        number = self.path.stat().st_rdev
        self._stat = os.open(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/stat", os.O_RDONLY)

    def mark(self, text: str) -> None:
        """By ioctl, because a process takes 50 ms here (struct dm_ioctl and DM_TARGET_MSG of linux/dm-ioctl.h)."""
        body = bytes(8) + f"mark {text}".encode() + b"\0"
        size = 312 + len(body)
        head = struct.pack("<3I7IQ128s129s7x", 4, 0, 0, size, 312, *[0] * 5, 0, self.name.encode(), b"")
        fcntl.ioctl(self._control, 0xC138FD0E, bytearray(head + body))

    @property
    def written(self) -> int:
        """Sectors, of what was completed."""
        return int(os.pread(self._stat, 512, 0).split()[6])


def run(*argv: str) -> str:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr}{done.stdout}")
    return done.stdout


def fork(main: Callable[[list[str]], int], argv: list[str], log: Path, keep: int = -1) -> tuple[int, bytes]:
    """Run one of the engine's programs in a child; return its pid and its first line, which says that it is up."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            os.dup2(writer, 1)
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
            faulthandler.enable(2)
            if keep >= 0:
                os.set_inheritable(keep, True)
            status = main(argv)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as lines:
        line = lines.readline()
    if not line:
        _, ended = os.waitpid(pid, 0)
        raise RuntimeError(f"{argv}: ended with {os.waitstatus_to_exitcode(ended)}: {log.read_text()}")
    return pid, line


class Guest:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.names = [f"r{i + 1}" for i in range(plan.replicas)]
        self.disks = [LoggedDisk(i) for i in range(plan.replicas)]
        self.pids: dict[str, int] = {}
        self.secret = WORK / "secret"
        self.secret.write_text(plan.secret)
        self.secret.chmod(0o600)
        self.store = FileRecordStore(WORK / "record.json")
        self.instants: list[Instant] = []
        self.problems: list[str] = []
        self._stop = threading.Event()

    def directory(self, name: str) -> Path:
        return WORK / name

    def start_replica(self, name: str) -> None:
        config = ReplicaConfig(
            directory=str(self.directory(name) / "replica"),
            listen=f"unix:{WORK}/{name}.sock",
            secret_file=str(self.secret),
            io=self.plan.io,  # type: ignore[arg-type]
        )
        argv = replica_argv(config, WORK / f"{name}.json")[3:]
        self.pids[name], _ = fork(engine.replica.__main__.main, argv, WORK / f"{name}.log")

    def kill(self, name: str) -> None:
        pid = self.pids.pop(name)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    @contextlib.contextmanager
    def volume(self) -> Iterator[Path]:
        """Everything up, down to the mounted filesystem."""
        plan = self.plan
        for name, disk in zip(self.names, self.disks, strict=True):
            self.directory(name).mkdir()
            run("mount", str(disk.path), str(self.directory(name)))
            self.start_replica(name)
        replicas = tuple(
            ReplicaRecord(name=name, address=f"unix:{WORK}/{name}.sock", directory=str(self.directory(name)))
            for name in self.names
        )
        self.store.create(
            VolumeRecord(
                volume=plan.volume, uuid=plan.uuid, size=plan.size, replicas=replicas, in_sync=tuple(self.names)
            )
        )
        device = FuseDevice.mount(WORK / "block")
        config = EngineConfig(
            record=str(self.store.path),
            secret_file=str(self.secret),
            epoch=bump_epoch(self.store).epoch,
            fuse_fd=device.fd,
            block_file=str(device.path),
            control=str(WORK / "control.sock"),
            open_timeout=10.0,
            reconnect_interval=0.1,
        )
        argv = engine_argv(config, WORK / "engine.json")[2:]
        self.pids["engine"], line = fork(engine.__main__.main, argv, WORK / "engine.log", device.fd)
        if b"ready" not in line:
            raise RuntimeError(line.decode() + (WORK / "engine.log").read_text())
        device.close()
        loop = run("losetup", "--find", "--show", "--direct-io=on", str(device.path)).strip()
        root = WORK / "root"
        root.mkdir()
        run("mount", "-o", "dirsync", loop, str(root))
        yield root

    def mark(self, text: str) -> None:
        for disk in self.disks:
            disk.mark(text)

    def look(self) -> None:
        """One instant after the other. What goes wrong here must not pass for a quiet volume."""
        number = 0
        try:
            while not self._stop.wait(TICK):
                before = self.store.path.read_bytes()
                self.mark(f"<{number}")
                written = [disk.written for disk in self.disks]
                self.mark(f"{number}>")
                if self.store.path.read_bytes() == before:
                    self.instants.append(Instant(number, json.loads(before), written))
                number += 1
        except Exception as error:
            self.problems.append(repr(error))

    def scribble(self, path: Path) -> None:
        """Writes that nobody flushes, so that replicas have something to differ in."""
        rng = Random(self.plan.seed)
        fd = os.open(path, os.O_RDWR | os.O_DIRECT)
        page = mmap.mmap(-1, 8192)
        try:
            while not self._stop.wait(0.004):
                page[:] = rng.randbytes(8192)
                os.pwrite(fd, page, rng.randrange(workload.JUNK_SIZE // 4096 - 1) * 4096)
        except Exception as error:
            self.problems.append(repr(error))
        finally:
            os.close(fd)

    def work(self, root: Path) -> Outcome:
        plan = self.plan
        junk = root / workload.JUNK
        junk.write_bytes(bytes(workload.JUNK_SIZE))
        fd = os.open(junk, os.O_RDWR)
        os.fsync(fd)
        os.close(fd)
        self.mark("begin")
        threads = [threading.Thread(target=self.look), threading.Thread(target=self.scribble, args=(junk,))]
        for thread in threads:
            thread.start()
        began = time.monotonic()
        try:
            for done, operation in enumerate(workload.operations(plan.seed)):
                self.mark(f"ack:{done}")
                if done == plan.operations or self.problems:
                    break
                for first, last in plan.outages:
                    if done == first:
                        self.kill(self.names[1])
                    elif done == last:
                        self.start_replica(self.names[1])
                workload.perform(root, operation)
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()
        if self.problems:
            raise RuntimeError("; ".join(self.problems))
        seconds = time.monotonic() - began
        self.mark("end")
        wait_logged(self.disks)
        return Outcome(done, seconds, self.instants)


def wait_logged(disks: list[LoggedDisk]) -> None:
    """Return when what the kernel has still to log is in the log."""
    last: list[str] = []
    while True:
        now = [run("dmsetup", "status", disk.name) for disk in disks]
        if now == last:
            return
        last = now
        time.sleep(0.2)


def _sabotage(what: str) -> None:
    """Break a promise of the product in this process and its children, for the proof that the replay notices."""
    if what == "flush":
        # FLUSH is answered, the disk is not asked
        module = importlib.import_module("engine.store.store")
        module.Store.sync = lambda self: None
        # the other one would ask it without the store
        vars(engine.replica.__main__)["make_syncer"] = lambda store: ThreadSyncer(store.sync)
    elif what == "intent":
        # intent bits stay in the page cache
        module = importlib.import_module("engine.store.maps")
        module.MapSync.run = lambda self: None
        module._MapFile._write = lambda self, touched: None
    elif what:
        raise ValueError(what)


def main(argv: list[str]) -> int:
    plan = msgspec.json.decode(argv[1], type=Plan)
    _sabotage(plan.sabotage)
    frontend("device")
    run("modprobe", "--all", "dm-log-writes", "fuse", "loop")
    # there is nobody in the guest who would make the device nodes
    os.environ["DM_DISABLE_UDEV"] = "1"
    guest = Guest(plan)
    with guest.volume() as root:
        try:
            outcome = guest.work(root)
        except Exception:
            for log in WORK.glob("*.log"):
                sys.stderr.write(f"--- {log.name}\n{log.read_text()[-3000:]}")
            raise
    sys.stdout.write(msgspec.json.encode(outcome).decode())
    sys.stdout.flush()
    # nothing is put in order: the power is cut
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
