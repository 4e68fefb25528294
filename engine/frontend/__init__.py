"""Frontends turn a volume into a file that the loop driver can attach."""

from engine.frontend.base import BlockVolume, Frontend, FrontendSession
from engine.frontend.registry import DEFAULT_FRONTEND, FRONTENDS, NO_FRONTEND, frontend

__all__ = ["DEFAULT_FRONTEND", "FRONTENDS", "NO_FRONTEND", "BlockVolume", "Frontend", "FrontendSession", "frontend"]
