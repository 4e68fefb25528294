from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from share_manager.errors import InvalidValueError, PathNotFoundError
from share_manager.share.treecopy import copy_out


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "docs" / "deep").mkdir(parents=True)
    (root / "docs" / "one").write_text("1")
    (root / "docs" / "deep" / "two").write_text("22")
    os.chmod(root / "docs" / "one", 0o4640)
    os.utime(root / "docs" / "one", ns=(10**18, 10**18 + 5))
    os.utime(root / "docs" / "deep", ns=(10**18, 10**18 + 7))
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("of the host")
    (root / "docs" / "out").symlink_to(secret / "key")
    (root / "leads-out").symlink_to(secret)
    (root / "up").symlink_to("..")
    os.mkfifo(root / "docs" / "pipe")
    with open(root / "docs" / "sparse", "wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"x")
    return root


def test_a_tree_is_copied_as_it_is(tree: Path, tmp_path: Path) -> None:
    made, copied = copy_out(tree, "docs", tmp_path / "copy")
    assert made == tmp_path / "copy"
    assert (made / "one").read_text() == "1"
    assert (made / "deep" / "two").read_text() == "22"
    assert os.readlink(made / "out") == str(tmp_path / "secret" / "key")
    found = (made / "one").stat()
    assert (found.st_mode & 0o7777, found.st_mtime_ns) == (0o4640, 10**18 + 5)
    assert (made / "deep").stat().st_mtime_ns == 10**18 + 7
    assert (made / "sparse").stat().st_size == 1 << 20
    assert (made / "sparse").stat().st_blocks * 512 < 1 << 19
    assert (made / "sparse").read_bytes() == (tree / "docs" / "sparse").read_bytes()
    assert (copied.files, copied.directories, copied.links, copied.skipped) == (3, 2, 1, ["docs/pipe"])
    assert copied.bytes == 1 + 2 + 4096


def test_one_file_goes_into_a_directory_or_to_a_name(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "into").mkdir()
    assert copy_out(tree, "/docs/deep/two", tmp_path / "into")[0] == tmp_path / "into" / "two"
    assert copy_out(tree, "docs/deep/two", tmp_path / "name")[0].read_text() == "22"
    assert copy_out(tree, "/", tmp_path / "all")[1].files == 3
    assert os.readlink(tmp_path / "all" / "up") == ".."


def test_nothing_outside_can_be_reached(tree: Path, tmp_path: Path) -> None:
    made, _ = copy_out(tree, "docs/out", tmp_path / "link")
    assert made.is_symlink()
    for path in ("leads-out/key", "up/secret/key", "docs/out/x"):
        with pytest.raises(PathNotFoundError, match="not followed"):
            copy_out(tree, path, tmp_path / "stolen")
    for path in ("../secret/key", "docs/../../secret/key"):
        with pytest.raises(InvalidValueError, match="leads out"):
            copy_out(tree, path, tmp_path / "stolen")
    assert not (tmp_path / "stolen").exists()
    copy_out(tree, "leads-out", tmp_path / "copied-link")
    assert (tmp_path / "copied-link").is_symlink()


def test_nothing_is_replaced_or_written_through(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(PathNotFoundError, match="nothing is replaced"):
        copy_out(tree, "docs/one", tmp_path / "taken")
    (tmp_path / "trap").symlink_to(tmp_path / "secret" / "new")
    with pytest.raises(PathNotFoundError, match="nothing is replaced"):
        copy_out(tree, "docs/one", tmp_path / "trap")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "docs").symlink_to(tmp_path / "secret")
    with pytest.raises(PathNotFoundError, match="nothing is replaced"):
        copy_out(tree, "docs", tmp_path / "full")
    with pytest.raises(PathNotFoundError, match="empty directory"):
        copy_out(tree, "/", tmp_path / "full")
    assert (tmp_path / "taken").read_text() == "mine"
    assert os.listdir(tmp_path / "secret") == ["key"]


def test_what_is_not_there_is_said(tree: Path, tmp_path: Path) -> None:
    for path in ("nothing", "docs/nothing", "nothing/deeper"):
        with pytest.raises(PathNotFoundError, match="is not in this snapshot"):
            copy_out(tree, path, tmp_path / "copy")
    with pytest.raises(PathNotFoundError, match="is no directory"):
        copy_out(tree, "docs/one/deeper", tmp_path / "copy")
    with pytest.raises(PathNotFoundError, match="no such directory to copy to"):
        copy_out(tree, "docs", tmp_path / "none" / "copy")


def test_a_socket_is_left_out(tree: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(tree / "docs" / "sock"))
        assert "docs/sock" in copy_out(tree, "docs", tmp_path / "copy")[1].skipped
