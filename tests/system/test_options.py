"""What the options of `serve` do, as a client sees it."""

from __future__ import annotations

import contextlib
import errno
import signal
import time

import pytest

from tests.conftest import Progress
from tests.lab import images
from tests.lab.guest import Guest, GuestError
from tests.lab.mounts import Export, mount, mounted
from tests.lab.workloads import appender, locks, names, pressure, tree
from tests.system.conftest import SHORT_GRACE, MakeShare

MIB = 1 << 20


def test_a_full_volume_says_so_and_recovers(make_share: MakeShare, one: Guest, two: Guest, progress: Progress) -> None:
    share = make_share("full", size="128Mi").start()
    with mounted(one, share.export) as here, mounted(two, share.export, "4.1") as there:
        one.call(names.write_text, path=f"{here}/kept", text="kept")
        began = time.monotonic()
        filled = one.call(pressure.fill, path=f"{here}/filler", most=256 * MIB)
        progress(f"full: {filled['written'] // MIB} MiB until {filled['errno']}, {time.monotonic() - began:.1f} s")
        assert filled["errno"] == "ENOSPC"
        assert filled["written"] > 50 * MIB
        with pytest.raises(GuestError) as caught:
            two.call(tree.write_large, path=f"{there}/too-much", seed=1, size=8 * MIB)
        assert caught.value.errno == errno.ENOSPC
        # clients come, lock and go all the same: their records have room of their own
        holder = two.spawn(locks.hold, path=f"{there}/kept")
        holder.wait_event("held")
        assert one.call(locks.probe, path=f"{here}/kept")["setlk"]
        holder.finish()
        assert share.status().state == "running"

        one.run("rm", f"{here}/filler", f"{here}/too-much")
        digest = two.call(tree.write_large, path=f"{there}/again", seed=2, size=16 * MIB)
        assert one.call(tree.digest, path=f"{here}/again") == digest
        assert one.call(names.read_text, path=f"{here}/kept") == "kept"
    share.wait_settled()
    directories = share.replica_directories()
    share.stop()
    assert images.differences(directories) == []
    images.check_ext4(images.head(directories[0]))


def test_read_only_reads_and_refuses_every_change(make_share: MakeShare, one: Guest) -> None:
    share = make_share("readonly", size="128Mi").start()
    with mounted(one, share.export) as here:
        one.call(names.write_text, path=f"{here}/file", text="as it was")
    share.stop()
    share.options = ("--read-only",)
    share.start()
    with mounted(one, share.export) as here:
        assert one.call(names.read_text, path=f"{here}/file") == "as it was"
        asked = [("write", f"{here}/file"), ("create", f"{here}/new"), ("mkdir", f"{here}/dir")]
        assert one.call(names.attempts, operations=asked) == [errno.EROFS] * 3
        assert one.run("rm", "-f", f"{here}/file", check=False).returncode != 0
        assert one.call(names.read_text, path=f"{here}/file") == "as it was"
    share.stop()
    share.options = ()
    share.start()
    with mounted(one, share.export) as here:
        assert one.call(names.attempts, operations=[("write", f"{here}/file")]) == [0]


@pytest.mark.parametrize(
    ("squash", "root", "user"),
    [("none", (0, 0), (1234, 1234)), ("root", (65534, 65534), (1234, 1234)), ("all", (65534, 65534), (65534, 65534))],
)
def test_squash_maps_who_it_says(
    make_share: MakeShare, one: Guest, squash: str, root: tuple[int, int], user: tuple[int, int]
) -> None:
    share = make_share(f"squash-{squash}", size="128Mi", options=("--squash", squash, "--root-mode", "0777")).start()
    with mounted(one, share.export) as here:
        asked = [("create", f"{here}/by-root")]
        assert one.call(names.attempts, operations=asked) == [0]
        assert one.call(names.attempts, operations=[("create", f"{here}/by-user")], uid=1234, gid=1234) == [0]
        for name, expected in (("by-root", root), ("by-user", user)):
            found = one.call(names.facts, path=f"{here}/{name}")
            assert (found["uid"], found["gid"]) == expected, name
        one.run("chown", "4242:4242", f"{here}/by-root", check=False)
        found = one.call(names.facts, path=f"{here}/by-root")
        assert (found["uid"], found["gid"]) == ((4242, 4242) if squash == "none" else root)


def test_allow_lets_in_who_it_says_and_nobody_else(make_share: MakeShare, one: Guest, two: Guest) -> None:
    share = make_share("allow", size="128Mi", options=("--allow", f"{one.address}/32")).start()
    with mounted(one, share.export) as here:
        one.call(names.write_text, path=f"{here}/secret", text="x")
        for version in ("4.2", "4.1"):
            with pytest.raises(GuestError, match="mount"):
                mount(two, share.export, version)
        # the root of the server's name space may be there, the share may not
        with contextlib.suppress(GuestError), mounted(two, Export(share.export.address, share.port, "/")) as top:
            listed = two.call(names.listing, directory=top)
            asked = [("list", f"{top}{share.export.path}"), ("read", f"{top}{share.export.path}/secret")]
            outcomes = two.call(names.attempts, operations=asked)
            assert (listed, 0 in outcomes) == ([], False)
        assert one.call(names.read_text, path=f"{here}/secret") == "x"
    share.stop()
    share.options = ("--allow", f"{two.address}/32", "--allow", f"{one.address}/32")
    share.start()
    for guest in (one, two):
        with mounted(guest, share.export) as here:
            assert guest.call(names.read_text, path=f"{here}/secret") == "x"


def test_two_volumes_side_by_side_stay_apart(make_share: MakeShare, one: Guest) -> None:
    first = make_share("left", size="128Mi", options=SHORT_GRACE)
    second = make_share("right", size="128Mi", options=SHORT_GRACE, port=2050, data_dir=first.data_dir)
    first.spawn()
    second.start()
    first.wait_event("ready")
    with mounted(one, first.export) as here, mounted(one, second.export) as there:
        one.call(names.write_text, path=f"{here}/name", text="left")
        one.call(names.write_text, path=f"{there}/name", text="right")
        holder = one.spawn(locks.hold, path=f"{here}/name")
        holder.wait_event("held")
        assert one.call(locks.probe, path=f"{there}/name") == {"getlk": False, "setlk": False}
        second.signal(["ganesha"], signal.SIGKILL)
        assert one.call(names.read_text, path=f"{here}/name") == "left"
        one.call(tree.drop_caches)
        assert one.call(names.read_text, path=f"{there}/name") == "right"
        holder.finish()
    first.stop()
    assert second.status().state == "running"
    # before the data directory, which is the first one's, is removed
    second.stop()


def test_xfs_serves_and_survives_its_engine(make_share: MakeShare, one: Guest, two: Guest) -> None:
    share = make_share("xfs", size="512Mi", options=("--fs", "xfs", *SHORT_GRACE)).start()
    with mounted(one, share.export) as here, mounted(two, share.export, "4.1") as there:
        digests = one.call(tree.write, directory=here, seed=21, files=25, largest=200_000)
        one.run("sync")
        share.signal(["engine"], signal.SIGKILL)
        two.call(tree.drop_caches)
        assert two.call(tree.verify, directory=there, digests=digests) == []
    share.wait_settled()
    directories = share.replica_directories()
    share.stop()
    assert images.differences(directories) == []
    share.start()
    with mounted(two, share.export) as there:
        assert two.call(tree.verify, directory=there, digests=digests) == []


def test_stop_and_serve_again_keeps_data_locks_and_open_files(
    make_share: MakeShare, one: Guest, two: Guest, progress: Progress
) -> None:
    share = make_share("again").start()
    with mounted(one, share.export) as here, mounted(two, share.export, "4.1") as there:
        digests = one.call(tree.write, directory=f"{here}/tree", seed=9, files=25, largest=100_000)
        job = one.spawn(appender.append, path=f"{here}/log")
        job.wait_event("running")
        watch = two.spawn(locks.watch, path=f"{there}/log")
        watch.wait_event("watching")
        stopped = time.time()
        share.stop()
        share.start()
        back = time.time()
        job.wait_event("progress", timeout=60, after=back)
        assert two.call(tree.verify, directory=f"{there}/tree", digests=digests) == []
        share.wait_settled()
        watched, outcome = watch.finish(), job.finish()
        assert outcome["errors"] == []
        assert (watched["violations"], watched["errors"]) == ([], [])
        assert watched["denied"] > 0
        assert two.call(appender.verify, path=f"{there}/log", acknowledged=outcome["acknowledged"]) == []
        worst = max(gap["end"] - gap["start"] for gap in outcome["gaps"])
        progress(f"again: down for {back - stopped:.1f} s, the client stood still for {worst:.1f} s")
    assert "lost" not in one.kernel_log()


def test_root_owner_and_mode_are_what_was_asked_for(make_share: MakeShare, one: Guest) -> None:
    share = make_share("owner", size="128Mi", options=("--root-owner", "1234:5678", "--root-mode", "0750")).start()
    with mounted(one, share.export) as here:
        found = one.call(names.facts, path=here)
        assert (found["uid"], found["gid"], found["mode"]) == (1234, 5678, "0o750")
        assert one.call(names.listing, directory=here) == []
        asked = [("create", f"{here}/mine")]
        assert one.call(names.attempts, operations=asked, uid=4321, gid=4321) == [errno.EACCES]
        assert one.call(names.attempts, operations=asked, uid=1234, gid=1234) == [0]


def test_the_lock_of_a_client_that_died_is_free_after_its_lease(
    make_share: MakeShare, one: Guest, two: Guest, progress: Progress
) -> None:
    share = make_share("dead-client", size="128Mi", options=SHORT_GRACE).start()
    with mounted(one, share.export) as here:
        there = mount(two, share.export, "4.1")
        two.spawn(locks.hold, path=f"{there}/held").wait_event("held")
        assert one.call(locks.probe, path=f"{here}/held") == {"getlk": True, "setlk": True}
        two.power_cut()
        began = time.monotonic()
        waiter = one.spawn(locks.hold, path=f"{here}/held")
        waiter.wait_event("held", timeout=60)
        progress(f"dead client: its lock was free after {time.monotonic() - began:.1f} s")
        waiter.finish()
    share.stop(how=signal.SIGINT)
