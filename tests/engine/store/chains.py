"""Snapshot chains made by hand, the way the layout describes them."""

from __future__ import annotations

import json
from pathlib import Path


def add_snapshot(directory: Path, name: str) -> None:
    """Freeze the head of a closed replica as `name`, under a new empty head of the same size."""
    meta = json.loads((directory / "volume.meta").read_bytes())
    old = meta["Head"]
    number = int(old[len("volume-head-") : -len(".img")])
    head = f"volume-head-{number + 1:03d}.img"
    snapshot = f"volume-snap-{name}.img"
    head_meta = json.loads((directory / f"{old}.meta").read_bytes())
    (directory / old).rename(directory / snapshot)
    (directory / f"{old}.meta").unlink()
    (directory / f"{snapshot}.meta").write_text(json.dumps(head_meta | {"Name": snapshot, "UserCreated": True}))
    with open(directory / head, "wb") as image:
        image.truncate(meta["Size"])
    (directory / f"{head}.meta").write_text(json.dumps(head_meta | {"Name": head, "Parent": snapshot}))
    (directory / "volume.meta").write_text(json.dumps(meta | {"Head": head, "Parent": snapshot}))
