"""Encrypted shares. The whole product runs in a guest, whose kernel has dm-crypt; its clients are other guests."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Progress
from tests.lab import images
from tests.lab.guest import CHECKOUT, Guest, Job
from tests.lab.mounts import Export, mounted
from tests.lab.network import Lab
from tests.lab.stalls import Stalls, worst_after
from tests.lab.workloads import appender, eavesdrop, served
from tests.system.conftest import SHORT_GRACE

pytestmark = pytest.mark.system

MIB = 1 << 20
PROGRAM = str(CHECKOUT / ".venv/bin/share-manager")
DATA = "/srv/data"
OLD, NEW = "the-old-passphrase", "the-new-passphrase"
WORD = "known plaintext 7f3a91c4"
# cheap to derive, since every step of the test does
CHEAP = ("--luks-pbkdf-memory", "1Mi", "--luks-pbkdf-time", "100")


class Machine:
    """A guest that serves, with its volumes on a disk of its own."""

    def __init__(self, guest: Guest, image: Path, progress: Progress, options: Sequence[str] = SHORT_GRACE) -> None:
        self.guest = guest
        self.options = options
        self.image = image
        self.progress = progress
        self.job: Job[served.Served] | None = None

    def begin(self) -> None:
        """After each boot."""
        self.sh(f"mkdir -p {DATA} /run/secret && mount /dev/ubda {DATA} && modprobe -a fuse loop")
        self.sh(f"printf %s {OLD} >/run/secret/CRYPTO_KEY_VALUE; printf '%s\\n' {OLD} >/run/old")
        self.sh(f"printf %s secret >/run/secret/CRYPTO_KEY_PROVIDER; printf '%s\\n' {NEW} >/run/new")

    def sh(self, script: str, check: bool = True) -> str:
        return self.guest.run("sh", "-c", script, check=check).stdout

    def command(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        argv = ("env", "PYTHONDONTWRITEBYTECODE=1", PROGRAM, *words, "--data-dir", DATA, "--output", "json")
        return self.guest.run(*argv, timeout=120, check=check)

    def serve(self, volume: str, *options: str, given: str = "") -> Job[served.Served]:
        argv = [PROGRAM, "serve", volume, "--data-dir", DATA, "--bind", self.guest.address, "--output", "json"]
        return self.guest.spawn(served.serve, argv=[*argv, *self.options, *options], given=given)

    def refused(self, volume: str, *options: str, given: str = "") -> served.Served:
        began = time.monotonic()
        outcome = self.serve(volume, *options, given=given).result()
        self.progress(f"refused after {time.monotonic() - began:.1f} s: {outcome['stderr'].strip()}")
        assert len(outcome["stderr"].splitlines()) == 1
        self.nothing_left()
        return outcome

    def serve_until_ready(self, volume: str, *options: str, given: str = "") -> Job[served.Served]:
        began = time.monotonic()
        job = self.serve(volume, *options, given=given)
        job.wait_event("ready", 90)
        self.progress(
            f"{volume} is served after {time.monotonic() - began:.1f} s: {timeline(job, job.events[0]['time'])}"
        )
        return job

    @contextlib.contextmanager
    def serving(self, volume: str, *options: str, given: str = "") -> Iterator[Job[served.Served]]:
        job = self.serve_until_ready(volume, *options, given=given)
        yield job
        assert job.finish() == {"status": 0, "stderr": ""}
        self.nothing_left()

    def nothing_left(self) -> None:
        assert self.sh("dmsetup ls; losetup --all; ls /run/share-manager 2>/dev/null", check=False).strip() in (
            "",
            "No devices found",
        )

    def export(self, volume: str) -> Export:
        return Export(self.guest.address, 2049, f"/{volume}")

    def pid(self, volume: str, name: str) -> int:
        state = json.loads(self.sh(f"cat /run/share-manager/{volume}-*/state.json"))
        return int(state["processes"][name]["pid"])

    def on_disk(self, *words: str) -> list[str]:
        """Which of these are anywhere on the machine's disk."""
        self.sh("sync")
        return images.words_in(self.image, words)

    def stored(self, volume: str) -> int:
        """Bytes on the disks of its replicas."""
        return int(self.sh(f"du --total --block-size=1 {DATA}/volumes/{volume}/replicas | tail -1").split()[0])


@pytest.fixture(scope="module")
def machine(lab: Lab, progress: Progress) -> Iterator[Machine]:
    image = lab.directory / "vault.img"
    with image.open("wb") as disk:
        disk.truncate(2 << 30)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    guest = Guest(lab, "vault", memory="512M", disks=[image])
    try:
        guest.start()
        machine = Machine(guest, image, progress)
        machine.begin()
        yield machine
    finally:
        guest.close()


def timeline(job: Job[Any], since: float) -> str:
    return " ".join(f"{event['event']} {event['time'] - since:.2f}" for event in job.events if event["time"] >= since)


def test_an_encrypted_share_through_its_life(
    machine: Machine, one: Guest, two: Guest, stalls: Stalls, progress: Progress
) -> None:
    volume = "vault"
    made = ("--encrypt", "--size", "256Mi", "--replicas", "2", *CHEAP)
    with machine.serving(volume, *made, "--allow-discards", "--passphrase-file", "/run/secret") as job:
        shown = json.loads(machine.command("status", volume).stdout)
        assert shown["encrypted"] is True
        # no process has it in its arguments or environment, none of our files has it
        assert (
            machine.sh("cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null | grep -ac 'the-[o]ld'", False)
            == "0\n"
        )
        run = machine.sh(
            "grep -rlF -D skip -e the-old /run/share-manager --exclude-dir=mnt --exclude=block", check=False
        )
        assert run == ""
        with mounted(one, machine.export(volume)) as here, mounted(two, machine.export(volume), "4.1") as there:
            # what one of the replicas gets from the next engine on is listened to
            socket = machine.sh("echo /run/share-manager/vault-*/r1.sock").strip()
            ear = machine.guest.spawn(eavesdrop.listen, path=socket, words=[WORD])
            ear.wait_event("listening")
            append = one.spawn(appender.append, path=f"{here}/log", pause=0.03)
            append.wait_event("running")
            engine = machine.pid(volume, "engine")
            killed = time.time()
            machine.guest.call(served.kill, pids=[engine])
            job.wait_event("ready", 60, after=killed)
            append.wait_event("progress", 60, after=time.time())
            progress(f"the engine is killed: {timeline(job, killed)}")
            two.run("sh", "-c", f"yes '{WORD}' | head -c 4000000 >{there}/known && sync {there}/known")
            changed = machine.command(
                *("volume", "passphrase", volume, "--passphrase-file", "/run/secret"),
                *("--new-passphrase-file", "/run/new"),
            )
            assert json.loads(changed.stdout)["key_slots_removed"] == 1
            grown = machine.command("volume", "resize", volume, "320Mi")
            assert json.loads(grown.stdout)["filesystem"] == "grown"
            again = machine.command("volume", "resize", volume, "320Mi")
            assert json.loads(again.stdout)["filesystem"] == "full size already"
            blocks, size = map(int, two.run("stat", "-f", "-c", "%b %S", there).stdout.split())
            assert blocks * size > 250 * MIB
            before = machine.stored(volume)
            two.run("sh", "-c", f"head -c 16000000 /dev/urandom >{there}/waste && sync {there}/waste")
            assert machine.stored(volume) - before > 28 * MIB
            two.run("rm", f"{there}/waste")
            trimmed = json.loads(machine.command("volume", "trim", volume).stdout)
            assert trimmed["freed_bytes"] > 28 * MIB
            machine.command("volume", "luks-header", "backup", volume, f"{DATA}/header")
            outcome = append.finish()
            assert outcome["errors"] == []
            stall = worst_after(outcome["gaps"], killed, killed + 30)
            stalls.add("kill the engine (attached anew, encrypted, in UML)", stall)
            progress(f"{outcome['acknowledged']} records, stall {stall:.2f} s, gaps {outcome['gaps']}")
            assert two.call(appender.verify, path=f"{there}/log", acknowledged=outcome["acknowledged"]) == []
            assert "lost" not in one.kernel_log()
        device = machine.sh("losetup --list --noheadings --output NAME,BACK-FILE | grep /block").split()[0]
        test = f"cryptsetup open --test-passphrase {device} --key-file"
        assert machine.sh(f"printf %s {OLD} | {test} - || echo $?; printf %s {NEW} | {test} -; echo $?") == "2\n0\n"
        # the header is wrecked below what is unlocked
        machine.sh(f"dd if=/dev/zero of={device} bs=1M count=16 oflag=direct conv=notrunc")
        heard = ear.finish()
        assert heard["words"] == []
        assert heard["passed"] > 4_000_000
    assert machine.on_disk(WORD, OLD, NEW) == []
    assert "passphrase-file" in machine.refused(volume)["stderr"]
    machine.command("volume", "luks-header", "restore", volume, f"{DATA}/header", "--yes")
    job = machine.serve_until_ready(volume, "--passphrase-file", "-", given=f"{NEW}\n")
    with mounted(two, machine.export(volume)) as there:
        assert two.run("sh", "-c", f"head -c 23 {there}/known").stdout == WORD[:23]
        assert two.call(appender.verify, path=f"{there}/log", acknowledged=outcome["acknowledged"]) == []
    trim = machine.command("volume", "trim", volume, check=False)
    assert (trim.returncode, "--allow-discards" in trim.stderr) == (4, True)
    # killed, with the engine: what is left goes in the order of the data path
    machine.guest.call(served.kill, pids=[machine.pid(volume, name) for name in ("share-manager", "engine")])
    assert job.result()["status"] == -9
    assert machine.sh("dmsetup ls").startswith(f"sm-{volume}-")
    machine.command("stop", volume)
    machine.nothing_left()


def test_a_plain_volume_is_not_taken_for_an_encrypted_one(machine: Machine) -> None:
    plain = f"not encrypted {WORD[-8:]}"
    with machine.serving("plain", "--size", "64Mi", "--replicas", "1"):
        data = machine.sh("echo /run/share-manager/plain-*/mnt/data").strip()
        machine.sh(f"yes '{plain}' | head -c 1000000 >{data}/known; sync -f {data}")
    # the search finds what there is to find
    assert machine.on_disk(plain) == [plain]
    said = machine.refused("plain", "--passphrase-file", "/run/old", "--encrypt")
    assert (said["status"], "is not encrypted" in said["stderr"]) == (4, True)
    assert machine.on_disk(plain) == [plain]
