"""Volume ids made of the names that CSI gives: up to 128 bytes of nearly any characters.

An id is the name of a Volume, of its Service and of its export, so it is a DNS label that begins with a letter
(RFC 1035 section 2.3.1). A name that is one is its own id. Any other is told by a digest; the volume keeps the name.
"""

from __future__ import annotations

import hashlib
import re

from share_manager.csi.errors import InvalidArgumentError

MAX_NAME = 128
"""Bytes of a string, by the specification's size limits."""
_LABEL = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
_BANNED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_WORDS = 40
_DIGEST = 20
"""Hex digits: two names of a cluster meet with a chance of about the square of their number in 2^81."""


def is_volume_id(text: str) -> bool:
    return _LABEL.fullmatch(text) is not None


def volume_id(name: str) -> str:
    """Always the same for a name, and another one for another name. Raises InvalidArgumentError."""
    check_name(name)
    if is_volume_id(name):
        return name
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:_WORDS].strip("-")
    if not words[:1].isalpha():
        words = f"v-{words}".strip("-")
    return f"{words}-{hashlib.sha256(name.encode()).hexdigest()[:_DIGEST]}"


def check_name(name: str) -> None:
    """Raises InvalidArgumentError."""
    if not name:
        raise InvalidArgumentError("name is missing")
    if len(name.encode()) > MAX_NAME:
        raise InvalidArgumentError(f"name is longer than {MAX_NAME} bytes")
    if _BANNED.search(name):
        raise InvalidArgumentError("name has control characters, which the specification forbids")
