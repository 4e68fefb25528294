"""The frontends by name. They are imported on use: one needs libfuse, another may not."""

from __future__ import annotations

from typing import Final

from engine.errors import FrontendError
from engine.frontend.base import Frontend

FRONTENDS = ("device", "pyfuse3")
DEFAULT_FRONTEND: Final = "device"
NO_FRONTEND: Final = "none"


def frontend(name: str) -> Frontend:
    """Raises FrontendError for an unknown name or a missing library."""
    if name == NO_FRONTEND:
        from engine.frontend.none import NoFrontend

        return NoFrontend()
    if name not in FRONTENDS:
        raise FrontendError(f"unknown frontend {name!r}; there are: {', '.join(FRONTENDS)}")
    if name == "device":
        from engine.frontend.device import DeviceFrontend

        return DeviceFrontend()
    try:
        from engine.frontend.fuse3 import Pyfuse3Frontend
    except ImportError as error:
        raise FrontendError(f"frontend {name!r} cannot be loaded: {error}") from error
    return Pyfuse3Frontend()
