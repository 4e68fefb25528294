"""Another engine takes over an open file because somebody asks for it: a pause, and no error."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.share_manager.conftest import Running, run_command

pytestmark = pytest.mark.system

BLOCK = 4096
SIZE = 64 << 20


class Load:
    """Random 4 KiB direct writes, each read back at once and all at the end; every 16th is followed by an fsync."""

    def __init__(self, path: str, seed: int) -> None:
        self.longest = 0.0
        self.requests = 0
        self.error = ""
        self.expected: dict[int, int] = {}
        self._path = path
        self._random = Random(seed)
        self._seed = seed
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work)

    def _block(self, buffer: mmap.mmap, block: int, number: int) -> None:
        buffer[:] = (f"{self._seed} {block} {number} ".encode() * BLOCK)[:BLOCK]

    def _work(self) -> None:
        out, back = mmap.mmap(-1, BLOCK), mmap.mmap(-1, BLOCK)
        fd = os.open(self._path, os.O_RDWR | os.O_DIRECT)
        try:
            while not self._stop.is_set():
                # each load has blocks of its own
                block = self._random.randrange(SIZE // BLOCK // 8) * 8 + self._seed
                self.requests += 1
                began = time.monotonic()
                self._block(out, block, self.requests)
                assert os.pwrite(fd, out, block * BLOCK) == BLOCK
                self.expected[block] = self.requests
                assert os.preadv(fd, [back], block * BLOCK) == BLOCK
                assert back[:] == out[:]
                if self.requests % 16 == 0:
                    os.fsync(fd)
                self.longest = max(self.longest, time.monotonic() - began)
            for block, number in self.expected.items():
                self._block(out, block, number)
                assert os.preadv(fd, [back], block * BLOCK) == BLOCK
                assert back[:] == out[:]
        except (OSError, AssertionError) as error:
            self.error = repr(error)
        finally:
            os.close(fd)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()


@contextmanager
def loads(path: str, count: int = 4) -> Iterator[list[Load]]:
    made = [Load(path, seed) for seed in range(count)]
    for load in made:
        load.__enter__()
    try:
        yield made
    finally:
        for load in made:
            load.__exit__()


def upgrade(volume: str, data_dir: Path, *options: str, **env: str) -> dict[str, Any]:
    done = run_command("engine", "upgrade", volume, "--data-dir", str(data_dir), "--output", "json", *options, env=env)
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_the_engine_is_replaced_under_load_while_the_file_stays_open(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    attached = start("attach", "up", "--size", "64Mi", "--replicas", "2", "--data-dir", str(tmp_path))
    ready = attached.wait_event("ready")
    pids = [ready["engine_pid"]]
    with loads(ready["block_file"]) as running:
        for _ in range(3):
            time.sleep(0.3)
            told = upgrade("up", tmp_path)
            assert told["before"] == pids[-1]
            assert told["pid"] not in pids
            assert told["pause"] < 5
            pids.append(told["pid"])
        before = sum(load.requests for load in running)
        time.sleep(0.3)
    assert [load.error for load in running] == [""] * 4
    assert sum(load.requests for load in running) > before
    status = json.loads(run_command("status", "up", "--data-dir", str(tmp_path), "--output", "json").stdout)
    found = status[0] if isinstance(status, list) else status
    assert found["engine"]["pid"] == pids[-1]
    assert {replica["state"] for replica in found["replicas"]} == {"in_sync"}
    assert attached.stop()[0] == 0
    left = [event for event in attached.events if event["event"] in ("replica_left", "engine_restarting")]
    assert left == []


def test_the_new_engine_is_the_code_that_is_installed_now(
    start: Callable[..., Running], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "installed"
    shutil.copytree(Path(__file__).parents[2] / "engine", installed / "engine")
    monkeypatch.setenv("PYTHONPATH", f"{installed}:{Path(__file__).parents[2]}")
    attached = start("attach", "new", "--size", "64Mi", "--replicas", "1", "--data-dir", str(tmp_path))
    ready = attached.wait_event("ready")
    main = installed / "engine" / "__main__.py"
    main.write_text(main.read_text().replace('log.info("asked to detach")', 'log.info("said by the new release")'))
    with loads(ready["block_file"], 1) as (load,):
        time.sleep(0.2)
        upgrade("new", tmp_path)
        # a release that cannot even start changes nothing
        main.write_text("raise SystemExit('this release is broken')\n")
        failed = run_command("engine", "upgrade", "new", "--data-dir", str(tmp_path))
        assert failed.returncode == 1
        assert "this release is broken" in failed.stderr
        assert len(failed.stderr.splitlines()) == 1
        requests = load.requests
        time.sleep(0.2)
    assert load.error == ""
    assert load.requests > requests
    assert attached.stop()[0] == 0
    log = (tmp_path / "volumes" / "new" / "log" / "engine.log").read_text()
    assert log.count("said by the new release") == 1


def test_a_successor_that_dies_at_the_handover_is_replaced_and_the_file_goes_on(
    start: Callable[..., Running], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "installed"
    shutil.copytree(Path(__file__).parents[2] / "engine", installed / "engine")
    monkeypatch.setenv("PYTHONPATH", f"{installed}:{Path(__file__).parents[2]}")
    attached = start("attach", "dies", "--size", "64Mi", "--replicas", "1", "--data-dir", str(tmp_path))
    ready = attached.wait_event("ready")
    main = installed / "engine" / "__main__.py"
    text = main.read_text()
    assert "    os.close(config.standby_fd)\n" in text
    main.write_text(text.replace("    os.close(config.standby_fd)\n", "    os._exit(9)\n"))
    with loads(ready["block_file"], 2) as running:
        time.sleep(0.2)
        failed = run_command("engine", "upgrade", "dies", "--data-dir", str(tmp_path))
        assert failed.returncode == 1
        assert "the new engine did not come up and was replaced in its turn" in failed.stderr
        requests = sum(load.requests for load in running)
        time.sleep(0.5)
    assert [load.error for load in running] == ["", ""]
    assert sum(load.requests for load in running) > requests
    assert attached.stop()[0] == 0


def test_what_cannot_be_replaced_in_place_says_so(start: Callable[..., Running], tmp_path: Path) -> None:
    where = ("--data-dir", str(tmp_path))
    attached = start("attach", "py", "--size", "64Mi", "--replicas", "1", "--frontend", "pyfuse3", *where)
    attached.wait_event("ready")
    refused = run_command("engine", "upgrade", "py", *where)
    assert refused.returncode == 4
    assert "pyfuse3 frontend cannot hand an open file over" in refused.stderr
    attached.stop()
    refused = run_command("engine", "upgrade", "py", *where)
    assert refused.returncode == 4
    assert "is not served at present" in refused.stderr


@contextmanager
def appending(path: Path) -> Iterator[list[int]]:
    """Appends to a file of a share and syncs it, over and over; its lengths."""
    lengths: list[int] = []
    failed: list[OSError] = []
    stop = threading.Event()

    def work() -> None:
        try:
            with path.open("wb", buffering=0) as file:
                while not stop.is_set():
                    file.write(b"line\n" * 1000)
                    os.fsync(file.fileno())
                    lengths.append(file.tell())
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield lengths
    finally:
        stop.set()
        thread.join()
    assert not failed


def share_status(volume: str, where: tuple[str, ...]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run_command("status", volume, *where, "--output", "json").stdout)
    return found


def test_a_share_goes_on_with_another_engine_and_the_same_server(
    start: Callable[..., Running], tmp_path: Path, free_port: int
) -> None:
    where = ("--data-dir", str(tmp_path))
    share = start("serve", "upg", "--size", "64Mi", "--replicas", "2", "--port", str(free_port), *where)
    data = Path(share.wait_event("ready")["mountpoint"]) / "data"
    before = share_status("upg", where)
    with appending(data / "log") as lengths:
        while len(lengths) < 5:
            time.sleep(0.01)
        upgrade("upg", tmp_path)
        so_far = len(lengths)
        while len(lengths) < so_far + 5:
            time.sleep(0.01)
    after = share_status("upg", where)
    assert after["engine"]["pid"] != before["engine"]["pid"]
    for kept in ("ganesha", "device", "epoch", "mountpoint"):
        assert after[kept] == before[kept]
    assert share.stop() == (0, "")
    assert "repairing" not in [event["event"] for event in share.events]


def test_where_a_file_cannot_be_handed_over_a_share_can_be_attached_anew(
    start: Callable[..., Running], tmp_path: Path, free_port: int
) -> None:
    where = ("--data-dir", str(tmp_path))
    options = ("--size", "64Mi", "--replicas", "1", "--frontend", "pyfuse3", "--port", str(free_port))
    share = start("serve", "again", *options, "--lease-lifetime", "10", "--grace-period", "10", *where)
    data = Path(share.wait_event("ready")["mountpoint"]) / "data"
    (data / "file").write_text("kept")
    refused = run_command("engine", "upgrade", "again", *where)
    assert refused.returncode == 4
    assert "--reattach" in refused.stderr
    before = share_status("again", where)
    told = upgrade("again", tmp_path, "--reattach")
    after = share_status("again", where)
    assert (told["before"], told["pid"]) == (before["engine"]["pid"], after["engine"]["pid"])
    assert told["pause"] is None
    assert after["epoch"] == before["epoch"] + 1
    assert (data / "file").read_text() == "kept"
    assert share.stop() == (0, "")
