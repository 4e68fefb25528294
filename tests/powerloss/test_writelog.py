"""The replay of a write log, with a log of which everything is known."""

from __future__ import annotations

import struct
from pathlib import Path
from random import Random

import pytest

from tests.powerloss.writelog import BLOCK, FLUSH, FUA, MAGIC, MARK, Disk, read_log

SECTORS = BLOCK // 512


def make(path: Path, entries: list[tuple[int, int, bytes]]) -> Path:
    """Of (sector, flags, data), as drivers/md/dm-log-writes.c writes it."""
    out = struct.pack("<QQQI", MAGIC, 1, len(entries), 512).ljust(512, b"\0")
    for sector, flags, data in entries:
        mark = flags & MARK
        head = struct.pack("<QQQQ", sector, 0 if mark else len(data) // 512, flags, len(data) if mark else 0)
        out += (head + (data if mark else b"")).ljust(512, b"\0") + (b"" if mark else data)
    path.write_bytes(out)
    return path


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    (tmp_path / "base").write_bytes(bytes(8 * BLOCK))
    log = make(
        tmp_path / "log",
        [
            (0, 0, b"a" * BLOCK),
            (0, FLUSH, b""),
            (0, MARK, b"one"),
            (SECTORS, FUA, b"f" * BLOCK),
            (2 * SECTORS, 0, b"b" * 2 * BLOCK),
            (0, 0, b"c" * BLOCK),
            (0, FLUSH, b""),
        ],
    )
    return Disk(tmp_path / "base", log, tmp_path / "image")


def test_the_log_is_read_with_its_marks(disk: Disk) -> None:
    assert [entry.mark for entry in disk.entries if entry.mark] == ["one"]
    assert [entry.sectors for entry in disk.entries] == [8, 0, 0, 8, 16, 8, 0]
    disk.close()


def test_what_is_behind_a_position_may_be_there_and_what_is_before_it_is(disk: Disk, tmp_path: Path) -> None:
    disk.advance(3)
    assert disk.certain == SECTORS
    assert [entry.sector for entry in disk.unflushed()] == [16, 0]
    assert [entry.sector for entry in disk.unflushed(16)] == [16]
    assert disk.unflushed(15) == []
    assert disk.unflushed(0) == []
    seen = set()
    for seed in range(40):
        disk.cut(tmp_path / "left", disk.unflushed(), Random(seed))
        content = (tmp_path / "left").read_bytes()
        seen.add(bytes(content[i] for i in range(0, 8 * BLOCK, BLOCK)))
    assert seen == {
        bytes([0x61 + 2 * c, 0, 0x62 * x, 0x62 * y, 0, 0, 0, 0]) for c in (0, 1) for x in (0, 1) for y in (0, 1)
    }
    disk.advance(7)
    assert (tmp_path / "image").read_bytes() == b"c" * BLOCK + b"f" * BLOCK + b"b" * 2 * BLOCK + bytes(4 * BLOCK)
    disk.close()


def test_what_is_no_log_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(bytes(4096))
    with pytest.raises(ValueError, match="no log of dm-log-writes"):
        read_log(tmp_path / "log")
