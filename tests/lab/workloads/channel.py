"""How a workload talks to the host while it runs: events out, "stop" in."""

from __future__ import annotations

import json
import select
import socket
from typing import Any

_connection: socket.socket | None = None


def bind(connection: socket.socket) -> None:
    global _connection
    _connection = connection


def send(message: dict[str, Any]) -> None:
    if _connection is not None:
        _connection.sendall(json.dumps(message).encode() + b"\n")


def emit(event: str, **fields: Any) -> None:
    send({"event": {"event": event, **fields}})


def stopping(wait: float = 0.0) -> bool:
    """Whether the host wants this workload to end (or is gone), waiting up to `wait` seconds for it."""
    if _connection is None:
        return False
    return bool(select.select([_connection], [], [], wait)[0])
