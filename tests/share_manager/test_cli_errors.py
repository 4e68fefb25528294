"""What a user does wrong: one line on stderr, an exit status by class, nothing left behind."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
from pathlib import Path

import pytest

from share_manager.cli import main
from share_manager.paths import VolumePaths
from share_manager.volumes import create_volume, make_data_dir
from tests.share_manager.conftest import run_command, runtime_directories

MIB = 1 << 20


def fails(capsys: pytest.CaptureFixture[str], status: int, *arguments: str) -> str:
    assert main(arguments) == status
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("share-manager: error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("serve", "Vol"), "volume name 'Vol'"),
        (("serve", "a" * 64), "1 to 63"),
        (("serve", "v", "--size", "10GB"), "Ki, Mi, Gi or Ti"),
        (("serve", "v", "--size", "5000"), "multiple of 4096"),
        (("serve", "v", "--size", "1Mi"), "at least 64Mi"),
        (("serve", "v", "--size", "100Mi", "--fs", "xfs"), "at least 300Mi"),
        (("serve", "v", "--fs", "zfs"), "ext4"),
        (("serve", "v", "--replicas", "0"), "from 1 to 9"),
        (("serve", "v", "--replicas", "many"), "--replicas"),
        (("serve", "v", "--bind", "somewhere"), "IP address"),
        (("serve", "v", "--port", "0"), "a port is"),
        (("serve", "v", "--port", "70000"), "a port is"),
        (("serve", "v", "--metrics-port", "2049"), "port of the NFS server"),
        (("serve", "v", "--allow", "10.1.1.1/8"), "did you mean 10.0.0.0/8"),
        (("serve", "v", "--allow", "10.0.0.0/8", "nonsense"), "nonsense"),
        (("serve", "v", "--squash", "some"), "none"),
        (("serve", "v", "--root-owner", "nobody"), "UID:GID"),
        (("serve", "v", "--root-mode", "rwx"), "octal"),
        (("serve", "v", "--lease-lifetime", "9"), "10 to 120"),
        (("serve", "v", "--lease-lifetime", "30", "--grace-period", "20"), "at least --lease-lifetime"),
        (("serve", "v", "--output", "xml"), "json"),
        (("serve", "v", "--encrypt"), "--encrypt needs the passphrase"),
        (("serve", "v", "--luks-key-size", "512"), "add --encrypt"),
        (("serve", "v", "--encrypt", "--passphrase-file", "/nonexistent"), "No such file"),
        (("serve", "v", "--passphrase-file", "/dev/null"), "it is empty"),
        (("serve", "v", "--passphrase-file", "/dev/null", "--luks-pbkdf", "md5"), "argon2id"),
        (("serve", "v", "--encrypt", "--passphrase-file", "x", "--size", "64Mi"), "at least 80Mi"),
        (("serve",), "VOLUME"),
        (("serve", "v", "--frob"), "--frob"),
        (("attach", "v", "--size", "tiny"), "such as 10Gi"),
        (("frobnicate",), "frobnicate"),
    ],
)
def test_usage(arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    placed = (*arguments, "--data-dir", str(tmp_path / "data")) if len(arguments) > 1 else arguments
    assert words in fails(capsys, 2, *placed)
    assert list(tmp_path.iterdir()) == []


def test_no_such_volume(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for command in (("status",), ("stop",), ("volume", "show"), ("volume", "delete")):
        assert "no volume v" in fails(capsys, 5, *command, "v", "--data-dir", str(tmp_path))
    assert "no volume v" in fails(capsys, 5, "volume", "resize", "v", "1Gi", "--data-dir", str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_no_root(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for command in ("serve", "attach"):
        assert "needs root" in fails(capsys, 3, command, "v", "--data-dir", str(tmp_path / "data"))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_program(
    root: None, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, **where: None if name == "ganesha.nfsd" else real(name, **where))
    said = fails(capsys, 3, "serve", "v", "--data-dir", str(tmp_path))
    assert "ganesha.nfsd is not installed: apt-get install nfs-ganesha nfs-ganesha-vfs" in said
    assert os.listdir(tmp_path / "volumes") == []


def test_delete_asks(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = VolumePaths(make_data_dir(tmp_path), "v")
    create_volume(paths, size=64 * MIB, replicas=1)
    place = ("--data-dir", str(tmp_path))
    monkeypatch.setattr("sys.stdin", io.StringIO("yes\n"))
    assert "--yes" in fails(capsys, 2, "volume", "delete", "v", *place)
    assert paths.directory.exists()
    assert main(["volume", "delete", "v", "--yes", *place]) == 0
    assert os.listdir(tmp_path / "volumes") == []


def test_what_a_stopped_volume_says(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    paths = VolumePaths(make_data_dir(tmp_path), "v")
    record = create_volume(paths, size=64 * MIB, replicas=2)
    place = ("--data-dir", str(tmp_path))
    assert main(["status", "v", "--output", "json", *place]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["volume"], status["state"], status["size_bytes"]) == ("v", "stopped", 64 * MIB)
    assert status["endpoint"] is None
    assert [replica["state"] for replica in status["replicas"]] == ["in_sync", "in_sync"]
    assert main(["status", "--output", "json", *place]) == 0
    assert [one["volume"] for one in json.loads(capsys.readouterr().out)] == ["v"]
    assert main(["volume", "show", "v", "--output", "json", *place]) == 0
    assert json.loads(capsys.readouterr().out)["uuid"] == record.uuid
    assert main(["volume", "resize", "v", "128Mi", *place]) == 0
    assert main(["volume", "list", "--output", "json", *place]) == 0
    assert '"size_bytes": 134217728' in capsys.readouterr().out
    for command in (("status",), ("status", "v"), ("volume", "list"), ("volume", "show", "v")):
        assert main([*command, *place]) == 0
        assert "128Mi" in capsys.readouterr().out


def test_a_port_in_use(root: None, tmp_path: Path, free_port: int) -> None:
    with socket.create_server(("127.0.0.1", free_port)):
        done = run_command("serve", "portuse", "--port", str(free_port), "--data-dir", str(tmp_path))
    assert done.returncode == 4
    assert done.stderr == (
        f"share-manager: error: port {free_port} on 127.0.0.1 is in use: choose another with --port or --bind\n"
    )
    assert os.listdir(tmp_path / "volumes") == []
    assert runtime_directories("portuse") == []


def test_an_address_of_another_machine(root: None, tmp_path: Path) -> None:
    done = run_command("serve", "addr", "--bind", "203.0.113.7", "--data-dir", str(tmp_path))
    assert (done.returncode, len(done.stderr.splitlines())) == (4, 1)
    assert os.listdir(tmp_path / "volumes") == []


def test_another_size(root: None, tmp_path: Path) -> None:
    create_volume(VolumePaths(make_data_dir(tmp_path), "v"), size=64 * MIB, replicas=1)
    done = run_command("serve", "v", "--size", "128Mi", "--data-dir", str(tmp_path), "--output", "json")
    assert done.returncode == 4
    assert "has 64Mi, not 128Mi" in done.stderr
    failed = json.loads(done.stdout.splitlines()[-1])
    assert (failed["event"], failed["error"], failed["exit_status"]) == ("failed", "SizeMismatchError", 4)
    assert "volume resize v" in done.stderr


def test_every_command_has_help_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    overview = capsys.readouterr().out
    for command in ("serve", "attach", "status", "stop", "volume", "doctor", "bench"):
        assert command in overview
    for words in (("serve",), ("attach",), ("status",), ("stop",), ("doctor",), ("volume", "delete")):
        assert main([*words, "--help"]) == 0
        assert f"share-manager {' '.join(words)}" in capsys.readouterr().out


def test_doctor(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status = main(["doctor", "--output", "json", "--data-dir", str(tmp_path / "not" / "yet")])
    report = json.loads(capsys.readouterr().out)
    failed = [check for check in report["checks"] if check["result"] == "failed"]
    assert status == (3 if failed else 0)
    assert report["ok"] is not bool(failed)
    assert all(check["remedy"] for check in report["checks"] if check["result"] != "ok")
    names = {check["name"] for check in report["checks"]}
    assert {"root", "kernel: fuse", "kernel: loop", "program: ganesha.nfsd", "port 2049", "direct I/O"} <= names
    assert list(tmp_path.iterdir()) == []
