"""All targets by name. Each is entered once and then called with bytes; what it raises is a defect."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from tests.fuzz import control, conversation, directory, hostile, parsers

Target = Callable[[bytes], None]

TARGETS: dict[str, Callable[[], AbstractContextManager[Target]]] = {
    "frames": lambda: nullcontext(parsers.frames),
    "messages": lambda: nullcontext(parsers.message),
    "record": lambda: nullcontext(parsers.record),
    "operation": lambda: nullcontext(parsers.operation),
    "directory": directory.replica,
    "control": control.socket,
    "server": conversation.server,
    "replica": hostile.replica,
}
