"""The volume's shared secret, as a file of hex digits that only its owner reads."""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path

from engine.durable import replace_file
from engine.errors import EngineError

SECRET_SIZE = 32


def create_secret(path: Path) -> None:
    """Raises OSError."""
    write_secret(path, os.urandom(SECRET_SIZE))


def read_secret(path: Path) -> bytes:
    """Raises EngineError when it cannot be read or is none."""
    try:
        key = bytes.fromhex(path.read_text().strip())
    except (OSError, ValueError) as error:
        raise EngineError(f"cannot read the volume's secret {path}: {error}") from error
    if len(key) != SECRET_SIZE:
        raise EngineError(f"the volume's secret {path} has {len(key)} bytes, not {SECRET_SIZE}")
    return key


def volume_secret(cluster: bytes, uuid: str) -> bytes:
    """The secret of a volume whose nodes share one: so that no node has to be told one for each volume."""
    return hmac.new(cluster, f"share-manager volume {uuid}".encode(), hashlib.sha256).digest()


def write_secret(path: Path, key: bytes) -> None:
    """Raises OSError."""
    replace_file(path, key.hex().encode() + b"\n", mode=0o600)
