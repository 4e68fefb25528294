"""What the documents claim, where a program can check it."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from engine.wire.frame import HEADER_SIZE, MAX_PAYLOAD, FrameType, Status
from share_manager import metrics
from share_manager.bench.command import NAMES
from tests.project.common import ROOT

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def text(name: str) -> str:
    return (ROOT / name).read_text()


@cache
def help_of(*command: str) -> str:
    argv = [sys.executable, "-m", "share_manager", *command, "--help"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, env={"COLUMNS": "200", "PATH": "/usr/bin"})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_anchors_are_headings(document: Path) -> None:
    found = {
        re.sub(r"[^a-z0-9 -]", "", heading.lower()).strip().replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    }
    for anchor in re.findall(r"\]\(#([^)]+)\)", document.read_text()):
        assert anchor in found


def test_the_wire_page_has_every_frame_and_status() -> None:
    page = text("docs/wire-protocol.md")
    for kind in FrameType:
        assert f"| {kind.value} | {kind.name} |" in page
    for status in Status:
        assert f"| {status.value} | {status.name} |" in page
    assert f"{HEADER_SIZE} bytes of header" in page
    assert f"({MAX_PAYLOAD})" in page


def test_the_operations_page_has_every_metric() -> None:
    promised = set(re.findall(r"^    (share_manager_\S+)", metrics.__doc__ or "", re.MULTILINE))
    documented = set(re.findall(r"^\| `(share_manager_[^`]+)`", text("docs/operations.md"), re.MULTILINE))
    assert promised == documented


def test_the_bench_page_has_every_target() -> None:
    page = text("docs/bench.md")
    for name in NAMES:
        assert f"`{name}`" in page


def test_the_readme_names_every_command() -> None:
    commands = set(re.findall(r"^[│|] ([a-z][a-z-]*) ", help_of(), re.MULTILINE))
    assert commands >= {"serve", "attach", "status", "volume", "doctor", "bench"}
    named = set(re.findall(r"^\| `share-manager ([a-z][a-z-]*)", text("README.md"), re.MULTILINE))
    assert named == commands


def test_the_readme_has_the_options_of_serve() -> None:
    table = text("README.md").split("Options of `serve`")[1].split("\n## ")[0]
    documented = set(re.findall(r"`(--[a-z-]+)", table))
    offered = set(re.findall(r"(--[a-z-]+)", help_of("serve"))) - {"--help", "--version", "--dirsync"}
    assert documented == offered


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_shown_are_commands(document: Path) -> None:
    commands = set(re.findall(r"^[│|] ([a-z][a-z-]*) ", help_of(), re.MULTILINE))
    for command in re.findall(r"share-manager ((?!is |bench`)[a-z][a-z-]*)", document.read_text()):
        assert command in commands | {"bench"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_make_targets_shown_are_targets(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", text("Makefile"), re.MULTILINE))
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", document.read_text(), re.MULTILINE):
        assert target in targets
