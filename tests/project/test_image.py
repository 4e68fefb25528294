"""The Dockerfile, read the way a linter would."""

from __future__ import annotations

import json
import re

from tests.project.common import ROOT

INSTRUCTIONS = [
    line.split(maxsplit=1)
    for line in re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text()).splitlines()
    if line.strip() and not line.startswith("#")
]


def arguments(name: str) -> list[str]:
    return [rest for instruction, rest in INSTRUCTIONS if instruction == name]


def last_stage() -> list[list[str]]:
    starts = [index for index, (instruction, _) in enumerate(INSTRUCTIONS) if instruction == "FROM"]
    return INSTRUCTIONS[starts[-1] :]


def test_the_base_is_debian_with_a_release_and_can_be_replaced() -> None:
    assert re.fullmatch(r"BASE=debian:[a-z]+-slim", arguments("ARG")[0])
    assert {start.split()[0] for start in arguments("FROM")} == {"${BASE}"}


def test_installing_asks_nothing_and_brings_nothing_extra() -> None:
    installs = [command for command in arguments("RUN") if "apt-get install" in command]
    assert len(installs) == 2
    for command in installs:
        assert "--yes" in command
        assert "--no-install-recommends" in command
        assert "apt-get update" in command.split("apt-get install")[0]
    assert "DEBIAN_FRONTEND=noninteractive" in " ".join(rest for _, rest in INSTRUCTIONS)


def test_the_image_carries_no_lists_compiler_or_caches() -> None:
    final = " ".join(rest for _, rest in last_stage())
    assert "rm -rf /var/lib/apt/lists/*" in final
    assert "build.txt" not in final
    assert "test.txt" not in (ROOT / "Dockerfile").read_text()
    assert "--no-cache-dir" in " ".join(arguments("RUN"))


def test_there_is_one_entry_point() -> None:
    (entry,) = arguments("ENTRYPOINT")
    assert json.loads(entry) == ["share-manager"]
    assert not arguments("CMD")
    assert not arguments("ADD")
    assert arguments("STOPSIGNAL") == ["SIGTERM"]


def test_what_is_copied_exists_and_passes_the_ignore_file() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for copy in arguments("COPY"):
        if copy.startswith("--from"):
            continue
        for source in copy.split()[:-1]:
            assert (ROOT / source).exists()
            assert any(source == entry or source.startswith(f"{entry}/") for entry in allowed)
