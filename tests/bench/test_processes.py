from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from share_manager.bench.processes import UnavailableError, cpu_between, cpu_seconds, cpu_seconds_of, run, serving
from share_manager.errors import CommandError

TICKS = os.sysconf("SC_CLK_TCK")


def test_a_name_with_blanks_and_parentheses_is_passed_over() -> None:
    line = f"42 (a ) (b) S 7 42 42 0 -1 4194304 1 2 3 4 {TICKS} {2 * TICKS} 9 9 20 0 1 0 100 0 0"
    assert cpu_seconds_of(line) == (7, 3.0)


def test_children_count() -> None:
    busy = "import time\nend = time.process_time() + 0.2\nwhile time.process_time() < end: pass\ninput()"
    parent = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {busy!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE) as process:
        try:
            for _ in range(600):
                spent = cpu_seconds([process.pid])
                if len(spent) == 2 and max(spent.values()) >= 0.2:
                    break
                trio.run(trio.sleep, 0.05)
        finally:
            process.communicate(b"\n", timeout=30)
    assert len(spent) == 2
    assert max(spent.values()) >= 0.2


def test_a_process_that_came_counts_whole_and_one_that_went_not_at_all() -> None:
    assert cpu_between({1: 1.0, 2: 5.0}, {1: 1.5, 3: 0.25}) == 0.75
    assert cpu_seconds([2**22 + 1]) == {}


async def test_a_server_is_ended_with_its_scope_and_its_last_word_is_known(tmp_path: Path) -> None:
    program = "import sys, time; print('first'); print('sorry', file=sys.stderr, flush=True); time.sleep(600)"
    async with serving("one", [sys.executable, "-c", program], tmp_path) as server:
        with trio.fail_after(30):
            while not server.stderr.stat().st_size:
                await trio.sleep(0.01)
        server.check()
        assert server.why() == "sorry"
    assert server.process.returncode == -15
    with pytest.raises(UnavailableError, match="sorry"):
        server.check()


async def test_a_server_that_does_not_listen_is_killed(tmp_path: Path) -> None:
    program = "import signal, time; signal.signal(15, signal.SIG_IGN); print('on', flush=True); time.sleep(600)"
    async with serving("deaf", [sys.executable, "-c", program], tmp_path, patience=0.2) as server:
        with trio.fail_after(30):
            while not server.stdout.stat().st_size:
                await trio.sleep(0.01)
    assert server.process.returncode == -9


async def test_a_missing_program_makes_a_target_unavailable(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="no-such-program is not installed"):
        async with serving("none", ["no-such-program"], tmp_path):
            pass
    with pytest.raises(UnavailableError, match="no-such-program is not installed"):
        await run(["no-such-program"])
    with pytest.raises(CommandError, match="status 1"):
        await run(["false"])
