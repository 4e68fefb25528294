"""`make` on a machine that has things or lacks them, played with stand-ins for apt, dpkg and pip."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from share_manager.errors import PACKAGES
from tests.conftest import PROGRAMS
from tests.project.common import ROOT, apt_list

Setup = Callable[..., "subprocess.CompletedProcess[str]"]

LISTS = ("runtime", "node", "build", "test")
COMPILED = re.findall(r'^    "(engine/.+\.py)",$', (ROOT / "setup.py").read_text(), re.MULTILINE)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_constraints_pin_all_that_is_asked_for() -> None:
    everything = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = everything["project"]
    asked = {
        normal(re.split(r"[<>=\[ ;]", wanted)[0])
        for wanted in [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    }
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9.]+", line) for line in lines)
    assert asked <= {normal(line.split("==")[0]) for line in lines}
    # the one that checks the types is the one that compiles
    assert {wanted for wanted in everything["build-system"]["requires"] if wanted.startswith("mypy")} <= set(lines)


def test_a_package_is_in_one_list_only() -> None:
    names = [name for part in LISTS for name in apt_list(part)]
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9.+-]+", name) for name in names)


def test_what_the_lab_needs_is_installed_for_tests() -> None:
    assert set(PROGRAMS.values()) <= {*apt_list("runtime"), *apt_list("node"), *apt_list("test")}


def test_what_errors_tell_people_to_install_is_installed_by_make() -> None:
    essential = {"coreutils"}
    for packages in PACKAGES.values():
        assert set(packages.split()) <= {*apt_list("runtime"), *apt_list("node"), *apt_list("test"), *essential}


@pytest.mark.parametrize("script", [".ci/run", *(f"scripts/{path.name}" for path in (ROOT / "scripts").glob("*.sh"))])
def test_scripts_can_be_run(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", ROOT / script], check=True)


def test_make_alone_shows_what_there_is() -> None:
    shown = subprocess.run(["make", "-C", ROOT], capture_output=True, text=True, check=True).stdout
    for target in ("serve", "test", "lint", "bench", "image"):
        assert f"make {target} " in shown


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with stand-ins in `bin`: each writes what it was asked to `calls`."""
    root, programs = tmp_path / "checkout", tmp_path / "bin"
    shutil.copytree(ROOT / "deploy", root / "deploy")
    shutil.copytree(ROOT / "scripts", root / "scripts")
    for name in ("pyproject.toml", "setup.py", "constraints.txt", "ganesha/wake.c", *COMPILED):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    programs.mkdir()
    installed = tmp_path / "installed"
    installed.write_text("\n".join(name for part in LISTS for name in apt_list(part)) + "\n")

    def program(path: Path, body: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)

    calls = tmp_path / "calls"
    program(
        programs / "dpkg-query",
        f'for name in "${{@:3}}"; do grep -qx -- "$name" {installed} && echo "$name installed"; done; true',
    )
    record = f'echo "$(basename "$0") $*" >>{calls}'
    program(programs / "apt-get", f'{record}; [[ "$*" != *install* ]] || tr " " "\\n" <<<"$*" >>{installed}')
    program(programs / "systemctl", record)
    python = f'case "$*" in *-m\\ pip*) {record};; *--version*) echo Python 3.11.2;; esac'
    program(root / ".venv/bin/python", python)
    return root


@pytest.fixture
def setup(checkout: Path) -> Setup:
    def run(kind: str) -> subprocess.CompletedProcess[str]:
        path = f"{checkout.parent / 'bin'}:/usr/bin:/bin"
        env = {"PATH": path, "POLICY_RC_D": str(checkout.parent / "policy-rc.d")}
        return subprocess.run([checkout / "scripts/setup.sh", kind], env=env, capture_output=True, text=True)

    return run


def calls(checkout: Path) -> list[str]:
    path = checkout.parent / "calls"
    found = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return found


def test_a_second_run_does_and_says_nothing(checkout: Path, setup: Setup) -> None:
    assert setup("run").returncode == 0
    (pip,) = calls(checkout)
    assert "-c constraints.txt" in pip
    assert "[dev]" not in pip
    again = setup("run")
    assert (again.returncode, again.stdout, again.stderr, calls(checkout)) == (0, "", "", [])


def test_tests_need_more_than_serving(checkout: Path, setup: Setup) -> None:
    assert setup("run").returncode == 0
    calls(checkout)
    assert setup("test").returncode == 0
    (pip,) = calls(checkout)
    assert pip.endswith("-e .[dev]")
    assert (setup("run").returncode, calls(checkout)) == (0, [])


def test_changed_requirements_are_installed(checkout: Path, setup: Setup) -> None:
    assert setup("test").returncode == 0
    calls(checkout)
    with (checkout / "constraints.txt").open("a") as file:
        file.write("another==1.0\n")
    assert setup("run").returncode == 0
    assert len(calls(checkout)) == 1
    assert setup("test").returncode == 0
    assert len(calls(checkout)) == 1


@pytest.mark.parametrize("path", ["engine/controller/core.py", "setup.py", "ganesha/wake.c"])
def test_what_is_compiled_is_compiled_again_when_it_was_changed(checkout: Path, setup: Setup, path: str) -> None:
    assert setup("test").returncode == 0
    calls(checkout)
    with (checkout / path).open("a") as file:
        file.write("\n")
    assert setup("test").returncode == 0
    assert len(calls(checkout)) == 1


def test_what_is_compiled_waits_for_nothing() -> None:
    assert COMPILED
    for path in COMPILED:
        assert not re.search(r"^\s*(async|await|.*\sawait) ", (ROOT / path).read_text(), re.MULTILINE), path


@pytest.mark.skipif(os.geteuid() != 0, reason="only root installs packages")
def test_only_what_is_missing_is_installed_and_its_services_kept_down(checkout: Path, setup: Setup) -> None:
    installed = checkout.parent / "installed"
    installed.write_text(
        "\n".join(name for name in installed.read_text().split() if name not in ("nfs-ganesha", "fio"))
    )
    done = setup("run")
    assert done.returncode == 0, done.stderr
    made = calls(checkout)
    assert [call.split()[-1] for call in made if call.startswith("apt-get")] == ["update", "nfs-ganesha"]
    assert [call for call in made if call.startswith("systemctl")] == [
        *(f"systemctl --quiet --now disable {unit}" for unit in ("nfs-ganesha.service", "nfs-ganesha-lock.service")),
        *(f"systemctl --quiet --now disable {unit}" for unit in ("rpcbind.socket", "rpcbind.service")),
    ]
    assert not (checkout.parent / "policy-rc.d").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root installs packages")
def test_a_service_that_was_there_is_left_alone(checkout: Path, setup: Setup) -> None:
    installed = checkout.parent / "installed"
    names = [name for name in installed.read_text().split() if name != "xfsprogs"]
    installed.write_text("\n".join([*names, "rpcbind"]) + "\n")
    assert setup("run").returncode == 0
    assert not [call for call in calls(checkout) if call.startswith("systemctl")]


def test_a_failing_installation_is_shown_and_tried_again(checkout: Path, setup: Setup) -> None:
    pip = checkout / ".venv/bin/python"
    working = pip.read_text()
    pip.write_text('#!/bin/bash\ncase "$*" in *-m\\ pip*) echo "no such version" >&2; exit 1;; esac\n')
    done = setup("run")
    assert done.returncode != 0
    assert "no such version" in done.stderr
    pip.write_text(working)
    assert setup("run").returncode == 0
    assert len(calls(checkout)) == 1
