"""The lab proves itself: what the system tests look for is noticed when it happens."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Progress
from tests.lab import images, leftovers
from tests.lab.guest import Guest, GuestError
from tests.lab.mounts import mounted
from tests.lab.network import Lab
from tests.lab.rawganesha import RawGanesha
from tests.lab.stalls import Stalls, worst_after
from tests.lab.workloads import appender, locks, names, pressure, sharedlog, tree

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def server(lab: Lab) -> Iterator[RawGanesha]:
    server = RawGanesha(lab, "raw")
    try:
        yield server.start()
    finally:
        server.close()


def test_a_killed_server_that_keeps_its_records_loses_no_lock(server: RawGanesha, one: Guest, two: Guest) -> None:
    with mounted(one, server.export) as here, mounted(two, server.export, "4.1") as there:
        job = one.spawn(appender.append, path=f"{here}/kept")
        job.wait_event("running")
        watch = two.spawn(locks.watch, path=f"{there}/kept")
        watch.wait_event("watching")
        killed = time.time()
        server.kill()
        # an outage that nobody can miss, however quick the server
        time.sleep(1)
        server.start()
        two.call(names.write_text, path=f"{there}/after-grace", text="x")
        watched, outcome = watch.finish(), job.finish()
        assert outcome["errors"] == []
        # how long is the share manager's business; here it is ganesha's own, on whatever machine this is
        assert 1 <= worst_after(outcome["gaps"], killed, time.time()) < 30
        assert watched["denied"] > 0
        assert (watched["violations"], watched["errors"]) == ([], [])
        assert two.call(appender.verify, path=f"{there}/kept", acknowledged=outcome["acknowledged"]) == []
    assert "lost" not in one.kernel_log()


def test_a_lost_lock_is_noticed(server: RawGanesha, one: Guest, two: Guest) -> None:
    with mounted(one, server.export) as here, mounted(two, server.export) as there:
        job = one.spawn(appender.append, path=f"{here}/lost")
        job.wait_event("running")
        watch = two.spawn(locks.watch, path=f"{there}/lost")
        watch.wait_event("watching")
        server.kill()
        server.forget_clients()
        server.start()
        watch.wait_event("violation")
        job.wait_event("error")
        watched, outcome = watch.finish(), job.finish()
    assert watched["violations"] != []
    assert outcome["errors"] != []
    assert "lost 1 locks" in one.kernel_log()


def test_a_lost_record_and_a_damaged_one_are_noticed(server: RawGanesha, one: Guest, two: Guest) -> None:
    with mounted(one, server.export) as here, mounted(two, server.export) as there:
        count = one.spawn(appender.append, path=f"{here}/records").finish()["acknowledged"]
        file = server.directory / "records"
        assert appender.verify_bytes(file.read_bytes(), count) == []
        assert len(two.call(appender.verify, path=f"{there}/records", acknowledged=count + 1)) == 2
        with file.open("r+b") as damaged:
            damaged.seek(appender.RECORD // 2)
            damaged.write(b"?")
            damaged.truncate((count - 1) * appender.RECORD)
        assert len(appender.verify_bytes(file.read_bytes(), count)) == 3


def test_counters_without_a_lock_lose_additions(server: RawGanesha, one: Guest, two: Guest) -> None:
    with mounted(one, server.export) as here, mounted(two, server.export) as there:
        jobs = [
            guest.spawn(locks.count, path=f"{place}/unlocked", rounds=60, locked=False, think=0.01)
            for guest, place in ((one, here), (two, there))
        ]
        for job in jobs:
            job.result()
        assert int(Path(server.directory, "unlocked").read_text()) < 120


def test_a_shared_log_with_a_torn_or_missing_or_double_line_is_noticed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    lines = [sharedlog.line("a", number) for number in range(4)]
    log.write_bytes(b"".join(lines))
    assert sharedlog.verify(str(log), {"a": 4}) == []
    assert len(sharedlog.verify(str(log), {"a": 5})) == 1
    assert len(sharedlog.verify(str(log), {"a": 3})) == 1
    log.write_bytes(b"".join(lines) + lines[0])
    assert "2 times" in sharedlog.verify(str(log), {"a": 4})[0]
    log.write_bytes(lines[0] + lines[1][:20] + lines[2] + lines[1][20:] + lines[3])
    assert len(sharedlog.verify(str(log), {"a": 4})) == 4


def test_a_tree_with_a_difference_is_noticed(tmp_path: Path) -> None:
    digests = tree.write(str(tmp_path), seed=1, files=12, largest=20000)
    assert tree.verify(str(tmp_path), digests) == []
    (tmp_path / "top-0000").write_text("other")
    (tmp_path / "top-0005").unlink()
    (tmp_path / "more").touch()
    assert len(tree.verify(str(tmp_path), digests)) == 3


def test_replicas_that_differ_are_noticed_and_holes_are_zeros(tmp_path: Path) -> None:
    directories = [tmp_path / name for name in ("r1", "r2", "r3")]
    for directory in directories:
        directory.mkdir()
        (directory / "volume.meta").write_text('{"Head": "volume-head-000.img"}')
        with images.head(directory).open("wb") as image:
            image.truncate(8 << 20)
            image.seek(5 << 20)
            image.write(b"data")
    with images.head(directories[1]).open("r+b") as image:
        image.write(bytes(1 << 20))
    assert images.differences(directories) == []
    with images.head(directories[2]).open("r+b") as image:
        image.seek((5 << 20) + 2)
        image.write(b"?")
    assert [text.split("differ ")[1] for text in images.differences(directories)] == [
        f"from byte {(5 << 20) + 2} on, 1 blocks"
    ]
    images.head(directories[2]).write_bytes(b"short")
    assert len(images.differences(directories)) == 1


def test_unstable_writes_are_pushed_without_commit(server: RawGanesha, one: Guest, two: Guest) -> None:
    size = 4 << 20
    with mounted(one, server.export, "4.2", "write=eager") as here:
        job = one.spawn(pressure.unstable, path=f"{here}/unstable", mountpoint=here, seed=7, size=size)
        pushed = job.wait_event("pushed")
        assert pushed["after"]["WRITE"] > pushed["before"]["WRITE"]
        assert pushed["after"]["COMMIT"] == pushed["before"]["COMMIT"]
        server.kill()
        server.start()
        counted = job.finish()
    # the verifier of the new server is another one: the client sends everything again
    assert counted["after"]["WRITE"] >= 2 * (counted["pushed"]["WRITE"] - counted["before"]["WRITE"])
    assert tree.digest(str(server.directory / "unstable")) == pressure.expected_digest(7, size)


def test_a_paused_guest_answers_again(one: Guest) -> None:
    one.pause()
    try:
        with pytest.raises((GuestError, OSError)):
            one.lab.connect(one.address, 1, 0.3)
    finally:
        one.resume()
    assert one.run("hostname").stdout.startswith("one-")


def test_a_guest_survives_a_power_cut_by_booting_again(two: Guest, progress: Progress) -> None:
    two.run("touch", "/run/volatile")
    two.power_cut()
    began = time.monotonic()
    two.start()
    progress(f"lab: a guest boots in {time.monotonic() - began:.1f} s")
    assert two.run("test", "-e", "/run/volatile", check=False).returncode == 1


def test_what_fails_in_a_guest_is_told(one: Guest) -> None:
    with pytest.raises(GuestError) as caught:
        one.call(names.read_text, path="/nowhere")
    assert caught.value.errno == 2
    with pytest.raises(GuestError, match="status 1"):
        one.run("false")


EVERY_KIND = {"process", "mount", "loop device", "network namespace"}


def test_leftovers_are_found_and_removed(progress: Progress) -> None:
    lab = Lab()
    with lab:
        lab.tap()
        image = lab.directory / "image"
        image.write_bytes(bytes(1 << 20))
        place = lab.directory / "place"
        place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], check=True)
        subprocess.run(["losetup", "--find", image], check=True)
        sleeper = lab.popen(["sleep", "600"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # the process is in the namespace once nsenter has entered it
        until = time.monotonic() + 10
        while (found := {leftover.kind for leftover in lab.left()}) != EVERY_KIND and time.monotonic() < until:
            time.sleep(0.02)
        assert found == EVERY_KIND
        leftovers.remove(lab.directory, lab.mark)
        sleeper.wait(10)
        assert lab.left() == []
    lab.discard()
    assert not lab.directory.exists()


def test_two_labs_do_not_meet(lab: Lab) -> None:
    other = Lab()
    try:
        with other:
            assert other.namespace != lab.namespace
            assert other.left() != []
    finally:
        other.discard()
    assert other.left() == []
    assert lab.left() != []


def test_the_table_of_stalls_and_the_choice_of_a_gap() -> None:
    stalls = Stalls()
    gaps: list[appender.Gap] = [
        {"start": 10.0, "end": 11.0, "sequence": 1},
        {"start": 20.0, "end": 23.0, "sequence": 2},
    ]
    assert worst_after(gaps, 10.5, 15.0) == 1.0
    assert worst_after(gaps, 12.0, 15.0) == 0.0
    for seconds in (1.0, 3.0, 2.0):
        stalls.add("kill", seconds)
    assert stalls.table()[1].split() == ["kill", "3", "2.00", "3.00"]
