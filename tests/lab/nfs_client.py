"""The kernel NFS client of a guest, for `share-manager bench --nfs-client "python -m tests.lab.nfs_client"`.

One guest for the whole run. Servers are started in the lab's network namespace, where the guest's tap is.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import sys
import threading
from types import FrameType

from share_manager.bench.files import Load
from share_manager.bench.nfs.protocol import Hello, say, serve
from tests.lab import leftovers
from tests.lab.guest import Guest, GuestError
from tests.lab.network import Lab
from tests.lab.workloads import bench

MEMORY = "512M"
PATIENCE = 60.0


class GuestClient:
    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._numbers = itertools.count(1)

    def mount(self, address: str, path: str, options: str) -> str:
        place = f"/mnt/bench-{next(self._numbers)}"
        self._guest.run("mkdir", "-p", place)
        self._guest.run("mount", "-t", "nfs4", "-o", options, f"{address}:{path}", place)
        return place

    def run(self, place: str, workload: str, seconds: float, size: int, stopped: threading.Event) -> Load:
        job = self._guest.spawn(bench.load, path=place, workload=workload, seconds=seconds, size=size)
        while not job.done:
            if stopped.wait(0.05):
                job.stop()
                break
        operations, passed, written = job.result(PATIENCE)
        return Load(int(operations), passed, int(written))

    def unmount(self, place: str) -> None:
        with contextlib.suppress(GuestError):
            self._guest.run("umount", place)
            return
        self._guest.run("umount", "--force", "--lazy", place)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(f"signal {number}")


def main() -> None:
    signal.signal(signal.SIGTERM, _interrupt)
    leftovers.remove_abandoned()
    lab = Lab()
    try:
        with lab:
            guest = Guest(lab, "bench", MEMORY)
            try:
                guest.start()
                enter = ("nsenter", f"--net=/run/netns/{lab.namespace}", "--")
                serve(GuestClient(guest), Hello(address=lab.server, enter=enter))
            except (GuestError, OSError) as error:
                say(Hello(error=str(error)), sys.stdout.buffer)
            finally:
                guest.close()
    finally:
        lab.discard()


if __name__ == "__main__":
    main()
