from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]


def apt_list(name: str) -> list[str]:
    lines = (ROOT / "deploy/apt" / f"{name}.txt").read_text().splitlines()
    return [line for line in (line.split("#")[0].strip() for line in lines) if line]
