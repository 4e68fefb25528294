"""A share that has its network namespace to itself: who gets in, as whom, and for how long, with real clients."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from pathlib import Path

import pytest
import trio

from engine.controller.driver import attach
from engine.record import FileRecordStore, bump_epoch
from engine.secret import read_secret
from share_manager.share.network import ruleset
from share_manager.share.right import RightOptions
from tests.conftest import Progress
from tests.lab.guest import Guest, GuestError
from tests.lab.mounts import mounted
from tests.lab.network import SUBNET
from tests.lab.share import Share
from tests.lab.stalls import Stalls, worst_after
from tests.lab.workloads import appender, names
from tests.system.conftest import SHORT_GRACE, MakeShare

GATED = (*SHORT_GRACE, "--network", "here")
RIGHT = RightOptions()


def allow(share: Share, *networks: str) -> None:
    done = share.command("allow", share.volume, *(("--set", *networks) if networks else ("--everyone",)))
    assert done.returncode == 0, done.stderr


def addresses(share: Share) -> set[str]:
    return {client["address"] for client in share.status().clients}


def test_who_may_use_it_changes_while_it_serves(make_share: MakeShare, one: Guest, two: Guest) -> None:
    """In a namespace of its own, with an address on the clients' network."""
    address = f"{SUBNET}.200"
    own = ("--network", "own", "--address", f"{address}/24", "--bridge", "br0")
    share = make_share("allow", size="128Mi", options=(*SHORT_GRACE, *own)).start()
    share.export = dataclasses.replace(share.export, address=address)
    with mounted(one, share.export) as here:
        one.call(names.write_text, path=f"{here}/file", text="one")
        allow(share, f"{one.address}/32")
        words = f"vers=4.2,port={share.export.port},retry=0"
        with pytest.raises(GuestError):
            two.run("mkdir", "-p", "/mnt/refused")
            two.run(
                "timeout", "-s", "KILL", "2", "mount", "-t", "nfs", "-o", words, share.export.source, "/mnt/refused"
            )
        one.call(names.write_text, path=f"{here}/file", text="still")
        allow(share)
        with mounted(two, share.export, "4.1") as there:
            assert two.call(names.read_text, path=f"{there}/file") == "still"
            assert addresses(share) == {one.address, two.address}
            # one that has mounted it waits, and sees no error, when it is not allowed for a while
            allow(share, f"{one.address}/32")
            job = two.spawn(names.write_text, path=f"{there}/late", text="two")
            one.call(names.write_text, path=f"{here}/file", text="meanwhile")
            assert not job.done
            allow(share, f"{one.address}/32", f"{two.address}/32")
            job.result()
            assert one.call(names.read_text, path=f"{here}/late") == "two"
    share.stop()


def test_a_client_whose_address_changes_keeps_its_lock(make_share: MakeShare, one: Guest, progress: Progress) -> None:
    share = make_share("address", size="128Mi", options=GATED).start()
    other = f"{one.address}1"
    with mounted(one, share.export, "4.1") as here:
        job = one.spawn(appender.append, path=f"{here}/log")
        job.wait_event("running")
        assert addresses(share) == {one.address}
        device = one.run(
            "sh", "-c", f"ip -o route get {share.lab.server} | sed 's/.* dev \\([^ ]*\\).*/\\1/'"
        ).stdout.strip()
        one.run("ip", "address", "add", f"{other}/24", "dev", device)
        try:
            # connections from now on come from there
            one.run("ip", "route", "add", share.lab.server, "dev", device, "src", other)
            before = share.status().pids()["ganesha"]
            os.kill(before, signal.SIGKILL)
            killed = time.time()
            share.wait_status("with a new ganesha", lambda status: status.pids().get("ganesha") not in (None, before))
            job.wait_event("progress", timeout=60, after=killed + 1)
            settled = share.wait_settled()
            assert other in {client["address"] for client in settled.clients}
            outcome = job.finish()
        finally:
            one.run("ip", "route", "delete", share.lab.server, "dev", device, check=False)
            one.run("ip", "address", "delete", f"{other}/24", "dev", device, check=False)
        progress(
            f"address changed: the client stood still for {worst_after(outcome['gaps'], killed, time.time()):.2f} s"
        )
        assert outcome["errors"] == []
        assert "lost" not in one.kernel_log()
        assert one.call(appender.verify, path=f"{here}/log", acknowledged=outcome["acknowledged"]) == []
    share.stop()


def test_only_the_share_manager_is_stopped_and_another_one_takes_over(
    make_share: MakeShare, one: Guest, stalls: Stalls, progress: Progress
) -> None:
    """Engine, replicas and ganesha go on; but nobody renews the gate: the kernel shuts it before others may serve."""
    share = make_share("stopped", size="128Mi", options=GATED).start()
    with mounted(one, share.export) as here:
        job = one.spawn(appender.append, path=f"{here}/log")
        job.wait_event("running")
        pids = share.status().pids()
        os.kill(pids["share-manager"], signal.SIGSTOP)
        stopped = time.time()
        try:
            older = trio.run(_take_over, share)
        finally:
            taken = time.time()
            os.kill(pids["share-manager"], signal.SIGCONT)
        # the new holder's engine was refused nothing, and the old one leaves for good
        assert share.wait_end() == 4
        assert [event["event"] for event in share.events].count("failed") == 1
        share.start()
        job.wait_event("progress", timeout=60, after=time.time())
        outcome = job.finish()
        (silent,) = [gap for gap in outcome["gaps"] if gap["end"] > taken]
        progress(
            f"stopped: silent {silent['start'] - stopped:.2f} s later, another one could serve "
            f"{taken - stopped:.2f} s later, {older:.2f} s after the last confirmation"
        )
        # not one record was acknowledged by the old one after the new one could serve
        assert silent["start"] < stopped + RIGHT.lasts + ruleset.PERMIT + 0.1
        assert silent["start"] < taken
        stalls.add("share manager stopped, taken over", silent["end"] - silent["start"])
        assert outcome["errors"] == []
        assert one.call(appender.verify, path=f"{here}/log", acknowledged=outcome["acknowledged"]) == []
    share.stop()


async def _take_over(share: Share) -> float:
    """Attach as the next epoch, and wait as a holder on another node has to; seconds from the last confirmation."""
    directory = Path(share.data_dir, "volumes", share.volume)
    store = FileRecordStore(directory / "record.json")
    # its node is slow to notice: the old one's engine confirms all the while
    await trio.sleep(RIGHT.lasts + 1)
    record = bump_epoch(store)
    controller = attach(store, read_secret(directory / "secret"), epoch=record.epoch, right_lasts=RIGHT.lasts)
    async with controller.running():
        with trio.fail_after(20):
            while controller.right.news().until <= time.monotonic():
                await trio.sleep(0.01)
        older = controller.right.news().older_at
        assert older is not None
        await trio.sleep(max(0.0, older + RIGHT.age - time.monotonic()))
        assert await controller.read(0, 4096)
        return time.monotonic() - older
