"""What applications do with files, through a real kernel client: done on one client, looked at from another."""

from __future__ import annotations

import errno
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.conftest import Progress
from tests.lab.guest import Guest
from tests.lab.mounts import mounted
from tests.lab.network import Lab
from tests.lab.share import Share
from tests.lab.workloads import locks, names, sharedlog, tree

MIB = 1 << 20

_numbers = itertools.count(1)


@dataclass
class Place:
    """The same directory of a share, on two clients that mounted it with the same version."""

    one: Guest
    two: Guest
    here: str
    there: str
    version: str


@pytest.fixture(scope="module")
def share(lab: Lab, progress: Progress) -> Iterator[Share]:
    share = Share(lab, "files", size="512Mi")
    try:
        yield share.start()
    finally:
        began = time.monotonic()
        share.close()
        progress(f"files: stopped in {time.monotonic() - began:.1f} s")


@pytest.fixture(scope="module", params=["4.2", "4.1"])
def mounts(
    request: pytest.FixtureRequest, share: Share, clients: tuple[Guest, Guest], progress: Progress
) -> Iterator[tuple[str, str, str]]:
    version: str = request.param
    one, two = clients
    with mounted(one, share.export, version) as here, mounted(two, share.export, version) as there:
        progress(f"files: both clients have mounted with vers={version}")
        yield version, here, there


@pytest.fixture
def place(
    request: pytest.FixtureRequest, mounts: tuple[str, str, str], clients: tuple[Guest, Guest]
) -> Iterator[Place]:
    one, two = clients
    version, here, there = mounts
    name = f"{request.node.originalname}-{next(_numbers)}"
    one.run("mkdir", f"{here}/{name}")
    yield Place(one, two, f"{here}/{name}", f"{there}/{name}", version)
    for job in [*one.jobs, *two.jobs]:
        job.kill()


def test_the_mount_has_the_version_that_was_asked_for(place: Place) -> None:
    lines = place.one.run("cat", "/proc/self/mounts").stdout.splitlines()
    mount = next(line for line in lines if place.here.startswith(f"{line.split()[1]}/") and " nfs4 " in line)
    assert f"vers={place.version}," in mount


def test_a_tree_of_files_reads_back_from_another_client(place: Place) -> None:
    digests = place.one.call(tree.write, directory=place.here, seed=11, files=60, largest=300_000)
    assert place.two.call(tree.verify, directory=place.there, digests=digests) == []
    place.one.call(tree.drop_caches)
    assert place.one.call(tree.verify, directory=place.here, digests=digests) == []


def test_a_large_file_reads_back_after_the_caches_are_dropped(place: Place, progress: Progress) -> None:
    size = 48 * MIB
    began = time.monotonic()
    digest = place.one.call(tree.write_large, path=f"{place.here}/large", seed=5, size=size)
    written = time.monotonic()
    place.one.call(tree.drop_caches)
    assert place.two.call(tree.digest, path=f"{place.there}/large") == digest
    read = time.monotonic()
    assert place.one.call(tree.digest, path=f"{place.here}/large") == digest
    rates = (
        f"{size / MIB / (written - began):.0f} MiB/s written and synced, {size / MIB / (read - written):.0f} MiB/s read"
    )
    progress(f"files: large file, {rates}")
    place.one.run("rm", f"{place.here}/large")


def test_renaming_over_a_file_keeps_the_open_one(place: Place) -> None:
    seen = place.one.call(names.rename_over, directory=place.here)
    assert seen == {"name": "new", "open": "old", "source_exists": False}
    assert place.two.call(names.read_text, path=f"{place.there}/old") == "new"
    assert place.two.call(names.listing, directory=place.there) == ["old"]


def test_an_unlinked_file_stays_usable_while_it_is_open(place: Place) -> None:
    assert place.one.call(names.open_unlinked, directory=place.here) == {"gone": True, "content": "before after"}
    assert place.two.call(names.listing, directory=place.there) == []


def test_hard_links_and_symlinks(place: Place) -> None:
    seen = place.one.call(names.links, directory=place.here)
    assert seen == {
        "links": 2,
        "content": "changed",
        "same": True,
        "survivor": "changed",
        "links_after": 1,
        "through_symlink": "again",
    }
    relative = place.two.call(names.facts, path=f"{place.there}/relative")
    assert (relative["kind"], relative["target"]) == ("l", "original")
    assert place.two.call(names.facts, path=f"{place.there}/dangling")["target"] == "nowhere/at all"
    assert place.two.call(names.read_text, path=f"{place.there}/relative") == "again"


def test_numeric_owners_and_permission_bits_travel(place: Place) -> None:
    place.one.call(names.owners, directory=place.here)
    for name, mode, kind in (
        ("plain", "0o640", "-"),
        ("none", "0o0", "-"),
        ("setuid", "0o4755", "-"),
        ("setgid", "0o2755", "-"),
    ):
        found = place.two.call(names.facts, path=f"{place.there}/{name}")
        assert (found["uid"], found["gid"], found["mode"], found["kind"]) == (1234, 5678, mode, kind), name
    found = place.two.call(names.facts, path=f"{place.there}/sticky")
    assert (found["uid"], found["gid"], found["mode"], found["kind"]) == (4294967293, 70000, "0o1777", "d")


def test_permission_bits_bind_other_users(place: Place) -> None:
    place.one.call(names.owners, directory=place.here)
    asked = [("read", f"{place.there}/plain"), ("write", f"{place.there}/plain"), ("create", f"{place.there}/mine")]
    denied = errno.EACCES
    assert place.two.call(names.attempts, operations=asked, uid=1234, gid=1234) == [0, 0, denied]
    assert place.two.call(names.attempts, operations=asked, uid=4321, gid=5678) == [0, denied, denied]
    assert place.two.call(names.attempts, operations=asked, uid=4321, gid=4321) == [denied, denied, denied]


def test_sparse_files_take_no_space_for_holes(place: Place) -> None:
    seen = place.one.call(names.sparse, path=f"{place.here}/sparse", size=64 * MIB, at=32 * MIB)
    assert seen["size"] == 64 * MIB
    assert seen["hole_is_zero"]
    assert seen["data"]
    assert seen["blocks"] * 512 < MIB
    if place.version == "4.2":
        assert seen["first_data"] == 32 * MIB
        assert 32 * MIB < seen["hole_after"] < 33 * MIB
    assert place.two.call(names.facts, path=f"{place.there}/sparse")["blocks"] * 512 < MIB


def test_a_hole_can_be_punched_where_the_protocol_has_it(place: Place) -> None:
    seen = place.one.call(names.deallocate, path=f"{place.here}/punched", offset=MIB, length=MIB)
    if place.version == "4.2":
        assert seen["errno"] == 0
        assert seen["zero"]
        assert seen["after"] < seen["before"]
    else:
        assert seen["errno"] == errno.EOPNOTSUPP


def test_extended_attributes_work_or_are_refused(place: Place, progress: Progress) -> None:
    seen = place.one.call(names.attributes, path=f"{place.here}/attributes")
    progress(f"files: vers={place.version} extended attributes: {seen}")
    if seen["supported"]:
        assert seen == {"supported": True, "value": "green", "names": ["user.colour"], "after": []}


def test_a_directory_of_many_entries_lists_each_once(place: Place, progress: Progress) -> None:
    # each create waits for the disks: this many once is enough
    count = 2000 if place.version == "4.2" else 200
    began = time.monotonic()
    jobs = [
        guest.spawn(names.many, directory=directory, tag=guest.name, count=count // 2)
        for guest, directory in ((place.one, place.here), (place.two, place.there))
    ]
    for job in jobs:
        job.result()
    progress(f"files: {count / (time.monotonic() - began):.0f} files created per second")
    expected = {"named": count, "different": count, "usable": count}
    assert place.two.call(names.list_and_stat, directory=place.there) == expected


def test_locks_of_overlapping_ranges_exclude_each_other_and_others_do_not(place: Place) -> None:
    place.one.call(names.write_text, path=f"{place.here}/ranges", text="x" * 300)
    holder = place.one.spawn(locks.hold, path=f"{place.here}/ranges", start=100, length=100)
    holder.wait_event("held")
    taken = {"getlk": True, "setlk": True}
    free = {"getlk": False, "setlk": False}
    for start, length, expected in ((100, 100, taken), (0, 101, taken), (199, 1, taken), (0, 0, taken), (0, 100, free)):
        assert place.two.call(locks.probe, path=f"{place.there}/ranges", start=start, length=length) == expected
    assert place.two.call(locks.probe, path=f"{place.there}/ranges", start=200, length=0) == free
    holder.finish()
    assert place.two.call(locks.probe, path=f"{place.there}/ranges", start=100, length=100) == free


def test_shared_locks_share_and_exclude_writers(place: Place) -> None:
    place.one.call(names.write_text, path=f"{place.here}/shared", text="x")
    holder = place.one.spawn(locks.hold, path=f"{place.here}/shared", shared=True)
    holder.wait_event("held")
    assert place.two.call(locks.try_shared, path=f"{place.there}/shared")
    assert place.two.call(locks.probe, path=f"{place.there}/shared") == {"getlk": True, "setlk": True}
    holder.finish()


def test_a_blocking_lock_waits_until_the_holder_lets_go(place: Place) -> None:
    holder = place.one.spawn(locks.hold, path=f"{place.here}/blocking")
    holder.wait_event("held")
    waiter = place.two.spawn(locks.hold, path=f"{place.there}/blocking")
    waiter.wait_event("asking")
    assert place.two.call(locks.probe, path=f"{place.there}/blocking")["setlk"]
    assert not waiter.done
    holder.finish()
    waiter.wait_event("held", timeout=40)
    assert place.one.call(locks.probe, path=f"{place.here}/blocking") == {"getlk": True, "setlk": True}
    waiter.finish()


def test_a_lock_dies_with_the_process_that_held_it(place: Place) -> None:
    holder = place.one.spawn(locks.hold, path=f"{place.here}/orphan")
    holder.wait_event("held")
    holder.kill()
    assert place.two.call(locks.probe, path=f"{place.there}/orphan") == {"getlk": False, "setlk": False}


def test_two_clients_count_under_a_lock_without_losing_one(place: Place) -> None:
    rounds = 60
    jobs = [
        guest.spawn(locks.count, path=f"{directory}/counter", rounds=rounds, think=0.002)
        for guest, directory in ((place.one, place.here), (place.two, place.there))
    ]
    for job in jobs:
        job.result()
    assert int(place.one.call(names.read_text, path=f"{place.here}/counter")) == 2 * rounds


@pytest.mark.parametrize("pieces", [False, True], ids=["whole lines", "lines in pieces"])
def test_three_writers_share_a_log(place: Place, pieces: bool) -> None:
    name = f"log-{pieces}"
    count = 40
    jobs = {
        writer: guest.spawn(sharedlog.write, path=f"{directory}/{name}", writer=writer, count=count, pieces=pieces)
        for writer, guest, directory in (
            ("pod-a", place.one, place.here),
            ("pod-b", place.one, place.here),
            ("pod-c", place.two, place.there),
        )
    }
    for writer, job in jobs.items():
        written = job.result()
        assert (written["lines"], written["errors"]) == (count, []), writer
    expected = dict.fromkeys(jobs, count)
    assert place.two.call(sharedlog.verify, path=f"{place.there}/{name}", written=expected) == []
    assert place.one.call(sharedlog.verify, path=f"{place.here}/{name}", written=expected) == []


def test_version_40_mounts_reads_writes_and_locks(share: Share, one: Guest, two: Guest) -> None:
    with mounted(one, share.export, "4.0") as here, mounted(two, share.export, "4.0") as there:
        one.run("mkdir", f"{here}/v40")
        digests = one.call(tree.write, directory=f"{here}/v40", seed=3, files=12, largest=100_000)
        assert two.call(tree.verify, directory=f"{there}/v40", digests=digests) == []
        holder = one.spawn(locks.hold, path=f"{here}/lock-40")
        holder.wait_event("held")
        assert two.call(locks.probe, path=f"{there}/lock-40") == {"getlk": True, "setlk": True}
        holder.finish()
