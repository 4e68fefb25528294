from __future__ import annotations

import contextlib
import io
import json
import os
import time

import trio
from rich.console import Console

from engine.client import EngineEvent, OperationStats
from share_manager.cli.live import LiveView
from share_manager.events import ConsoleSink, JsonSink, LineSink, Reporter
from share_manager.share.attachment import describe
from share_manager.share.background import background
from share_manager.share.child import last_reason
from share_manager.share.status import ClientInfo, EngineInfo, ReplicaInfo, ShareStatus
from share_manager.units import format_rate


def test_a_step_is_one_json_object_a_line() -> None:
    out = io.StringIO()
    report = Reporter(JsonSink(out))
    report.emit("ready", "ready: mount", endpoint="nfs://127.0.0.1:2049/v")
    report.warn("repairing", "two\nlines")
    ready, repairing = [json.loads(line) for line in out.getvalue().splitlines()]
    assert (ready["event"], ready["level"], ready["endpoint"]) == ("ready", "info", "nfs://127.0.0.1:2049/v")
    assert ready["time"] > 1e9
    assert (repairing["level"], repairing["message"]) == ("warning", "two\nlines")


def test_lines_for_people() -> None:
    out = io.StringIO()
    Reporter(LineSink(out)).warn("x", "something")
    assert out.getvalue().endswith(" warning: something\n")
    shown = io.StringIO()
    Reporter(ConsoleSink(Console(file=shown))).emit("x", "a [bracket] stays")
    assert "a [bracket] stays" in shown.getvalue()


def test_a_reader_that_reads_no_more_holds_nothing_up() -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb"), os.fdopen(writing, "w") as pipe:
        os.set_blocking(writing, False)
        try:
            while True:
                os.write(writing, b"x" * 4096)
        except BlockingIOError:
            pass
        os.set_blocking(writing, True)
        began = time.monotonic()
        JsonSink(pipe).emit("event", "dropped", "info", {})
        assert time.monotonic() - began < 5


def test_a_reader_that_went_away_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    pipe = os.fdopen(writing, "w")
    LineSink(pipe).emit("event", "lost", "info", {})
    with contextlib.suppress(BrokenPipeError):
        pipe.close()


def test_words_for_engine_events() -> None:
    assert describe(EngineEvent(event="resync_progress", replica="r2", done=30, total=40)) == (
        "replica r2: resynchronised 75 %"
    )
    assert describe(EngineEvent(event="replica_in_sync", replica="r2", message="in_sync")) == "replica r2: is in sync"
    assert (
        describe(EngineEvent(event="replica_left", replica="r1", message="left: it hangs"))
        == "replica r1: left: it hangs"
    )
    assert describe(EngineEvent(event="faulted")) == "faulted"


def test_the_reason_at_the_end_of_a_log() -> None:
    assert last_reason("") == ""
    assert last_reason('{"event": "x"}\n{"event": "leaving", "error": "no space"}\n') == "no space"
    assert last_reason("Traceback\nValueError: bad\n") == "ValueError: bad"


def test_live_view() -> None:
    view = LiveView(Console(file=io.StringIO()))

    def status(written: int) -> ShareStatus:
        return ShareStatus(
            volume="vol1",
            state="running",
            kind="serve",
            size_bytes=10 << 30,
            mount_command="mount -t nfs4 127.0.0.1:/vol1 /mnt",
            clients=(ClientInfo(address="10.0.0.9", client_ids=("x",)),),
            engine=EngineInfo(pid=1, operations={"write": OperationStats(count=written // 4096, bytes=written)}),
            replicas=(
                ReplicaInfo(name="r1", address="", directory="", state="in_sync"),
                ReplicaInfo(name="r2", address="", directory="", state="resyncing", resync_done=1, resync_total=4),
            ),
        )

    view.render(status(0), 10.0)
    shown = Console(file=io.StringIO(), width=120)
    with shown.capture() as captured:
        shown.print(view.render(status(8 << 20), 12.0))
    text = captured.get()
    for part in (
        "running",
        "10Gi",
        "r1 in sync",
        "r2 resyncing 25 %",
        "1  10.0.0.9",
        "write 4.0 MiB/s",
        "mount -t nfs4",
    ):
        assert part in text
    assert format_rate(0) == "0 B/s"


async def test_background_tasks_outlast_a_cancellation_until_the_block_is_left() -> None:
    ticks: list[str] = []

    async def tick() -> None:
        try:
            while True:
                await trio.sleep(0.001)
                ticks.append("tick")
        finally:
            ticks.append("ended")

    with trio.CancelScope() as scope:
        async with background() as tasks:
            tasks.start_soon(tick)
            try:
                await trio.sleep(0.01)
                scope.cancel()
                await trio.sleep_forever()
            finally:
                before = len(ticks)
                with trio.CancelScope(shield=True):
                    await trio.sleep(0.02)
                assert len(ticks) > before
    assert scope.cancelled_caught
    assert ticks[-1] == "ended"
