"""The row of an encrypted volume, in a guest, whose kernel has dm-crypt but no way to replace an engine in place."""

from __future__ import annotations

import subprocess
import time

from tests.failover.ground import Ground
from tests.failover.measure import Measured
from tests.failover.probes import probes
from tests.lab.guest import Guest
from tests.lab.mounts import mounted
from tests.lab.stalls import worst_after
from tests.lab.workloads import appender, served
from tests.system.test_encryption import CHEAP, Machine

VOLUME = "vault"


def kill_engine(ground: Ground, rounds: int, into: Measured) -> None:
    """Raises AssertionError, GuestError."""
    one, two = ground.clients
    image = ground.lab.directory / f"{into.row}.img"
    with image.open("wb") as disk:
        disk.truncate(1 << 30)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    guest = Guest(ground.lab, "vault", memory="512M", disks=[image])
    try:
        machine = Machine(guest.start(), image, ground.progress, ground.options)
        machine.begin()
        options = ("--encrypt", "--size", "256Mi", "--replicas", "2", *CHEAP, "--passphrase-file", "/run/old")
        with (
            machine.serving(VOLUME, *options) as job,
            mounted(one, machine.export(VOLUME)) as here,
            mounted(two, machine.export(VOLUME), "4.1") as there,
        ):
            append = one.spawn(appender.append, path=f"{here}/log")
            append.wait_event("running")
            faults = []
            for number in range(rounds):
                with probes(one, two, here, there) as asked:
                    engine = machine.pid(VOLUME, "engine")
                    began = time.time()
                    guest.call(served.kill, pids=[engine])
                    asked.ask()
                    job.wait_event("ready", 60, after=began)
                    append.wait_event("progress", 60, after=time.time())
                    faults.append((began, time.time()))
                    asked.collect(began, into)
                ground.progress(f"{into.row} {number + 1}/{rounds}: served after {faults[-1][1] - began:.2f} s")
            outcome = append.finish()
            into.stall += [worst_after(outcome["gaps"], *fault) for fault in faults]
            assert outcome["errors"] == []
            count = outcome["acknowledged"]
            assert two.call(appender.verify, path=f"{there}/log", acknowledged=count) == []
    finally:
        guest.close()
        image.unlink(missing_ok=True)
