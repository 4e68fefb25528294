"""The volume's shared secret, as a file of hex digits that only its owner reads."""

from __future__ import annotations

import os
from pathlib import Path

from engine.durable import replace_file
from engine.errors import EngineError

SECRET_SIZE = 32


def create_secret(path: Path) -> None:
    """Raises OSError."""
    replace_file(path, os.urandom(SECRET_SIZE).hex().encode() + b"\n", mode=0o600)


def read_secret(path: Path) -> bytes:
    """Raises EngineError when it cannot be read or is none."""
    try:
        key = bytes.fromhex(path.read_text().strip())
    except (OSError, ValueError) as error:
        raise EngineError(f"cannot read the volume's secret {path}: {error}") from error
    if len(key) != SECRET_SIZE:
        raise EngineError(f"the volume's secret {path} has {len(key)} bytes, not {SECRET_SIZE}")
    return key
