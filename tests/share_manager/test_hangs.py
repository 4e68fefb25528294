"""What does not die but hangs or breaks: noticed by supervision, with its times shortened."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import trio

from share_manager.events import ListSink, Reporter
from share_manager.paths import VolumePaths
from share_manager.share.daemon import ServeOptions, Share
from share_manager.share.export import ExportOptions
from share_manager.share.session import VolumeOptions
from share_manager.share.supervise import Policy
from share_manager.volumes import make_data_dir

pytestmark = pytest.mark.system

QUICK = Policy(null_interval=0.3, null_timeout=0.5, null_misses=3, engine_silence=3.0)


async def until(what: str, sink: ListSink, count: int) -> None:
    with trio.fail_after(60):
        while sum(event["event"] == what for event in sink.events) < count:
            await trio.sleep(0.05)


async def test_hung_and_broken_parts_are_replaced(root: None, tmp_path: Path, free_port: int) -> None:
    sink = ListSink()
    options = ServeOptions(
        volume=VolumeOptions(size=64 << 20, replicas=2),
        export=ExportOptions(port=free_port, lease_lifetime=4, grace_period=6),
        policy=QUICK,
    )
    share = Share(VolumePaths(make_data_dir(tmp_path), "hangs"), options, Reporter(sink))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(share.run)
        await until("ready", sink, 1)

        first = await share.status()
        assert first.ganesha.pid is not None
        os.kill(first.ganesha.pid, signal.SIGSTOP)
        await until("ready", sink, 2)
        second = await share.status()
        assert second.ganesha.pid != first.ganesha.pid
        assert second.epoch == first.epoch

        assert second.engine.pid is not None
        os.kill(second.engine.pid, signal.SIGSTOP)
        await until("ready", sink, 3)
        third = await share.status()
        assert (third.epoch, third.restarts.engine) == (first.epoch + 1, 1)
        assert third.ganesha.epoch > second.ganesha.epoch
        assert "has not answered" in third.last_failure

        assert third.device is not None
        trigger = Path(f"/sys/fs/ext4/{Path(third.device).name}/trigger_fs_error")
        if trigger.exists():
            trigger.write_text("test")
            await until("ready", sink, 4)
            assert (await share.status()).epoch == first.epoch + 2
            assert [event["repaired"] for event in sink.events if event["event"] == "checked"][-1]

        # leaving is not held up by a part that hangs
        last = await share.status()
        assert last.engine.pid is not None
        os.kill(last.engine.pid, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGTERM)
        await until("stopped", sink, 1)
    assert not share.paths.run.exists()


async def test_a_ganesha_that_hangs_at_its_first_start_is_started_once_more(
    root: None, tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.which("ganesha.nfsd")
    programs = tmp_path / "programs"
    programs.mkdir()
    tried = tmp_path / "tried"
    program = programs / "ganesha.nfsd"
    program.write_text(f'#!/bin/sh\nif mkdir {tried}; then exec sleep 60; fi\nexec {real} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setattr("share_manager.share.export.READY_TIMEOUT", 3.0)
    sink = ListSink()
    options = ServeOptions(
        volume=VolumeOptions(size=64 << 20, replicas=1), export=ExportOptions(port=free_port), policy=QUICK
    )
    share = Share(VolumePaths(make_data_dir(tmp_path), "hangs"), options, Reporter(sink))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(share.run)
        await until("ready", sink, 1)
        assert tried.exists()
        assert [event["event"] for event in sink.events].count("ganesha_restarting") == 1
        os.kill(os.getpid(), signal.SIGTERM)
        await until("stopped", sink, 1)
    assert not share.paths.run.exists()
