"""Log lines of the engine's processes: one JSON object a line on stderr."""

from __future__ import annotations

import logging
import os
import sys

import structlog


class _Stderr:
    """A reader that went away (the supervisor died) must not take the engine with it."""

    def write(self, text: str) -> int:
        try:
            return os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode(errors="replace"))
        except OSError:
            return len(text)

    def flush(self) -> None:
        return


def configure(**context: object) -> None:
    """Set up structlog for this process; `context` appears in every line."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(file=_Stderr()),  # type: ignore[arg-type]
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(**context)
