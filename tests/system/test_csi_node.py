"""The node plugin in a guest, called over its socket: real mounts of a real share, and what becomes of them."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Iterator

import pytest
import trio
from google.protobuf.message import Message

from share_manager.csi.node import Target
from share_manager.csi.options import resolve
from share_manager.csi.protocol import csi_pb2 as pb
from tests.conftest import Progress
from tests.lab.guest import Guest
from tests.lab.mounts import mounted
from tests.lab.plugin import NodePlugin
from tests.lab.share import Share
from tests.lab.workloads import locks, mute, names
from tests.share_manager.csi.caller import Caller, capability
from tests.system.conftest import SHORT_GRACE, MakeShare, shares

OPTIONS = resolve({}, kernel="6.1.0", read_only=False)
_places = itertools.count(1)


@pytest.fixture(scope="module")
def share(lab: object) -> Iterator[Share]:
    for make in shares(lab):  # type: ignore[arg-type]
        yield make("csi", size="128Mi", options=SHORT_GRACE).start()


@pytest.fixture
def plugin(one: Guest) -> Iterator[NodePlugin]:
    made = NodePlugin(one)
    try:
        yield made.start()
    finally:
        print(made.log)
        made.close()


@pytest.fixture
def caller(plugin: NodePlugin) -> Iterator[Caller]:
    with plugin.caller() as caller:
        yield caller


class Pod:
    """Paths of a volume on a node, as kubelet has them, and the calls about them."""

    def __init__(self, guest: Guest, caller: Caller, share: Share, options: str = OPTIONS) -> None:
        number = next(_places)
        self.guest = guest
        self.caller = caller
        self.volume = share.volume
        self.staged = f"/run/kubelet/plugins/{number}/globalmount"
        self.pods = f"/run/kubelet/pods/{number}"
        self.target = f"{self.pods}/mount"
        self.context = Target(
            server=share.export.address, port=share.export.port, share=share.export.path, options=options
        ).context()
        guest.run("mkdir", "-p", self.pods)

    def stage(self, timeout: float = 60.0) -> None:
        self.caller.call("NodeStageVolume", self.staging(), timeout)

    def staging(self, **changes: object) -> pb.NodeStageVolumeRequest:
        values: dict[str, object] = {
            "volume_id": self.volume,
            "staging_target_path": self.staged,
            "volume_capability": capability(),
            "publish_context": self.context,
        }
        return pb.NodeStageVolumeRequest(**(values | changes))  # type: ignore[arg-type]

    def publish(self, target: str = "", *, read_only: bool = False, timeout: float = 60.0) -> str:
        self.caller.call(
            "NodePublishVolume", self.publishing(target_path=target or self.target, readonly=read_only), timeout
        )
        return target or self.target

    def publishing(self, **changes: object) -> pb.NodePublishVolumeRequest:
        values: dict[str, object] = {
            "volume_id": self.volume,
            "staging_target_path": self.staged,
            "target_path": self.target,
            "volume_capability": capability(),
            "publish_context": self.context,
        }
        return pb.NodePublishVolumeRequest(**(values | changes))  # type: ignore[arg-type]

    def unpublish(self, target: str = "", timeout: float = 60.0) -> None:
        request = pb.NodeUnpublishVolumeRequest(volume_id=self.volume, target_path=target or self.target)
        self.caller.call("NodeUnpublishVolume", request, timeout)

    def unstaging(self) -> pb.NodeUnstageVolumeRequest:
        return pb.NodeUnstageVolumeRequest(volume_id=self.volume, staging_target_path=self.staged)

    def unstage(self, timeout: float = 60.0) -> None:
        self.caller.call("NodeUnstageVolume", self.unstaging(), timeout)

    def stats(self, place: str = "", timeout: float = 60.0) -> dict[int, pb.VolumeUsage]:
        request = pb.NodeGetVolumeStatsRequest(volume_id=self.volume, volume_path=place or self.target)
        return {one.unit: one for one in self.caller.call("NodeGetVolumeStats", request, timeout).usage}

    def mounted(self) -> list[str]:
        text = self.guest.run("cat", "/proc/self/mountinfo").stdout
        return [place for place in (line.split()[4] for line in text.splitlines()) if place.startswith("/run/kubelet")]

    def drop(self) -> None:
        for place in reversed(self.mounted()):
            self.guest.run("umount", "-i", "-f", "-l", place, check=False)


@pytest.fixture
def pod(one: Guest, caller: Caller, share: Share) -> Iterator[Pod]:
    made = Pod(one, caller, share)
    yield made
    made.drop()


def test_a_volume_from_staging_to_unstaging_each_call_twice(pod: Pod, one: Guest, progress: Progress) -> None:
    began = time.monotonic()
    pod.stage()
    progress(f"csi: staged in {time.monotonic() - began:.2f} s")
    pod.stage()
    target = pod.publish()
    pod.publish()
    assert sorted(pod.mounted()) == sorted([pod.staged, pod.target])
    one.call(names.write_text, path=f"{target}/file", text="kept")
    assert one.call(names.read_text, path=f"{pod.staged}/file") == "kept"

    used = pod.stats()
    assert used[pb.VolumeUsage.BYTES].total > 64 << 20
    assert 0 < used[pb.VolumeUsage.BYTES].available <= used[pb.VolumeUsage.BYTES].total
    assert used[pb.VolumeUsage.BYTES].used >= 0
    assert used[pb.VolumeUsage.INODES].total > used[pb.VolumeUsage.INODES].used > 0
    assert pod.stats(pod.staged)[pb.VolumeUsage.BYTES].total == used[pb.VolumeUsage.BYTES].total

    began = time.monotonic()
    pod.unpublish()
    pod.unpublish()
    assert pod.mounted() == [pod.staged]
    assert one.run("ls", pod.pods).stdout == ""
    pod.unstage()
    progress(f"csi: unpublished twice and unstaged in {time.monotonic() - began:.2f} s")
    pod.unstage()
    assert pod.mounted() == []


def test_pods_of_a_node_have_places_of_their_own_and_one_may_only_read(pod: Pod, one: Guest) -> None:
    pod.stage()
    writes, reads = pod.publish(), pod.publish(f"{pod.pods}/reads", read_only=True)
    one.call(names.write_text, path=f"{writes}/shared", text="x")
    assert one.call(names.read_text, path=f"{reads}/shared") == "x"
    assert one.call(names.attempts, operations=[("create", f"{reads}/new"), ("create", f"{writes}/new")]) == [30, 0]
    pod.publish(reads, read_only=True)
    refused = pod.caller.refusal("NodePublishVolume", pod.publishing(target_path=reads))
    assert refused.code == "ALREADY_EXISTS"
    refused = pod.caller.refusal("NodePublishVolume", pod.publishing(readonly=True))
    assert refused.code == "ALREADY_EXISTS"
    reader = capability("MULTI_NODE_READER_ONLY")
    third = f"{pod.pods}/third"
    pod.caller.call("NodePublishVolume", pod.publishing(target_path=third, volume_capability=reader))
    assert one.call(names.attempt, operation="create", path=f"{third}/new2") == 30
    pod.unpublish(writes)
    assert one.call(names.read_text, path=f"{reads}/shared") == "x"


def test_calls_in_the_wrong_order_and_of_unknown_things(pod: Pod, one: Guest) -> None:
    call = pod.caller.refusal
    refused = call("NodePublishVolume", pod.publishing())
    assert refused.code == "FAILED_PRECONDITION"
    assert "not staged" in refused.message
    stats = pb.NodeGetVolumeStatsRequest(volume_id=pod.volume, volume_path=pod.target)
    assert call("NodeGetVolumeStats", stats).code == "NOT_FOUND"
    pod.unpublish()
    pod.unstage()
    pod.stage()
    other = pb.NodeGetVolumeStatsRequest(volume_id="other", volume_path=pod.staged)
    assert call("NodeGetVolumeStats", other).code == "NOT_FOUND"
    other_options = {**pod.context, "options": pod.context["options"].replace("timeo=600", "timeo=100")}
    refused = call("NodeStageVolume", pod.staging(publish_context=other_options))
    assert refused.code == "ALREADY_EXISTS"
    assert "timeo=100" in refused.message
    one.run("mkdir", "-p", pod.target)
    one.run("mount", "-t", "tmpfs", "tmpfs", pod.target)
    assert call("NodePublishVolume", pod.publishing()).code == "ALREADY_EXISTS"
    one.run("umount", pod.target)
    one.run("touch", f"{pod.target}/in-the-way")
    pod.publish()
    assert (
        call("NodeUnpublishVolume", pb.NodeUnpublishVolumeRequest(volume_id=pod.volume, target_path=pod.target)).code
        == "INTERNAL"
    )
    one.run("rm", f"{pod.target}/in-the-way")
    pod.unpublish()


def test_a_volume_in_use_is_not_unstaged(pod: Pod, one: Guest) -> None:
    pod.stage()
    one.call(names.write_text, path=f"{pod.staged}/open", text="x")
    user = one.spawn(locks.hold, path=f"{pod.staged}/open")
    user.wait_event("held")
    refused = pod.caller.refusal("NodeUnstageVolume", pod.unstaging())
    assert refused.code == "FAILED_PRECONDITION"
    assert "in use" in refused.message
    user.finish()
    pod.unstage()
    assert pod.mounted() == []


def test_staging_waits_for_the_export_and_says_so_at_its_deadline(
    make_share: MakeShare, one: Guest, caller: Caller, progress: Progress
) -> None:
    late = make_share("late", size="128Mi", port=2060, options=SHORT_GRACE)
    pod = Pod(one, caller, late)
    try:
        began = time.monotonic()
        refused = caller.refusal("NodeStageVolume", pod.staging(), 4.0)
        took = time.monotonic() - began
        assert refused.code == "UNAVAILABLE"
        assert "port 2060" in refused.message
        assert 3.0 < took < 4.0, "before the deadline, but not long before"
        assert pod.mounted() == []

        waiting = caller.future("NodeStageVolume", pod.staging(), 60.0)
        assert caller.refusal("NodeStageVolume", pod.staging()).code == "ABORTED"
        late.start()
        ready = time.monotonic()
        waiting.result(60)
        progress(f"csi: staged {time.monotonic() - ready:.2f} s after the share was ready")
        assert pod.mounted() == [pod.staged]
        pod.unstage()
    finally:
        pod.drop()


def test_a_mount_that_hangs_is_given_up_and_its_process_ends(one: Guest, caller: Caller, share: Share) -> None:
    pod = Pod(one, caller, share)
    mute_server = one.spawn(mute.serve, port=2063)
    mute_server.wait_event("listening")
    pod.context |= {"server": "127.0.0.1", "port": "2063"}
    began = time.monotonic()
    refused = caller.refusal("NodeStageVolume", pod.staging(), 6.0)
    assert refused.code == "UNAVAILABLE"
    assert time.monotonic() - began < 6.0
    end = time.monotonic() + 20
    while one.run("pgrep", "-x", "mount.nfs", check=False).returncode == 0:
        assert time.monotonic() < end, "a child is left behind"
        time.sleep(0.2)
    assert pod.mounted() == []
    assert mute_server.finish() > 0, "it was asked for more than NULL"


def test_a_mount_of_an_earlier_volume_of_that_name_is_not_taken_for_it(pod: Pod) -> None:
    pod.stage()
    elsewhere = pod.context | {"server": "127.0.0.1", "port": "2064"}
    assert pod.caller.refusal("NodeStageVolume", pod.staging(publish_context=elsewhere), 5.0).code == "UNAVAILABLE"
    assert pod.mounted() == []
    pod.stage()
    pod.unstage()


def test_mounts_survive_the_plugin_and_its_successor_knows_them(
    plugin: NodePlugin, pod: Pod, one: Guest, share: Share
) -> None:
    pod.stage()
    target = pod.publish()
    one.call(names.write_text, path=f"{target}/before", text="x")
    plugin.kill()
    assert one.call(names.read_text, path=f"{target}/before") == "x"
    plugin.start()
    with plugin.caller() as caller:
        pod.caller = caller
        pod.stage()
        pod.publish()
        assert len(pod.mounted()) == 2
        pod.unpublish()
        pod.unstage()
    assert pod.mounted() == []
    assert plugin.stop() == 0


def test_a_server_that_hangs_holds_up_nothing_but_what_needs_it(pod: Pod, share: Share, one: Guest) -> None:
    pod.stage()
    target = pod.publish()
    writer = one.spawn(names.leave_dirty, path=f"{target}/dirty", text="d" * 100_000)
    writer.wait_event("opened")
    pids = share.status().pids()
    # who watches ganesha would put another in its place
    stopped = [pids["share-manager"], pids["ganesha"]]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        writer.stop()
        writer.wait_event("written")
        stats = pb.NodeGetVolumeStatsRequest(volume_id=pod.volume, volume_path=target)
        began = time.monotonic()
        assert pod.caller.refusal("NodeGetVolumeStats", stats, 20.0).code == "UNAVAILABLE"
        assert time.monotonic() - began < 12
        assert pod.caller.refusal("NodeStageVolume", pod.staging(), 8.0).code == "UNAVAILABLE"
        # a second pod comes and goes, and the first one goes
        second = pod.publish(f"{pod.pods}/second")
        pod.unpublish(second)
        pod.unpublish()
        info = pod.caller.call("NodeGetInfo", pb.NodeGetInfoRequest(), 5.0)
        assert info.node_id == one.name
        refused = pod.caller.refusal("NodeUnstageVolume", pod.unstaging(), 6.0)
        assert refused.code == "UNAVAILABLE"
        assert "until what was written" in refused.message
        assert pod.mounted() == [pod.staged], "nothing was given up"
    finally:
        for pid in reversed(stopped):
            os.kill(pid, signal.SIGCONT)
    share.wait_status("served again", lambda status: status.settled)
    pod.stage()
    assert one.call(names.read_text, path=f"{pod.staged}/dirty") == "d" * 100_000
    pod.unstage()
    assert pod.mounted() == []


def test_a_volume_whose_server_stays_away_leaves_in_the_end(make_share: MakeShare, one: Guest) -> None:
    share = make_share("gone", size="128Mi", port=2062, options=SHORT_GRACE).start()
    plugin = NodePlugin(one, patience=8.0).start()
    with contextlib.ExitStack() as stack:
        stack.callback(plugin.close)
        pod = Pod(one, stack.enter_context(plugin.caller()), share)
        stack.callback(pod.drop)
        pod.stage()
        pod.publish()
        writer = one.spawn(names.leave_dirty, path=f"{pod.target}/dirty", text="d" * 100_000)
        writer.wait_event("opened")
        share.stop()
        writer.stop()
        writer.wait_event("written")
        pod.unpublish()
        began = time.monotonic()
        assert pod.caller.refusal("NodeUnstageVolume", pod.unstaging(), 4.0).code == "UNAVAILABLE"
        pod.unstage()
        assert 7.0 < time.monotonic() - began < 30.0
        assert pod.mounted() == []
        assert '"given_up"' in plugin.log


def test_a_stale_mount_is_made_anew(make_share: MakeShare, one: Guest, caller: Caller) -> None:
    first = make_share("stale", size="128Mi", port=2061, options=SHORT_GRACE).start()
    pod = Pod(one, caller, first)
    try:
        pod.stage()
        pod.publish()
        data = first.data_dir
        first.stop()
        # another volume of the same name: every handle of the first is stale
        first.lab.run(["rm", "-rf", data])
        first.start()
        assert (
            caller.refusal(
                "NodeGetVolumeStats", pb.NodeGetVolumeStatsRequest(volume_id=pod.volume, volume_path=pod.target)
            ).code
            == "INTERNAL"
        )
        pod.stage()
        target = pod.publish()
        one.call(names.write_text, path=f"{target}/new", text="y")
        assert one.call(names.read_text, path=f"{pod.staged}/new") == "y"
        pod.unpublish()
        pod.unstage()
        assert pod.mounted() == []
    finally:
        pod.drop()


def test_what_was_written_is_there_before_a_volume_has_left(pod: Pod, one: Guest, two: Guest, share: Share) -> None:
    pod.stage()
    target = pod.publish()
    one.call(names.write_text, path=f"{target}/unsynced", text="z" * 100_000, sync=False)
    pod.unpublish()
    pod.unstage()
    with mounted(two, share.export) as place:
        assert two.call(names.read_text, path=f"{place}/unsynced") == "z" * 100_000


async def test_concurrent_repeated_calls_end_in_one_state(pod: Pod) -> None:
    codes: list[str] = []

    async def ask(name: str, request: Message) -> None:
        try:
            await trio.to_thread.run_sync(pod.caller.call, name, request, 60.0)
            codes.append("OK")
        except Exception as error:
            codes.append(getattr(error, "code", repr(error)))

    async def all_of(name: str, requests: list[Message]) -> list[str]:
        codes.clear()
        async with trio.open_nursery() as nursery:
            for request in requests:
                nursery.start_soon(ask, name, request)
        return sorted(codes)

    assert set(await all_of("NodeStageVolume", [pod.staging()] * 6)) <= {"OK", "ABORTED"}
    assert "OK" in codes
    targets = [f"{pod.pods}/{number}" for number in range(4)]
    requests: list[Message] = [pod.publishing(target_path=target) for target in targets]
    assert await all_of("NodePublishVolume", requests) == ["OK"] * 4, "different places go side by side"
    assert set(await all_of("NodePublishVolume", requests * 2)) <= {"OK", "ABORTED"}
    assert len(await trio.to_thread.run_sync(pod.mounted)) == 5
    leaving: list[Message] = [pb.NodeUnpublishVolumeRequest(volume_id=pod.volume, target_path=one) for one in targets]
    assert set(await all_of("NodeUnpublishVolume", leaving * 2)) <= {"OK", "ABORTED"}
    await all_of("NodeUnpublishVolume", leaving)
    assert set(await all_of("NodeUnstageVolume", [pod.unstaging()] * 3)) <= {"OK", "ABORTED"}
    assert await trio.to_thread.run_sync(pod.mounted) == []
