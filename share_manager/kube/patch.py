"""JSON merge patches (RFC 7396): what to send so that an object becomes another one."""

from __future__ import annotations

from typing import Any

import msgspec

Json = dict[str, Any]


def changes(before: Json, after: Json) -> Json:
    """The merge patch that makes `after` of `before`; empty when they are equal.

    Null removes; lists are replaced whole.
    """
    patch: Json = {name: None for name in before if name not in after}
    for name, value in after.items():
        old = before.get(name)
        if isinstance(value, dict) and isinstance(old, dict):
            if inner := changes(old, value):
                patch[name] = inner
        elif value != old:
            patch[name] = value
    return patch


def applied(target: Json, patch: Json) -> Json:
    """What the API server makes of it."""
    result = dict(target)
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        elif isinstance(value, dict):
            old = result.get(name)
            result[name] = applied(old if isinstance(old, dict) else {}, value)
        else:
            result[name] = value
    return result


def part_changes(before: msgspec.Struct, after: msgspec.Struct) -> Json:
    """The same for two statuses or specs."""
    return changes(msgspec.to_builtins(before), msgspec.to_builtins(after))
