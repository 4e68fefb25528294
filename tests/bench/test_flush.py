from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from share_manager.bench import flush


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flush, "SPAN", 1 << 20)


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Descriptors that were flushed, in order; O_DIRECT left out, which tmpfs may lack."""
    flushed: list[int] = []
    real = os.fdatasync
    monkeypatch.setattr(os, "O_DIRECT", 0)

    def fdatasync(fd: int) -> None:
        flushed.append(fd)
        real(fd)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    return flushed


def after(count: int) -> Callable[[], bool]:
    asked = itertools.count(1)
    return lambda: next(asked) > count


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("count", [1, 3])
def test_every_file_is_flushed_once_in_each_round(tmp_path: Path, rounds: list[int], count: int) -> None:
    paths = flush.plain_files(tmp_path, count)
    assert [path.stat().st_size for path in paths] == [1 << 20] * count
    assert flush.plain_us(paths, 60, after(5)) > 0
    assert len(rounds) == 5 * count
    for number in range(0, len(rounds), count):
        assert len(set(rounds[number : number + count])) == count


@pytest.mark.usefixtures("small", "rounds")
def test_the_slowest_file_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = flush.plain_files(tmp_path, 3)
    real = os.pwrite

    def slow(fd: int, data: bytes, offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{fd}") == str(paths[1]):
            time.sleep(0.02)
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", slow)
    assert flush.plain_us(paths, 60, after(3)) >= 20_000


@pytest.mark.usefixtures("small", "rounds")
def test_a_file_that_fails_ends_all(tmp_path: Path) -> None:
    paths = flush.plain_files(tmp_path, 3)
    paths[2].unlink()
    with pytest.raises(FileNotFoundError):
        flush.plain_us(paths, 60, lambda: False)


@pytest.mark.usefixtures("small", "rounds")
def test_a_caller_that_is_interrupted_ends_all(tmp_path: Path) -> None:
    def interrupted() -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        flush.plain_us(flush.plain_files(tmp_path, 3), 60, interrupted)


def test_a_round_trip_is_there_and_back() -> None:
    assert 1 < flush.round_trip_us(0.2, lambda: False) < 1e6
