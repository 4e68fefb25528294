from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from share_manager.paths import VolumePaths
from share_manager.share import leftovers
from share_manager.share.leftovers import Leftovers, Step, classify, plan
from share_manager.share.procfs import ProcessId, identify, is_alive, is_dying, parse_mounts, start_time
from share_manager.share.state import RunState, StateFile, read_state

P = ProcessId(7, 1)

found = st.builds(
    Leftovers,
    ganesha=st.sampled_from([(), (P,)]),
    engine=st.sampled_from([(), (P,)]),
    replicas=st.sampled_from([(), (P,), (P, P)]),
    helpers=st.sampled_from([(), (P,)]),
    mounts=st.sampled_from([(), (Path("/run/x/mnt"),)]),
    mappings=st.sampled_from([(), ("sm-x-1",)]),
    loops=st.sampled_from([(), ("/dev/loop0",)]),
    block_file=st.booleans(),
)


def before(steps: list[Step], first: Step, second: Step) -> bool:
    return first not in steps or second not in steps or steps.index(first) < steps.index(second)


@given(found)
def test_whatever_died_the_rest_leaves_in_the_order_of_the_data_path(left: Leftovers) -> None:
    steps = plan(left)
    assert len(steps) == len(set(steps))
    for ganesha in (Step.ASK_GANESHA, Step.KILL_GANESHA):
        for later in (Step.ABORT_BLOCK_FILE, Step.UNMOUNT, Step.DETACH_LOOPS, Step.ASK_ENGINE, Step.ASK_REPLICAS):
            assert before(steps, ganesha, later)
    assert before(steps, Step.UNMOUNT, Step.CLOSE_MAPPINGS)
    assert before(steps, Step.UNMOUNT, Step.DETACH_LOOPS)
    assert before(steps, Step.CLOSE_MAPPINGS, Step.DETACH_LOOPS)
    assert before(steps, Step.DETACH_LOOPS, Step.ASK_ENGINE)
    assert before(steps, Step.ASK_ENGINE, Step.UNMOUNT_BLOCK_FILE)
    assert before(steps, Step.ASK_ENGINE, Step.ASK_REPLICAS)
    # nothing is left out
    assert (Step.UNMOUNT in steps) == bool(left.mounts)
    assert (Step.CLOSE_MAPPINGS in steps) == bool(left.mappings)
    assert (Step.DETACH_LOOPS in steps) == bool(left.loops)
    assert (Step.UNMOUNT_BLOCK_FILE in steps) == left.block_file
    assert bool(left.ganesha) == bool({Step.ASK_GANESHA, Step.KILL_GANESHA} & set(steps))


@given(found)
def test_requests_fail_only_when_nobody_can_see_it(left: Leftovers) -> None:
    steps = plan(left)
    if Step.ABORT_BLOCK_FILE in steps:
        assert not (left.engine and left.replicas)
        assert Step.ASK_GANESHA not in steps
    if left.engine and left.replicas and left.ganesha:
        assert Step.ASK_GANESHA in steps


def test_nothing_left_needs_nothing() -> None:
    assert plan(Leftovers()) == []


@pytest.mark.parametrize(
    ("argv", "kind"),
    [
        (["/usr/bin/python3", "-m", "engine", "/run/x/engine.json"], "engine"),
        (["/usr/bin/python3", "-m", "engine.replica", "/run/x/r1.json"], "replicas"),
        (["/usr/bin/ganesha.nfsd", "-F", "-f", "/run/x/nfs/ganesha.conf"], "ganesha"),
        (["/usr/bin/dbus-daemon", "--config-file=/run/x/nfs/bus.conf"], "helpers"),
        (["mkfs.ext4", "/dev/loop3"], "helpers"),
        (["tail", "-f", "/run/x/nfs/ganesha.log"], None),
        (["vim", "/run/x/engine.json"], None),
    ],
)
def test_only_our_own_processes_are_ended(argv: list[str], kind: str | None) -> None:
    assert classify(argv) == kind


def test_mountinfo() -> None:
    text = (
        "36 27 7:0 / /run/share-manager/a\\040b/mnt rw,nosuid - ext4 /dev/loop0 rw,dirsync\n"
        "37 36 7:1 / /mnt ro shared:1 master:2 - xfs /dev/loop1 rw,emergency_ro\n"
    )
    one, two = parse_mounts(text)
    assert (one.target, one.fstype, one.source) == (Path("/run/share-manager/a b/mnt"), "ext4", "/dev/loop0")
    assert one.options == {"rw", "nosuid", "dirsync"}
    assert {"ro", "emergency_ro"} <= two.options


def test_somebody_elses_mount_may_have_any_name() -> None:
    (mount,) = parse_mounts("36 27 7:0 / /mnt/\u0100\\040b\udcff rw - ext4 /dev/loop0 rw\n")
    assert mount.target == Path("/mnt/\u0100 b\udcff")


def test_a_reused_pid_is_somebody_else() -> None:
    me = identify(os.getpid())
    assert me is not None
    assert is_alive(me)
    assert not is_alive(ProcessId(me.pid, me.start + 1))
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        process = identify(child.pid)
        assert process is not None
        leftovers.send(ProcessId(process.pid, process.start + 1), signal.SIGKILL)
        assert child.poll() is None
        leftovers.send(process, signal.SIGKILL)
        child.wait()
    assert start_time(child.pid) is None
    assert not is_alive(process)


def test_a_state_file_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    file = StateFile(tmp_path / "state.json", RunState(volume="v", data_dir="/d", kind="serve"))
    file.process("engine", os.getpid())
    file.update(device="/dev/loop9")
    state = read_state(tmp_path / "state.json")
    assert state is not None
    assert state.processes["engine"].pid == os.getpid()
    assert state.device == "/dev/loop9"
    file.process("engine", None)
    assert read_state(tmp_path / "state.json") == file.state
    (tmp_path / "state.json").write_text('{"volume": 3')
    assert read_state(tmp_path / "state.json") is None
    assert read_state(tmp_path / "none.json") is None


def test_socket_paths_fit_the_longest_name(tmp_path: Path) -> None:
    paths = VolumePaths(tmp_path, "v" * 63)
    for socket in (paths.control, paths.engine_control, paths.replica_socket("r9"), paths.ganesha / "bus.sock"):
        assert len(os.fsencode(socket)) < 108


def test_volumes_of_two_data_directories_do_not_meet(tmp_path: Path) -> None:
    assert VolumePaths(tmp_path / "a", "v").run != VolumePaths(tmp_path / "b", "v").run


def test_a_killed_process_whose_threads_linger_is_told_from_a_living_one() -> None:
    living = subprocess.Popen(["sleep", "60"])
    try:
        assert not is_dying(living.pid)
        living.kill()
        # not reaped yet: a zombie, as a process is whose last thread still waits for its disk
        deadline = time.monotonic() + 10
        while not is_dying(living.pid):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        living.kill()
        living.wait()
    assert not is_dying(living.pid)
