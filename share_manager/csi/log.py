"""Log lines of the driver: one JSON object a line on stderr, never with a secret in it."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

HIDDEN = "***"
_SENSITIVE_FIELDS = ("secrets", "mount_flags")
"""Marked as secret, or as possibly sensitive, in the specification."""
_SENSITIVE_KEYS = ("secret", "passphrase", "password", "token", "crypto_key")


class _Stderr:
    """A reader of the log that went away must not take the driver with it."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            return sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()


def configure(**context: object) -> None:
    """Set up structlog for this process; `context` is in every line."""
    structlog.configure(
        processors=[
            # not by context variables: gRPC's threads have others
            lambda logger, method, event: {**context, **event},
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            hide_secrets,
            structlog.processors.JSONRenderer(ensure_ascii=False),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(file=_Stderr()),  # type: ignore[arg-type]
        cache_logger_on_first_use=False,
    )


def hide_secrets(logger: object, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A structlog processor. Messages of the protocol become what may be shown of them; so does anything whose key
    sounds like a secret."""
    return {key: _shown(key, value) for key, value in event.items()}


def shown(message: Message) -> dict[str, Any]:
    """What may be shown of a message of the protocol."""
    return {field.name: _field(field, item) for field, item in message.ListFields()}


def _shown(key: str, value: Any) -> Any:
    if any(word in key.lower() for word in _SENSITIVE_KEYS) or key in _SENSITIVE_FIELDS:
        return HIDDEN
    if isinstance(value, Message):
        return shown(value)
    if isinstance(value, MutableMapping):
        return {str(name): _shown(str(name), item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_shown(key, item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _field(field: FieldDescriptor, value: Any) -> Any:
    if field.name in _SENSITIVE_FIELDS:
        return HIDDEN
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return {name: _shown(name, item) for name, item in value.items()}
    if field.is_repeated:
        return [_shown(field.name, item) for item in value]
    return _shown(field.name, value)
